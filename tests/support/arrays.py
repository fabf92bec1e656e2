"""A tiny folder of pictures and log-mel patches, and a model for the networks' features."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from grjca.config import ModelConfig

MODEL = ModelConfig(channels={"visual": (6,), "audio": (4,)}, kernel=3, hidden=5)
LENGTHS = {"train": {"alpha": 11, "beta": 8}, "validate": {"gamma": 9}}


def write_data(root: Path) -> Path:
    """A folder as grjca prepare writes it: the pictures' brightness follows valence."""
    generator = np.random.default_rng(0)
    for split, lengths in LENGTHS.items():
        (root / "annotations" / split).mkdir(parents=True)
        for name, length in lengths.items():
            folder = root / "npy_data" / name
            folder.mkdir(parents=True)
            labels = np.tanh(generator.normal(size=(length, 2))).round(3)
            light = 128 + 100 * labels[:, :1, None, None] + generator.normal(size=(length, 48, 48, 3))
            np.save(folder / "video.npy", light.clip(0, 255).astype(np.uint8))
            np.save(folder / "logmel.npy", generator.normal(size=(length, 96, 64)).astype(np.float16))
            np.save(folder / "VA_continuous_label.npy", labels)
            rows = "".join(f"{v:g},{a:g}\n" for v, a in labels)
            (root / "annotations" / split / f"{name}.txt").write_text("valence,arousal\n" + rows)
    return root
