"""A tiny data folder, runs of a tiny model with random weights, and readers of what commands write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from grjca import files, settings
from grjca.config import Fusion, ModelConfig, Target, TrainConfig
from grjca.model.audiovisual import AudioVisualModel
from grjca.training import runs

MODEL = ModelConfig(
    modalities={"visual": 6, "audio": 5}, channels={"visual": (7, 6), "audio": (4,)}, kernel=3, hidden=5
)
WINDOW, HOP = 20, 12
LENGTHS = {
    "train": {"alpha": 31, "beta": 20},
    "validate": {"gamma": 53, "gamma_left": 20, "delta": 7, "epsilon": 33},
    "test": {"omega": 26},
}
WITHOUT_LABELS, CONSTANT = "epsilon", "gamma_left"
"""All frames of the one are invalid; the other's valence never changes."""


def write_data(root: Path) -> Path:
    """Videos of a few frames; where invalid, -5 stands."""
    generator = np.random.default_rng(0)
    for split, lengths in LENGTHS.items():
        for name, length in lengths.items():
            folder = root / "features" / name
            folder.mkdir(parents=True)
            for kind, width in MODEL.widths.items():
                np.save(folder / f"{kind}.npy", generator.normal(size=(length, width)).astype(np.float32))
            if split != "test":
                labels = np.tanh(generator.normal(size=(length, 2))).round(3)
                labels[:, 0] = 0.5 if name == CONSTANT else labels[:, 0]
                labels[-5 if name != WITHOUT_LABELS else 0 :] = -5
                labels[length // 3, 1] = -5  # one of the two is enough
                (root / "annotations" / split).mkdir(parents=True, exist_ok=True)
                rows = "".join(f"{v:g},{a:g}\n" for v, a in labels)
                (root / "annotations" / split / f"{name}.txt").write_text("valence,arousal\n" + rows)
    return root


def write_run(
    folder: Path, data: Path, *, target: Target = "valence", fusion: Fusion = "grjca", model: ModelConfig = MODEL
) -> Path:
    """Write a run as if trained for two epochs, of which the second was the best."""
    config = TrainConfig(data, target, folder, fusion=fusion, window=WINDOW, hop=HOP, model=model)
    folder.mkdir(parents=True)
    files.write_text(folder / runs.CONFIG, settings.to_yaml(config))
    torch.manual_seed(1 if target == "valence" else 2)
    weights = AudioVisualModel(model, fusion=fusion, length=WINDOW).state_dict()
    runs.save_best(folder, runs.State(epoch=2, best_ccc=0.25, best_epoch=1), weights)
    return folder


def read_predictions(folder: Path) -> dict[str, np.ndarray]:
    """[N, targets] of each video."""
    return {path.stem: np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2) for path in folder.glob("*.txt")}


def read_labels(root: Path, split: str) -> dict[str, np.ndarray]:
    """[N, 2] of each video."""
    return read_predictions(root / "annotations" / split)


def half_written(folder: Path) -> Iterator[Path]:
    """Files that have their final names and cannot be read from beginning to end."""
    for path in folder.rglob("*"):
        if not path.is_file() or any(map(files.is_partial, [path, *path.parents])):
            continue
        try:
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                assert all(json.loads(line)["epoch"] for line in path.read_text().splitlines())
            elif path.suffix == ".yaml":
                settings.from_yaml(TrainConfig, path)
            elif path.suffix == ".txt":
                assert path.read_text().endswith("\n")
                assert len({line.count(",") for line in path.read_text().splitlines()}) == 1
            elif path.suffix == ".png":
                assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
        except Exception:
            yield path
