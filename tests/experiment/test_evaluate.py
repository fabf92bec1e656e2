"""``grjca evaluate``: figures recomputed from what ``grjca predict`` writes, the parity of backends, and the plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from grjca.config import EvaluateConfig, PredictConfig
from grjca.environment import backend_used
from grjca.errors import UserError
from grjca.evaluation import plots
from grjca.evaluation.evaluate import evaluate, report, selected
from grjca.evaluation.gates import iterate_weights
from grjca.evaluation.predict import predict
from grjca.model.eager import GatedRJCAEager
from grjca.training import runs
from grjca.training.metrics import Scores, SplitScores
from small import CONSTANT, LENGTHS, MODEL, WITHOUT_LABELS, read_labels, read_predictions, write_data, write_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "valence", data)


def read_strictly(path: Path) -> dict[str, Any]:
    """Read strict JSON, which has no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


def figures(prediction: np.ndarray, label: np.ndarray) -> dict[str, float]:
    moved = (prediction.mean() - label.mean()) ** 2
    covariance = np.mean((prediction - prediction.mean()) * (label - label.mean()))
    return {
        "frames": len(label),
        "ccc": 2 * covariance / (prediction.var() + label.var() + moved),
        "rmse": np.sqrt(np.mean((prediction - label) ** 2)),
        "pearson": np.corrcoef(prediction, label)[0, 1],
    }


def test_figures_are_those_of_the_predictions(run: Path, data: Path, tmp_path: Path) -> None:
    assert evaluate(EvaluateConfig(run, out=tmp_path / "out", plots=False)) == 0
    predict(PredictConfig(run, data, tmp_path / "predicted", split="validate"))
    predictions, labels = read_predictions(tmp_path / "predicted" / "predictions"), read_labels(data, "validate")
    assert predictions.keys() == labels.keys() == LENGTHS["validate"].keys()
    valid = {name: (np.abs(label) <= 1).all(axis=1) for name, label in labels.items()}
    pairs = {name: (predictions[name][valid[name], 0], labels[name][valid[name], 0]) for name in sorted(labels)}
    del pairs[WITHOUT_LABELS]

    found = read_strictly(tmp_path / "out" / "metrics.json")
    assert found["videos"].keys() == pairs.keys()
    assert found["videos"][CONSTANT].pop("pearson") is None
    for name, pair in pairs.items():
        with np.errstate(invalid="ignore"):
            expected = figures(*pair)
        for figure, value in found["videos"][name].items():
            assert value == pytest.approx(expected[figure], abs=1e-7), (name, figure)  # files have 8 decimals
    together = figures(*(np.concatenate(side) for side in zip(*pairs.values(), strict=True)))
    assert found["overall"] == pytest.approx(together, abs=1e-7)
    assert found["overall"]["frames"] == sum(of["frames"] for of in found["videos"].values())
    assert (found["target"], found["split"], found["fold"], found["fusion"]) == ("valence", "validate", 0, "grjca")
    assert found["epoch"] == 2
    assert found["backend"] == backend_used("auto", "cpu")
    assert {"python", "torch", "grjca-kernels"} <= found["versions"].keys()
    assert found["compare"] is None


def test_says_what_it_evaluated(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    evaluate(EvaluateConfig(run, split="train", out=tmp_path, backend="reference", plots=False))
    printed = capsys.readouterr().out
    for text in ("valence by grjca (computed by reference)", "train split of fold 0", "weights of epoch 2", "alpha"):
        assert text in printed
    assert "gamma" not in printed
    assert read_strictly(tmp_path / "metrics.json")["backend"] == "reference"
    assert not list(tmp_path.glob("*.png"))


def test_compares_backends(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    evaluate(EvaluateConfig(run, out=tmp_path, compare="eager", plots=False))
    found = read_strictly(tmp_path / "metrics.json")
    of = found["compare"]
    assert of["backend"] == "eager"
    assert of["ccc"] == pytest.approx(found["overall"]["ccc"], abs=1e-5)
    assert of["difference"] <= of["rounding"] < 1e-4
    assert of["within_rounding"] is True
    assert "within float32 rounding" in capsys.readouterr().out


def test_tells_a_backend_that_is_wrong(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = GatedRJCAEager.forward
    monkeypatch.setattr(GatedRJCAEager, "forward", lambda *given, **options: right(*given, **options) * 1.001)
    assert evaluate(EvaluateConfig(run, out=tmp_path / "out", compare="eager", plots=False)) == 0
    assert "MORE than float32 rounding" in capsys.readouterr().out
    of = read_strictly(tmp_path / "out" / "metrics.json")["compare"]
    assert of["within_rounding"] is False
    difference = {}
    for backend in ("auto", "eager"):
        predict(PredictConfig(run, data, tmp_path / backend, split="validate", backend=backend))  # type: ignore[arg-type]
        difference[backend] = read_predictions(tmp_path / backend / "predictions")
    apart = {name: np.abs(difference["auto"][name] - difference["eager"][name]).max() for name in LENGTHS["validate"]}
    assert of["difference"] == pytest.approx(max(apart.values()), abs=2e-8)
    assert of["video"] == max(apart, key=apart.__getitem__)


@pytest.mark.parametrize("fusion", ["concat", "rjca", "dca", "grjca", "hgrjca", "tagf"])
def test_draws(fusion: Any, data: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", data, fusion=fusion)
    out = run / "evaluation" / "validate"
    out.mkdir(parents=True)
    (out / "metrics.json").write_text('{"videos": {"old": {}}}')
    for name in ("video_old.png", "gates.png", "mine.txt", "video_mine.png"):
        (out / name).write_text("old")
    evaluate(EvaluateConfig(run, plotted_videos=2))
    gates = [] if fusion in ("concat", "rjca") else ["gates.png"]
    drawn = sorted(path.name for path in out.glob("*.png") if not path.name.startswith("video_"))
    assert drawn == sorted([*gates, "scatter.png"])
    assert (out / "video_mine.png").read_text() == "old"
    (out / "video_mine.png").unlink()
    assert len(list(out.glob("video_*.png"))) == 2
    assert not (out / "video_old.png").exists()
    assert (out / "mine.txt").read_text() == "old"
    heights = {}
    for path in out.glob("*.png"):
        image = imread(path)
        assert image[..., :3].std() > 0.05, path
        heights[path.name.partition("_")[0]] = len(image)
    assert (heights["video"] > 500) == bool(gates)  # with a panel for each modality beneath, or none


def test_plots_of_something_else_are_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "gates.png").write_text("of a castle")
    with pytest.raises(UserError, match=r"gates\.png is not of an evaluation"):
        evaluate(EvaluateConfig(run, out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["gates.png"]


def test_refuses(run: Path, data: Path, tmp_path: Path) -> None:
    concat = write_run(tmp_path / "concat", data, fusion="concat")
    with pytest.raises(UserError, match="concat has nothing"):
        evaluate(EvaluateConfig(concat, compare="eager"))
    with pytest.raises(UserError, match="does not exist"):
        evaluate(EvaluateConfig(run, data=tmp_path / "nowhere"))
    with pytest.raises(UserError, match="cannot run"):
        evaluate(EvaluateConfig(run, out=tmp_path, backend="cuda"))
    (run / runs.BEST).rename(tmp_path / "moved")
    try:
        with pytest.raises(UserError, match="no epoch is done"):
            evaluate(EvaluateConfig(run))
    finally:
        (tmp_path / "moved").rename(run / runs.BEST)


def many(count: int) -> SplitScores:
    scores = {f"v{i:03d}": Scores(10, ((i * 7) % count) / count, 0.5, float("nan")) for i in range(count)}
    return SplitScores(Scores(10 * count, 0.5, 0.5, 0.5), scores)


def test_table_of_hundreds_of_videos_fits_on_a_screen() -> None:
    about = {
        name: name for name in ("run", "data", "target", "split", "fold", "fusion", "backend", "epoch", "precision")
    }
    lines = report(about, many(300), [], None).splitlines()
    assert len(lines) < 30
    assert "280 more in metrics.json" in "".join(lines)
    assert lines[5].split()[:3] == ["v000", "10", "0.0000"]
    assert lines[-1].split()[2:] == ["0.9967", "0.5000", "-"]


def test_selects_lowest_median_and_highest() -> None:
    scores = many(5)
    ranked = sorted(scores.videos, key=lambda name: scores.videos[name].ccc)
    assert selected(scores, 3) == [ranked[0], ranked[2], ranked[4]]
    assert selected(scores, 0) == []
    assert sorted(selected(scores, 9)) == sorted(ranked)


# ---- plots


def test_invalid_frames_are_gaps() -> None:
    label = np.array([0.1, 0.2, np.nan, np.nan, -0.5, 0.3])
    weights = {name: np.full((6, 3), 1 / 3) for name in ("visual", "audio")}
    figure = plots.over_time("a$b$c", "valence", np.linspace(-1, 1, 6), label, weights)
    top, *beneath = figure.axes
    lines = {line.get_label(): line for line in top.lines}
    for name in ("label", "prediction"):
        assert np.isnan(np.asarray(lines[name].get_ydata())).tolist() == [False, False, True, True, False, False]
        assert list(lines[name].get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert [axes.get_ylabel().split()[0] for axes in beneath] == ["visual", "audio"]
    assert beneath[-1].get_xlabel() == "frame"
    assert all(len(axes.collections) == 3 for axes in beneath)


def test_long_videos_are_thinned_by_means() -> None:
    frames, values = np.arange(1, 3002), np.linspace(0, 1, 3001)[:, None] * [1, -1] + [0, 1]
    places, means = plots._thinned(frames, values)
    assert len(places) <= plots.MOST_POINTS
    np.testing.assert_allclose(means.sum(axis=1), 1)
    np.testing.assert_allclose(means[0], values[:3].mean(axis=0))
    np.testing.assert_allclose(means[-1], values[-1])  # 3001 = 3 * 1000 + 1
    assert (places[0], places[-1]) == (2, 3001)


def test_histogram_shows_shares() -> None:
    weights = np.random.default_rng(0).dirichlet(np.ones(3), size=500)
    weights[:, 1], weights[:, 2] = 0, weights[:, 1] + weights[:, 2]
    figure = plots.gate_histogram("title", {"visual": weights, "audio": weights[::-1]})
    assert len(figure.axes) == 4  # an iterate without any weight is left out
    for axes in figure.axes:
        assert sum(patch.get_height() for patch in axes.patches) == pytest.approx(100)


# ---- gates


def softmax(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.dirichlet(np.ones(shape[-1]), size=shape[:-1])


def test_weights_of_a_flat_gate_are_the_gate() -> None:
    gate = softmax(np.random.default_rng(0), 9, 4)
    np.testing.assert_array_equal(iterate_weights("grjca", (gate,), 3), gate)


def test_weights_of_a_dynamic_gate_are_of_the_first_and_last() -> None:
    gate = np.array([[0.25, 0.75], [1, 0]])
    np.testing.assert_array_equal(iterate_weights("dca", (gate,), 3), [[0.25, 0, 0, 0.75], [1, 0, 0, 0]])
    np.testing.assert_array_equal(iterate_weights("dca", (gate,), 1), gate)


def test_weights_of_a_hierarchical_gate_multiply() -> None:
    first, second, last = np.array([[0.2, 0.8]]), np.array([[0.1, 0.3, 0.6]]), np.array([[0.25, 0.75]])
    expected = [[0.25 * 0.2 + 0.75 * 0.1, 0.25 * 0.8 + 0.75 * 0.3, 0.75 * 0.6]]
    np.testing.assert_allclose(iterate_weights("hgrjca", (first, second, last), 2), expected, rtol=1e-14)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_weights_of_a_hierarchical_gate_are_those_of_a_mixture(iterations: int) -> None:
    generator = np.random.default_rng(iterations)
    stages = [softmax(generator, 3, 6, t + 1) for t in range(1, iterations + 1)]
    last = softmax(generator, 3, 6, iterations)
    weights = iterate_weights("hgrjca", (*stages, last), iterations)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-14)
    iterates = generator.random((iterations + 1, 3, 6))  # above 0, where relu does nothing
    mixed = [np.einsum("...s,s...->...", stage, iterates[: t + 1]) for t, stage in enumerate(stages, start=1)]
    expected = np.einsum("...t,t...->...", last, np.array(mixed))
    np.testing.assert_allclose(np.einsum("...t,t...->...", weights, iterates), expected, rtol=1e-13)


@pytest.mark.parametrize(("fusion", "ways"), [("rjca", []), ("concat", [2]), ("grjca", [2]), ("hgrjca", [2, 3, 3])])
def test_weights_of_other_gates_are_refused(fusion: str, ways: list[int]) -> None:
    with pytest.raises(ValueError, match=f"gates of {fusion}, T = 2"):
        iterate_weights(fusion, tuple(np.full((4, n), 1 / n) for n in ways), 2)


def test_model_of_the_tests_is_tiny() -> None:
    assert max(map(max, MODEL.encoders.values())) < 10  # or these tests take minutes
