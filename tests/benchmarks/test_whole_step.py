"""The time of a whole training step: what is timed, what is refused, and what is made of the samples."""

import json
import os
from dataclasses import asdict

import numpy
import pytest
import torch
from test_benchmarks import Slightly

from benchmarks import whole_step
from grjca.config import ModelConfig
from grjca_kernels import GatedRJCAFused

pytest.importorskip("scipy")

SMALL = ModelConfig(
    modalities={"visual": 9, "audio": 7}, channels={"visual": (8, 6), "audio": (5,)}, kernel=3, hidden=8
)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Tiny models, few rounds, and another folder for rows."""
    values = {"CONFIG": SMALL, "LENGTH": 11, "RESULTS": tmp_path, "WARM_UP": 1, "FEWEST": 3, "MOST": 3}
    for name, value in {**values, "RESAMPLES": 500, "THREADS": 1}.items():
        monkeypatch.setattr(whole_step, name, value)
    monkeypatch.setattr(whole_step, "source", lambda: "these")  # somebody may be editing them


def main(*more):
    return whole_step.main(["--batch", "4", "--minutes", "0.001", *more])


def written():
    return whole_step.read(whole_step.file_of(whole_step.RESULTS, whole_step.provenance()))


def test_rows(capsys, monkeypatch):
    assert main() == 0
    rows = written()
    assert [row["row"] for row in rows] == ["grjca B=4", "hgrjca B=4"]
    for row in rows:
        assert row["rounds"] == 3 and row["dtype"] == "float32" and row["commit"] and row["threads"] >= 1
        assert (row["length"], row["dim_visual"], row["dim_audio"]) == (11, 6, 5)
        assert row["speedup_95"][0] <= row["speedup"] <= row["speedup_95"][1]
        for how in ("eager", "fused"):
            assert 0 < row[how]["block_share"]["p20"] <= row[how]["block_share"]["p80"] < 1
            assert all(0 < row[how][f"{part}_ms"]["p50"] < row[how]["step_ms"]["p80"] for part in whole_step.PARTS)
        assert row["saved_bytes"]["fused"] < row["saved_bytes"]["eager"]
    assert "| grjca, B = 4 |" in capsys.readouterr().out

    monkeypatch.setattr(whole_step, "measure", lambda *_: pytest.fail("it was there already"))
    assert main() == 0 and written() == rows
    monkeypatch.setattr(whole_step, "source", lambda: "others")
    figures = {
        name: rows[0][name] for name in ("eager", "fused", "speedup", "speedup_95", "block_speedup", "saved_bytes")
    }
    monkeypatch.setattr(whole_step, "measure", lambda *_: {**figures, "rounds": 99})
    assert main() == 0
    assert [row["rounds"] for row in written()] == [99, 99], "other sources are measured anew, in the same place"


@pytest.mark.parametrize(("value", "gradient"), [(1.0001, 1.0), (1.0, 1.001), (float("nan"), 1.0)])
def test_a_wrong_block_has_no_row(value, gradient, monkeypatch, capsys):
    class Wrong(GatedRJCAFused):
        def forward(self, visual, audio, lengths=None):
            return Slightly.apply(super().forward(visual, audio, lengths), value, gradient)

    path = whole_step.file_of(whole_step.RESULTS, whole_step.provenance())
    whole_step.keep(path, {"row": "grjca B=4", "of": "an older commit"})
    monkeypatch.setattr("grjca.model.audiovisual.GatedRJCAFused", Wrong)
    assert main() == 1
    assert written() == []
    assert "grjca B=4: no time" in (said := capsys.readouterr().err) and "is allowed" in said


def test_a_block_of_other_masks_has_no_row(monkeypatch):
    class Wrong(GatedRJCAFused):
        def forward(self, visual, audio, lengths=None):
            torch.rand(1)
            return super().forward(visual, audio, lengths)

    monkeypatch.setattr("grjca.model.audiovisual.GatedRJCAFused", Wrong)
    with pytest.raises(AssertionError, match="is allowed"):
        whole_step.measure("grjca", 4, 0)


def test_what_is_timed_has_the_dropout_of_pytorch():
    """The masks of the fused block, made by PyTorch operators, would slow eager down."""
    assert not whole_step.make_model("grjca", "eager").fusion.shared_masks
    assert whole_step.make_model("grjca", "eager", shared_masks=True).fusion.shared_masks
    assert whole_step.make_model("grjca", "eager").training


@pytest.mark.parametrize("implementation", ["eager", "fused"])
@pytest.mark.parametrize("fusion", whole_step.FUSIONS)
def test_marks_enclose_the_block_and_nothing_else(fusion, implementation):
    model, events = whole_step.make_model(fusion, implementation), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: events.append(name))
    with whole_step.marked(model.fusion) as marks:
        model.fusion.register_full_backward_pre_hook(lambda *_: events.append("in"))
        model.fusion.register_full_backward_hook(lambda *_: events.append("out"))
        whole_step.loss_of(model, whole_step.make_batch(4, 0))[1].backward()
    assert len(marks) == 4 and marks == sorted(marks)
    within = events[events.index("in") + 1 : events.index("out")]
    assert {*within} == {name for name, _ in model.named_parameters() if name.startswith("fusion.")}
    assert {*events[: events.index("in")]} == {name for name, _ in model.named_parameters() if name.startswith("head.")}


@pytest.mark.parametrize("implementation", ["eager", "fused"])
def test_marks_change_no_bit(implementation):
    batch = whole_step.make_batch(4, 0)
    plain = whole_step.run(whole_step.make_model("grjca", implementation), batch)
    model = whole_step.make_model("grjca", implementation)
    with whole_step.marked(model.fusion):
        marked = whole_step.run(model, batch)
    assert all(torch.equal(marked[name], plain[name]) for name in plain)


def test_parts_are_the_step(monkeypatch):
    """By a clock that counts how often it was read, and the block's two intervals are in the middle of it."""
    model = whole_step.make_model("grjca", "fused")
    optimizer = torch.optim.Adam(model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    ticks = iter([0, 1, 3, 7, 15, 31, 63, 127, 255])
    monkeypatch.setattr(whole_step.time, "perf_counter", lambda: next(ticks))
    with whole_step.marked(model.fusion) as marks:
        parts = whole_step.step(model, optimizer, whole_step.make_batch(4, 0), marks)
    assert marks == [1, 3, 31, 63]
    assert parts == {
        "rest_forward": 7 - 0 - 2,
        "block_forward": 2,
        "block_backward": 32,
        "rest_backward": 127 - 15 - 32,
        "optimizer": 15 - 7 + 255 - 127,
    }
    assert sum(parts.values()) == 255 and tuple(parts) == whole_step.PARTS
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def sample(*ms):
    return dict(zip(whole_step.PARTS, (value / 1e3 for value in ms), strict=True))


def test_summary():
    eager, fused = [sample(10, 20, 30, 35, 5)] * 3, [sample(10, 5, 10, 20, 5)] * 3
    row = whole_step.summary({"eager": eager, "fused": fused})
    assert row["eager"]["step_ms"] == {"p20": 100, "p50": 100, "p80": 100}
    assert row["eager"]["block_ms"]["p50"] == 50 and row["fused"]["block_ms"]["p50"] == 15
    assert row["eager"]["block_share"]["p50"] == 0.5 and row["fused"]["block_share"]["p50"] == 0.3
    assert (row["speedup"], row["speedup_95"]) == (2, [2, 2])
    assert row["block_speedup"] == 3.333


def test_interval_brackets_the_ratio():
    random = numpy.random.default_rng(1)
    slow = 1 + 5 * (random.random(60) < 0.2)  # moments that strike both
    eager, fused = (slow * base * random.lognormal(0, 0.05, 60) for base in (3.0, 2.0))
    low, high = whole_step.interval(eager, fused)
    assert low < numpy.median(eager) / numpy.median(fused) < high
    assert 1.4 < low < 1.5 < high < 1.6
    few_low, few_high = whole_step.interval(eager[:8], fused[:8])
    assert few_high - few_low > high - low, "fewer samples say less"
    assert whole_step.interval(eager, fused) == (low, high), "the same samples, the same interval"


def test_a_killed_run_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    whole_step.keep(path, {"row": "a", "n": 1})
    whole_step.keep(path, {"row": "b", "n": 2})
    whole_step.keep(path, {"row": "a", "n": 3})
    kept = [{"row": "a", "n": 3}, {"row": "b", "n": 2}]
    assert whole_step.read(path) == kept
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        whole_step.keep(path, {"row": "a", "n": 4})
    assert json.loads(path.read_text()) == kept


def test_other_settings_are_measured_anew(monkeypatch):
    place = whole_step.described("grjca", 4, 1)
    row = json.loads(json.dumps({**place, **whole_step.provenance(), "rounds": 5}))
    assert whole_step.is_known([row], place)
    assert not whole_step.is_known([row], whole_step.described("grjca", 4, 2))
    assert not whole_step.is_known([{**row, "torch": "1"}], place)
    monkeypatch.setattr(whole_step, "CONFIG", ModelConfig(**{**asdict(SMALL), "hidden": 16}))
    assert not whole_step.is_known([row], whole_step.described("grjca", 4, 1))


def test_a_source_that_changes_has_another_name(tmp_path, monkeypatch):
    monkeypatch.undo()  # of the fixture
    monkeypatch.setattr(whole_step, "ROOT", tmp_path)
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    names = []
    for text in ("a", "b", "a"):
        (tmp_path / "csrc" / "cpu" / "tanh.h").write_text(text)
        names.append(whole_step.source())
    assert names[0] == names[2] != names[1]


def test_refusals(capsys):
    for arguments in (["--batch", "0"], ["--minutes", "0"]):
        with pytest.raises(SystemExit):
            whole_step.main(arguments)
    assert "expected --batch of 1 or more" in capsys.readouterr().err
