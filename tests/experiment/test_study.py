"""The study at a size that takes seconds, and its statistics against SciPy and by hand."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from scipy import stats

import small
from grjca.cli import main
from grjca.config import STUDIED, StudyConfig
from grjca.data.videos import load
from grjca.errors import UserError
from grjca.evaluation import study, study_report
from grjca.evaluation.study_report import Cells, Estimate

SOME = ("concat", "rjca", "grjca", "hgrjca")
PRESET = study.preset
LEVELS, SEEDS = (0.0, 0.5), 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Run a study of one epoch."""
    out = tmp_path_factory.mktemp("study") / "study"
    patch = pytest.MonkeyPatch()

    def preset(config):
        chosen = PRESET(config)
        model = replace(small.MODEL, modalities={"visual": 48, "audio": 32})
        training = replace(chosen.training, epochs=1, window=20, hop=15, model=model)
        scenario = replace(chosen.scenario, videos=4, length=(30, 60))
        return study.Preset(LEVELS, SEEDS, scenario, 6, training)

    patch.setattr(study, "preset", preset)
    patch.setattr(study, "STUDIED", SOME)
    assert main(["study", "--out", str(out), "--jobs", "1"]) == 0
    yield StudyConfig(out)
    patch.undo()


def test_every_cell_is_there_once(tiny):
    about, *cells = map(json.loads, (tiny.out / "results.jsonl").read_text().splitlines())
    assert about["preset"] == "small" and about.keys() >= {"torch", "processor", "commit"}
    expected = [(f, level, seed) for level in LEVELS for seed in range(SEEDS) for f in SOME]
    assert [(cell["fusion"], cell["level"], cell["seed"]) for cell in cells] == expected
    for cell in cells:
        assert -1 <= cell["ccc"] <= 1 and cell["error"].keys() >= {"clean"}
        assert ("attention" in cell) == (cell["fusion"] in ("grjca", "hgrjca"))
        assert ("visual weak" in cell["error"]) == (cell["level"] > 0)
        if cell["level"]:
            kinds = {f"{m} {kind}" for m in ("visual", "audio") for kind in study_report.KINDS}
            assert cell["error"].keys() - {"clean", "visual weak", "audio weak"} <= kinds
        for shares in cell.get("attention", {}).values():
            assert all(0 <= share <= 1 for share in shares.values())


def test_what_is_scored_was_not_trained_on(tiny):
    folder = tiny.out / "data" / "weak-0.50-seed-0"
    trained, scored = (load(folder / part, "all", widths={"visual": 48, "audio": 32}) for part in ("train", "held-out"))
    assert not {video.name for video in trained} & {video.name for video in scored}
    assert not any(np.array_equal(a.labels[:20], b.labels[:20]) for a in trained for b in scored)


def test_all_fusions_see_the_same_data_of_a_level(tiny):
    assert len(list((tiny.out / "data").iterdir())) == len(LEVELS) * SEEDS
    labels = [
        load(tiny.out / "data" / f"weak-{w:.2f}-seed-0" / "held-out", "all", widths={"visual": 48, "audio": 32})
        for w in LEVELS
    ]
    for clean, weak in zip(*labels, strict=True):  # what is weak changes no label
        np.testing.assert_array_equal(clean.labels, weak.labels)


def test_a_study_goes_on_where_it_was(tiny, monkeypatch):
    before = (tiny.out / "results.jsonl").read_text()
    (tiny.out / "cells" / "grjca-weak-0.50-seed-1.json").unlink()
    ran = []
    monkeypatch.setattr(study, "_results", lambda config, chosen, cells: here(config, chosen, cells, ran))
    study.study(replace(tiny, jobs=1))
    assert ran == ["grjca-weak-0.50-seed-1"]
    assert (tiny.out / "results.jsonl").read_text() == before


def here(config, chosen, cells, ran):
    """Run cells in this process, and record which are run."""
    for cell in cells:
        if not (config.out / "cells" / f"{cell.name}.json").exists():
            ran.append(cell.name)
        yield study.run_cell(config.out, chosen, cell)


def test_other_folders_are_refused(tiny, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is no study"):
        study.study(StudyConfig(tmp_path))
    with pytest.raises(UserError, match="other settings"):
        study._check(tiny, replace(study.preset(tiny), seeds=3))


def test_table_and_plots(tiny):
    text = (tiny.out / "table.md").read_text()
    for line in ("| CCC | 0% weak | 50% weak |", "| grjca over rjca |", "| hgrjca, audio gate, visual weak |"):
        assert line in text
    for name in ("ccc.svg", "gates.svg"):
        assert "<svg" in (tiny.out / name).read_text()


def row(fusion, level, seed, ccc, **attention):
    return {"fusion": fusion, "level": level, "seed": seed, "ccc": ccc, "attention": attention}


def test_estimates():
    values = [0.1, 0.4, 0.3, 0.5]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    estimate = Estimate.of(values)
    assert (estimate.mean - estimate.half, estimate.mean + estimate.half) == pytest.approx((low, high))
    assert Estimate.of([0.2]).half == np.inf
    assert Estimate(0.2, 0.1).signed == "+0.200 ± 0.100 *" and Estimate(-0.1, 0.2).signed == "-0.100 ± 0.200"


def test_gains_are_paired_and_gates_compared_with_clean_frames():
    rows = [
        row(f, 0.5, seed, 0.1 * seed + 0.2 * (f == "grjca"), visual={"clean": 0.5, "audio weak": 0.3 - 0.1 * seed})
        for f in ("rjca", "grjca")
        for seed in range(3)
    ]
    cells = Cells(rows)
    gain = cells.gain("grjca", "rjca", 0.5)
    assert gain.mean == pytest.approx(0.2) and gain.half == pytest.approx(0, abs=1e-12)
    assert cells.turn("grjca", "visual", "audio weak", 0.5).mean == pytest.approx(-0.3)
    assert cells.ccc("grjca", 0.5).mean == pytest.approx(0.3) and cells.fusions == ["rjca", "grjca"]


def test_presets_differ_in_size_alone(tmp_path):
    small_one, full = (PRESET(StudyConfig(tmp_path, name)) for name in ("small", "full"))
    assert [of[-1] for of in full.training.model.encoders.values()] == [256, 128] and full.training.window == 300
    for chosen in (small_one, full):
        assert chosen.levels[0] == 0 and chosen.seeds >= 3 and chosen.training.model.normalize
        assert chosen.training.model.widths["visual"] == chosen.scenario.visual_features
        assert json.dumps(asdict(chosen), default=str)
    assert set(study_report.COLOURS) == set(STUDIED)
