"""``grjca study``: does gating help when face and voice do not complement each other?

Every fusion is trained on the same synthetic videos, over several seeds and shares of weak frames, and scored on videos
that played no part in the training. Finished cells are not repeated, so that an interrupted study continues.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from grjca import environment, files
from grjca.config import (
    GATING,
    STUDIED,
    Fusion,
    ModelConfig,
    Scenario,
    StudyConfig,
    SynthConfig,
    Target,
    TrainConfig,
)
from grjca.data.synth import synth
from grjca.data.synthetic import CODES
from grjca.data.videos import load
from grjca.errors import UserError
from grjca.evaluation import study_report
from grjca.evaluation.gates import iterate_weights
from grjca.modalities import MODALITIES
from grjca.training import inference, runs
from grjca.training.metrics import split_scores
from grjca.training.processes import Context
from grjca.training.train import train

PRESET = "preset.json"
HELD_OUT = 1_000_000  # number of the first scored recording, beyond any in training

DIGITS = 5  # digits of written numbers


@dataclass(frozen=True)
class Preset:
    """Sizes of a study. All fusions read normalised features, so that only attention and gates differ.

    "full" has the authors' fusion block, L = 300, 256 + 128, T = 2, p = 0.6, behind encoders of one block each.
    """

    levels: tuple[float, ...]
    """Shares of frames in which one modality is weak."""
    seeds: int
    scenario: Scenario
    held_out: int
    """Number of videos to score."""
    training: TrainConfig


def preset(config: StudyConfig) -> Preset:
    """Return the preset that ``config`` names."""
    target: Target = "valence"
    if config.preset == "full":
        scenario = Scenario(videos=64, validate=0.25, invalid=0.0)
        model = ModelConfig(channels={"visual": (256,), "audio": (128,)}, normalize=True)
        training = TrainConfig(
            config.out,
            target,
            config.out,
            epochs=16,
            learning_rate=1e-3,
            warmup_epochs=2,
            tensorboard=False,
            model=model,
        )
        return Preset((0.0, 0.4), 3, scenario, 32, training)
    model = ModelConfig(
        modalities={"visual": 48, "audio": 32},
        channels={"visual": (32, 32), "audio": (24, 24)},
        hidden=32,
        normalize=True,
    )
    scenario = Scenario(videos=32, validate=0.25, visual_features=48, audio_features=32, length=(100, 300), invalid=0.0)
    training = TrainConfig(
        config.out,
        target,
        config.out,
        epochs=30,
        window=100,
        hop=66,
        learning_rate=2e-3,
        warmup_epochs=2,
        tensorboard=False,
        model=model,
    )
    return Preset((0.0, 0.3, 0.6), 8, scenario, 24, training)


@dataclass(frozen=True)
class Cell:
    """One training: a fusion at a share of weak frames, with the data and the initial weights of a seed."""

    fusion: Fusion
    level: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the cell's files."""
        return f"{self.fusion}-weak-{self.level:.2f}-seed-{self.seed}"

    @property
    def data(self) -> str:
        """Name of the cell's data, which all fusions share."""
        return f"weak-{self.level:.2f}-seed-{self.seed}"


def study(config: StudyConfig) -> int:
    """Run the missing cells, then write results.jsonl (the environment, then a line per cell), table.md and plots."""
    chosen = preset(config)
    cells = [Cell(f, level, seed) for level in chosen.levels for seed in range(chosen.seeds) for f in STUDIED]
    _check(config, chosen)
    files.make_folder(config.out)
    with files.alone(config.out, "studies"):
        files.write_text(config.out / PRESET, _settings(chosen))
        results = _results(config, chosen, cells)
        rows = sorted(results, key=lambda row: (row["level"], row["seed"], STUDIED.index(row["fusion"])))
        about = {
            "preset": config.preset,
            **environment.versions(),
            "commit": environment.commit(),
            "processor": environment.processor(),
        }
        files.write_json_lines(config.out / "results.jsonl", [about, *rows])
        print(study_report.write(config.out, about, rows))
    return 0


def _settings(chosen: Preset) -> str:
    """Return the text of preset.json."""
    settings = asdict(chosen)
    del settings["training"]["data"], settings["training"]["out"]  # the folder may move
    return json.dumps(settings, default=str, indent=2)


def _check(config: StudyConfig, chosen: Preset) -> None:
    """Refuse a folder that holds anything other than this study."""
    path = config.out / PRESET
    there = config.out.iterdir() if config.out.is_dir() else ()
    if not path.exists() and any(entry.name != files.LOCK and not files.is_partial(entry) for entry in there):
        raise UserError(f"{config.out}: exists already and is no study; choose another --out.")
    if path.exists() and files.read_bytes(path) != _settings(chosen).encode():
        raise UserError(f"{config.out}: holds a study with other settings; choose another --out.")
    for name in ("data", "cells", "runs"):
        if (config.out / name).is_symlink():
            raise UserError(f"{config.out / name}: expected no link, got one; a study stays in its own folder.")


def _results(config: StudyConfig, chosen: Preset, cells: list[Cell]) -> Iterator[dict[str, Any]]:
    """Yield the result of every cell, as cells finish."""
    for cell in tqdm(cells, "writing data", leave=False, disable=None):
        _write_data(config.out, chosen, cell)
    # The pool kills its processes at the end of the block, and therefore also after Ctrl-C.
    with Context().Pool(config.jobs, torch.set_num_threads, [1]) as pool:
        results = pool.imap_unordered(partial(run_cell, config.out, chosen), cells)
        yield from tqdm(results, "training", len(cells), leave=False, disable=None)


def _write_data(out: Path, chosen: Preset, cell: Cell) -> None:
    for part, first, videos in (("train", 0, chosen.scenario.videos), ("held-out", HELD_OUT, chosen.held_out)):
        folder = out / "data" / cell.data / part
        if not folder.exists():
            scenario = replace(chosen.scenario, seed=cell.seed, weak=cell.level, first=first, videos=videos)
            synth(SynthConfig(out=folder, **asdict(scenario)), progress=False)


def run_cell(out: Path, chosen: Preset, cell: Cell) -> dict[str, Any]:
    """Train and score one cell, unless that is already done."""
    path = out / "cells" / f"{cell.name}.json"
    if path.exists():
        return _done(path, cell)
    folder = out / "data" / cell.data
    config = replace(
        chosen.training, data=folder / "train", out=out / "runs" / cell.name, fusion=cell.fusion, seed=cell.seed
    )
    result = train(config, resume=True, progress=False)
    row = asdict(cell) | {"best_epoch": result.best_epoch, "validation_ccc": round(result.best_ccc, DIGITS)}
    row |= _score(config, folder / "held-out")
    path.parent.mkdir(exist_ok=True)
    files.write_json(path, row)
    return row


def _done(path: Path, cell: Cell) -> dict[str, Any]:
    """Read the row that :func:`run_cell` has written."""
    row = files.read_json(path)
    if not isinstance(row, dict) or any(row.get(name) != value for name, value in asdict(cell).items()):
        raise UserError(f"{path}: expected the results of {cell.name}, got others; delete the file to train it again.")
    return row


def _score(config: TrainConfig, held_out: Path) -> dict[str, Any]:
    """Compute the CCC on held-out videos, over all frames and by what is weak, and the gates' weights there."""
    _, model = runs.load_best(config.out)
    videos = load(held_out, "all", widths=config.model.widths)
    windows = inference.Windows(videos, config.window, config.hop, config.batch_size, inference.accelerator("no", 1))
    predictions = windows.predict(model, gates=config.fusion != "concat")
    together = split_scores([p.values for p in predictions], videos, config.target).together
    conditions = _conditions(np.concatenate([np.load(held_out / "truth" / f"{v.name}.npy") for v in videos]))
    label = np.concatenate([v.labels[:, 0] for v in videos if v.labels is not None])
    error = np.abs(np.concatenate([p.values for p in predictions]) - label)
    row: dict[str, Any] = {"ccc": round(together.ccc, DIGITS), "rmse": round(together.rmse, DIGITS)}
    row["error"] = _means(error, conditions)
    if GATING.get(config.fusion, "none") != "none":
        row["attention"] = {
            modality: _means(1 - _untouched(config, [p.gates[modality] for p in predictions]), conditions)
            for modality in MODALITIES
        }
    return row


def _conditions(truth: np.ndarray) -> dict[str, np.ndarray]:
    """Return the frames [N] bool in which each condition holds, from the codes [N, 2]; conditions that never hold are
    left out."""
    result = {"clean": (truth == CODES["clean"]).all(axis=1)}
    for m, modality in enumerate(MODALITIES):
        result[f"{modality} weak"] = truth[:, m] != CODES["clean"]
        result |= {f"{modality} {kind}": truth[:, m] == code for kind, code in CODES.items() if kind != "clean"}
    return {name: frames for name, frames in result.items() if frames.any()}


def _means(values: np.ndarray, conditions: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: round(float(values[frames].mean()), DIGITS) for name, frames in conditions.items()}


def _untouched(config: TrainConfig, gates: list[tuple[np.ndarray, ...]]) -> np.ndarray:
    """Return the weight of the input without attention, [N], over all videos."""
    return np.concatenate([iterate_weights(config.fusion, g, config.model.iterations)[:, 0] for g in gates])
