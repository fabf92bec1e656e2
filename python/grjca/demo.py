"""``grjca demo``: run every step once at a small size, with the commands that a user would type."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path

import torch

from grjca.config import TARGETS, DemoConfig

MODEL = """\
channels: {visual: [48, 48, 48], audio: [32, 32, 32]}
hidden: 48
"""
SCHEDULE = ["--epochs", "20", "--window", "100", "--hop", "60", "--learning_rate", "1e-3", "--warmup_epochs", "2"]


def commands(out: Path, seed: int) -> list[list[str]]:
    """Return the commands in order; all their output is in ``out``."""
    footage, arrays, features = (str(out / name) for name in ("footage", "arrays", "features"))
    runs = {target: str(out / f"run-{target}") for target in TARGETS}
    seeded = ["--seed", str(seed)]
    sources = ["--videos", f"{footage}/videos", "--faces", f"{footage}/cropped_aligned"]
    words = [
        ["synth", "--layout", "footage", "--out", footage, "--videos", "20", "--length", "[100, 160]", *seeded],
        ["prepare", *sources, "--annotations", f"{footage}/annotations", "--out", arrays],
        ["extract", "--data", arrays, "--out", features, "--size", "small", *seeded],
        ["doctor", "--data", features],
    ]
    for target, run in runs.items():
        what = ["--data", features, "--target", target, "--out", run, *seeded]
        words.append(["train", *what, *SCHEDULE, "--model", str(out / "model.yaml")])
        words.append(["evaluate", "--run", run, "--data", features, "--compare", "eager"])
    both = ["--run", runs["valence"], "--other", runs["arousal"]]
    words.append(["predict", *both, "--data", features, "--split", "validate", "--out", str(out / "predicted")])
    video = ["--video", f"{footage}/videos/video000.mp4", "--faces", f"{footage}/cropped_aligned/video000"]
    words.append(["predict", *both, *video, "--draw", "true", "--out", str(out / "video")])
    return words


def demo(config: DemoConfig) -> int:
    """Run the commands; return the exit code of the first that fails, else 0."""
    from grjca.cli import main
    from grjca.measure import threads

    out = config.out or Path(tempfile.mkdtemp(prefix="grjca-demo-"))
    out.mkdir(parents=True, exist_ok=True)
    (out / "model.yaml").write_text(MODEL, encoding="utf-8")
    for words in commands(out, config.seed):
        print(f"\n$ grjca {shlex.join(words)}", flush=True)
        # So small a model gains nothing from a second thread, and on a busy machine the two wait for each other.
        with threads(torch.get_num_threads() if words[0] == "doctor" else 1):
            code = main(words)
        if code:
            return code
    print(
        f"""
All of it is in {out}:
  run-valence/evaluation/validate/   plots: prediction, label and gates over time; scatter; gate histogram
  run-valence/                       config.yaml, best.safetensors, metrics.jsonl, predictions/, tensorboard/
  run-arousal/                       the same for arousal
  predicted/challenge.txt            the file for the challenge
  video/                             one video's values: a table, a plot, and a copy with the curves below
A model of the authors' size is trained by grjca train --data DATA --target valence --out RUN."""
    )
    return 0
