"""Counts equal the record, and one that differs is reported."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cost_baseline
from grjca.measure import Shape
from grjca.model.eager import GatedRJCAEager
from grjca_kernels import GatedRJCAFused, cpu
from grjca_kernels.call import Call
from grjca_kernels.triton_kernels import launch_config

pytestmark = pytest.mark.skipif(
    torch.__version__.startswith("2.4."), reason="FlopCounterMode of PyTorch 2.4 cannot count within autograd.grad"
)

needs_native = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))


@pytest.mark.parametrize("section", cost_baseline.SECTIONS)
def test_counts_are_those_recorded(section):
    recorded = cost_baseline.read()
    assert section in recorded, f"nothing is recorded; run {cost_baseline.UPDATE}"
    reason = cost_baseline.why_not(section, recorded)
    if reason is not None:
        pytest.skip(reason)
    changes = cost_baseline.changes(section, recorded[section]["counts"], cost_baseline.SECTIONS[section].count())
    assert not changes, "\n".join(changes)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """One small shape instead of the real ones, and a record of its own."""
    monkeypatch.setattr(cost_baseline, "SHAPES", {"small": Shape(9, 6, 5, 2, 3, normalize=True)})
    monkeypatch.setattr(cost_baseline, "GATINGS", ("flat",))
    monkeypatch.setattr(cost_baseline, "RECORDED", tmp_path / "cost_baseline.json")
    return tmp_path / "cost_baseline.json"


@pytest.fixture
def recorded(small, capsys):
    """``recorded(section)`` records it as it is; ``recorded.changed(section)`` are the lines on what is not so now."""

    def record(section):
        assert cost_baseline.main(["--update", "--only", section]) == 0
        assert changed(section) == []

    def changed(section):
        capsys.readouterr()
        status = cost_baseline.main(["--only", section])
        lines = capsys.readouterr().out.splitlines()
        assert status == ("as recorded" not in lines[0])
        return lines if status else []

    record.changed = changed
    return record


@needs_native
@pytest.mark.parametrize(("section", "kind"), [("fused", GatedRJCAFused), ("eager", GatedRJCAEager)])
def test_one_more_operator(section, kind, recorded, monkeypatch):
    recorded(section)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *args, **options: forward(*args, **options).neg())
    lines = recorded.changed(section)
    assert [line.split(" was ")[0] for line in lines] == [
        f"{section}: small flat, operators of the {direction}" for direction in ("forward", "backward")
    ]
    for line in lines:
        was, now = (int(words.split()[0].strip(".,")) for words in (line.split(" was ")[1], line.split(" is ")[1]))
        assert now == was + 1


@needs_native
def test_a_call_runs_few_functions():
    calls = cost_baseline.python_calls()
    assert max(count for name, count in calls.items() if "inference" in name) <= 60, calls


def test_a_larger_workspace_of_triton(recorded, monkeypatch):
    recorded("triton plan")
    unit = launch_config.unit
    monkeypatch.setattr(launch_config, "unit", lambda problem, chunk: unit(problem, chunk) + 64)
    lines = recorded.changed("triton plan")
    assert len(lines) == 4 and all(", bytes was" in line and "It grew" in line for line in lines)


def test_the_triton_workspace_is_what_is_allocated(small):
    """The sum of what triton/launch.py allocates."""
    pytest.importorskip("triton", minversion="3.6")
    from grjca_kernels.triton_kernels import launch as of_triton

    problem = cost_baseline.described(replace(cost_baseline.SHAPES["small"], gating="flat"))
    options = {"backward": True, "weights": True, "tf32": False, "lengths": False}
    prepared = of_triton._prepare(problem, torch.bfloat16, cost_baseline.DEVICE, **options)
    features = [torch.empty(problem.batch, problem.length, width, dtype=torch.bfloat16) for width in problem.widths]
    made = of_triton.gather(Call(problem, features, [], iterates=features[0]), prepared)
    bytes_made = sum(x.numel() * x.itemsize for x in (made.activation_workspace, made.fp32_workspace, made.bits))
    assert cost_baseline.triton_plans()["small flat bfloat16 backward, bytes"] == bytes_made


def test_instructions_may_differ_a_little():
    was = {"forward": 1000, "backward": 3000}
    assert cost_baseline.changes("instructions", was, {"forward": 1020, "backward": 2940}) == []
    grew, shrank = cost_baseline.changes("instructions", was, {"forward": 1021, "backward": 2939})
    assert "(+2.1 %). It grew" in grew and "(-2.0 %). It shrank" in shrank
    assert len(cost_baseline.changes("fused", was, {"forward": 1001, "backward": 3000})) == 1


@needs_native
def test_instructions_are_counted_or_refused(monkeypatch):
    """A valgrind that finds no symbols exits with 0 and writes nothing."""
    monkeypatch.setattr(
        cost_baseline.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stderr="Collected : 0")
    )
    with pytest.raises(RuntimeError, match=r"expected valgrind to count 1 calls(.|\n)*Collected : 0"):
        cost_baseline.callgrind([{}])


def test_counts_that_come_and_go():
    new, old = cost_baseline.changes("fused", {"a": 1, "b": 2}, {"b": 2, "c": 3})[::-1]
    assert new.startswith("fused: c is not recorded, and is 3.") and old.startswith(
        "fused: a was 1, and is no longer counted"
    )


def test_another_pytorch_is_not_compared(recorded, small, capsys):
    recorded("eager")
    found = json.loads(small.read_text())
    found["eager"]["made_by"]["torch"] = "2.4.0"
    small.write_text(json.dumps(found))
    capsys.readouterr()
    assert cost_baseline.main(["--only", "eager"]) == 0
    assert "not compared: the record was made by torch 2.4.0, and here is torch" in capsys.readouterr().out
    assert cost_baseline.main(["--update", "--only", "eager"]) == 0
    assert json.loads(small.read_text())["eager"]["made_by"] == cost_baseline.of_torch()


def test_an_update_keeps_what_cannot_be_counted_here(small, monkeypatch, capsys):
    kept = {"made_by": {}, "counts": {"a": 1}}
    small.write_text(json.dumps({"cuda plan": kept}))
    monkeypatch.setattr(cost_baseline, "SECTIONS", {**cost_baseline.SECTIONS})
    cost_baseline.SECTIONS["cuda plan"] = replace(
        cost_baseline.SECTIONS["cuda plan"], why_not=lambda: "there is no nvcc."
    )
    assert cost_baseline.main(["--update", "--only", "triton plan", "cuda plan"]) == 0
    found = json.loads(small.read_text())
    assert found["cuda plan"] == kept and found["triton plan"]["counts"]
    assert "cuda plan: not compared: there is no nvcc." in capsys.readouterr().out
