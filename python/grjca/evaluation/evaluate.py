"""``grjca evaluate``: score a run on the labelled videos of a split, with metrics and plots."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from grjca import environment, files, tensor_files
from grjca.config import TARGETS, EvaluateConfig, TrainConfig
from grjca.data.videos import Video
from grjca.data.windows import WindowDataset, stitch
from grjca.errors import UserError
from grjca.evaluation.gates import iterate_weights
from grjca.evaluation.trained import Trained, infer
from grjca.measure import EAGER_FACTOR, FEW_ULP
from grjca.training import inference, runs
from grjca.training.inference import Prediction
from grjca.training.metrics import Scores, SplitScores, split_scores

EVALUATION, METRICS, SCATTER, GATES, VIDEO = "evaluation", "metrics.json", "scatter.png", "gates.png", "video_{}.png"
LONGEST_TITLE = 60
TABLE_ROWS = 20  # most videos in the printed table; metrics.json has all


@dataclass(frozen=True)
class Comparison:
    """Comparison of a second backend with the first."""

    backend: str
    ccc: float
    difference: float
    """Largest difference of any frame."""
    video: str
    """Video with that difference."""
    rounding: float
    """Largest difference that rounding explains."""

    @property
    def within_rounding(self) -> bool:
        """Return whether rounding explains the difference."""
        return self.difference <= self.rounding


def evaluate(config: EvaluateConfig) -> int:
    """Print a table, and write metrics.json and plots; return the exit code.

    Raises:
        UserError: if run, data or folder are invalid.
    """
    trained = Trained.load(config.run, config.backend)
    settings = trained.settings
    root, out = config.data or settings.data, config.out or config.run / EVALUATION / config.split
    on = inference.accelerator(settings.precision, config.batch_size)
    _check(config, settings, root, on.device.type)
    about = _about(config, trained, root, on.device.type)
    videos = trained.videos(root, config.split, progress=on.is_main_process)
    files.make_folder(out)
    old = _old_plots(out, videos)
    with files.alone(out, "evaluates") if on.is_main_process else nullcontext():
        predictions = infer(on, trained, videos, config.batch_size, gates=config.plots)
        scores = split_scores([p.values for p in predictions], videos, settings.target)
        comparison = _compare(on, trained, config, videos, predictions) if config.compare else None
        if on.is_main_process:
            print(report(about, scores, videos, comparison))
            files.write_json(out / METRICS, _as_json(about, scores, comparison))  # first: it marks the plots as ours
            for path in old:
                path.unlink(missing_ok=True)
            if config.plots:
                draw(out, trained, videos, predictions, scores, config.plotted_videos, about["random_networks"])
            print(f"\n{out}: {METRICS}" + (" and plots" if config.plots else ""))
    return 0


def _check(config: EvaluateConfig, settings: TrainConfig, root: Path, device: str) -> None:
    """Refuse what would fail after everything has been predicted."""
    if config.compare and settings.fusion == "concat":
        raise UserError("--compare: expected a run with attention, but concat has nothing for a backend to compute.")
    if config.compare:
        environment.backend_used(config.compare, device)
    if config.data is None and not root.is_dir():
        raise UserError(f"{root}: the data of the training is not there any more; say by --data where it is.")
    evaluation = config.run / EVALUATION
    if config.out is None and (evaluation.is_symlink() or (evaluation / config.split).is_symlink()):
        raise UserError(f"{evaluation}: expected no link, got one; remove it, or say by --out where to write.")
    if config.plots:
        import matplotlib.font_manager  # noqa: F401 - it fails where it finds no folder for its cache


def _about(config: EvaluateConfig, trained: Trained, root: Path, device: str) -> dict[str, Any]:
    """Describe what is evaluated, and with which backend and versions."""
    return {
        "run": str(config.run),
        "data": str(root),
        "target": trained.settings.target,
        "split": config.split,
        "fold": trained.settings.fold,
        "fusion": trained.settings.fusion,
        "backend": trained.backend_used(device),
        "device": device,
        "precision": trained.settings.precision,
        "random_networks": runs.random_networks(trained.settings, root),
        "epoch": _epoch(tensor_files.read_about(config.run / runs.BEST)),
        "versions": environment.versions(),
    }


def _epoch(about: Mapping[str, Any]) -> int | None:
    return about["epoch"] if isinstance(about.get("epoch"), int) else None


def _as_json(about: dict[str, Any], scores: SplitScores, comparison: Comparison | None) -> dict[str, Any]:
    return about | {
        "overall": scores.together.as_json(),
        "videos": {name: of.as_json() for name, of in scores.videos.items()},
        "compare": comparison and asdict(comparison) | {"within_rounding": comparison.within_rounding},
    }


def report(
    about: Mapping[str, Any], scores: SplitScores, videos: Sequence[Video], comparison: Comparison | None
) -> str:
    """Format a table of all videos together and of each, sorted by CCC; if there are many, only of the extremes."""
    backend = f"computed by {about['backend']}" if about["backend"] else "no attention"
    width = max(len("all together"), *map(len, scores.videos))
    ranked = sorted(scores.videos, key=lambda name: scores.videos[name].ccc)
    rows = [_row(name, scores.videos[name], width) for name in ranked]
    if len(rows) > TABLE_ROWS:
        half = TABLE_ROWS // 2
        rows = [*rows[:half], f"{'...':<{width}}  {len(rows) - 2 * half} more in {METRICS}", *rows[-half:]]
    lines = [
        f"{about['run']}: {about['target']} by {about['fusion']} ({backend}), weights of epoch {about['epoch']}",
        f"{about['data']}: {about['split']} split of fold {about['fold']}, {len(videos)} videos, "
        f"{scores.together.frames} of {sum(video.length for video in videos)} frames valid",
        *([f"With the {about['random_networks']}."] if about.get("random_networks") else []),
        "",
        f"{'':<{width}}{'frames':>10}{'CCC':>9}{'RMSE':>9}{'Pearson':>9}",
        _row("all together", scores.together, width),
        *rows,
    ]
    return "\n".join(lines + (_parity(about, scores, comparison) if comparison else []))


def _row(name: str, of: Scores, width: int) -> str:
    numbers = "".join(f"{'-' if math.isnan(x) else f'{x:.4f}':>9}" for x in (of.ccc, of.rmse, of.pearson))
    return f"{name:<{width}}{of.frames:>10}{numbers}"


def _parity(about: Mapping[str, Any], scores: SplitScores, of: Comparison) -> list[str]:
    kind = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[about["precision"]]
    verdict = f"within {kind} rounding" if of.within_rounding else f"MORE than {kind} rounding"
    return [
        "",
        f"CCC by {about['backend']} {scores.together.ccc:.8f}, by {of.backend} {of.ccc:.8f}.",
        f"Largest difference of any frame: {of.difference:.1e}, in {of.video}; {verdict}, "
        f"which explains up to {of.rounding:.1e} there.",
    ]


def _compare(
    on: Accelerator,
    trained: Trained,
    config: EvaluateConfig,
    videos: Sequence[Video],
    predictions: Sequence[Prediction],
) -> Comparison:
    second = Trained.load(config.run, config.compare)
    others = infer(on, second, videos, config.batch_size)
    apart = [float(np.abs(a.values - b.values).max()) for a, b in zip(predictions, others, strict=True)]
    worst = videos[int(np.argmax(apart))]
    return Comparison(
        str(second.backend_used(on.device.type)),
        split_scores([p.values for p in others], videos, trained.settings.target).together.ccc,
        max(apart),
        worst.name,
        rounding(Trained.load(config.run, "eager"), worst, config.batch_size),
    )


def rounding(eager: Trained, video: Video, batch_size: int) -> float:
    """Compute how much two correct backends may differ on a video.

    By the contract of the operator, the error of each may be twice that of eager PyTorch plus a few ulp, so two may
    differ by twice that. Eager's own error is measured against the same model in float64, because no formula tells how
    much trained weights amplify rounding.
    """
    model, precision = eager.model.cpu(), {"bf16": torch.bfloat16, "fp16": torch.float16}.get(eager.settings.precision)
    with torch.autocast("cpu", precision, enabled=precision is not None):
        coarse = _on_cpu(model, eager, video, batch_size, torch.float32)
    exact = _on_cpu(model.double(), eager, video, batch_size, torch.float64)
    ulp = torch.finfo(precision or torch.float32).eps  # of the largest value, 1
    return 2 * (EAGER_FACTOR * float(np.abs(coarse - exact).max()) + FEW_ULP * ulp)


@torch.no_grad()
def _on_cpu(model: runs.Model, of: Trained, video: Video, batch_size: int, dtype: torch.dtype) -> np.ndarray:
    """Predict a video on the CPU in any dtype, [N] float64. inference.Windows may run on a device without float64."""
    dataset = WindowDataset([video], of.settings.target, of.settings.window, of.settings.hop)
    values = [
        model(*(x.to(dtype) if x.is_floating_point() else x for x in dataset.features(batch)), lengths=batch["length"])
        for batch in DataLoader(dataset, batch_size)
    ]
    return stitch(dataset.spans, [video.length], torch.cat(values))[0]


def draw(
    out: Path,
    trained: Trained,
    videos: Sequence[Video],
    predictions: Sequence[Prediction],
    scores: SplitScores,
    plotted_videos: int,
    warning: str = "",
) -> None:
    """Write the plots of an evaluation to ``out`` as PNG; ``warning`` is appended to their titles."""
    from grjca.evaluation import plots

    ending = f" ({warning})" if warning else ""
    target, fusion, iterations = trained.settings.target, trained.settings.fusion, trained.settings.model.iterations
    by_name = {video.name: (video, prediction) for video, prediction in zip(videos, predictions, strict=True)}
    weights = {
        name: {m: iterate_weights(fusion, of, iterations) for m, of in prediction.gates.items() if of}
        for name, (_, prediction) in by_name.items()
    }
    for name in selected(scores, plotted_videos):
        video, prediction = by_name[name]
        shown = name if len(name) <= LONGEST_TITLE else f"{name[:LONGEST_TITLE]}…"
        title = f"{shown}: CCC {scores.videos[name].ccc:.3f}, {fusion}{ending}"
        figure = plots.over_time(title, target, prediction.values, _label(video, target), weights[name])
        plots.save(figure, out / VIDEO.format(name))
    everywhere = {m: np.concatenate([of[m] for of in weights.values()]) for m in next(iter(weights.values()))}
    if everywhere:
        frames = len(next(iter(everywhere.values())))
        title = f"Gates of {fusion} for {target}: {frames} frames of {len(videos)} videos{ending}"
        plots.save(plots.gate_histogram(title, everywhere), out / GATES)
    label = np.concatenate([_label(video, target) for video in videos])
    values = np.concatenate([prediction.values for prediction in predictions])
    valid = ~np.isnan(label)
    title = f"{fusion}: CCC {scores.together.ccc:.3f}, {scores.together.frames} frames{ending}"
    plots.save(plots.scatter(title, target, values[valid], label[valid]), out / SCATTER)


def selected(scores: SplitScores, count: int) -> list[str]:
    """Select videos to draw: those of the lowest, median and highest CCC, then some evenly spaced between them."""
    ranked = sorted(scores.videos, key=lambda name: scores.videos[name].ccc)
    last = len(ranked) - 1
    between = [int(i) for i in np.linspace(0, last, count).round()]
    chosen = dict.fromkeys([0, last // 2, last, *between, *range(len(ranked))])
    return [ranked[i] for i in chosen][:count]


def _label(video: Video, target: str) -> np.ndarray:
    """Return the label of a video, [N] float64, NaN where it is not valid."""
    if video.labels is None:
        return np.full(video.length, np.nan)
    return np.where(video.valid, video.labels[:, TARGETS.index(target)], np.nan)


def _old_plots(out: Path, videos: Sequence[Video]) -> list[Path]:
    """Return the plots of an earlier evaluation, by its metrics.json; UserError if other files would be replaced."""
    ours: set[str] = set()
    if (out / METRICS).is_file():
        before = files.read_json(out / METRICS)
        if isinstance(before, dict) and isinstance(before.get("videos"), dict):
            ours = {METRICS, *_plots(before["videos"])}
    for name in sorted({METRICS, *_plots(video.name for video in videos)}):
        path = out / name
        if os.path.lexists(path) and (name not in ours or path.is_dir()):
            raise UserError(f"--out: {path} is not of an evaluation, and would be replaced; choose another folder.")
    return [path for path in out.iterdir() if path.name in ours - {METRICS} and not path.is_dir()]


def _plots(videos: Iterable[str]) -> set[str]:
    """Return the names of all plots that an evaluation of these videos may draw."""
    return {SCATTER, GATES, *map(VIDEO.format, videos)}
