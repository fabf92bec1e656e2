"""``grjca demo``: everything once, at a size of seconds, by the very commands that a user would type."""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path

import torch

from grjca.config import TARGETS, DemoConfig

FEATURES = ["--visual_features", "64", "--audio_features", "32"]
MODEL = """\
visual_features: 64
audio_features: 32
visual_channels: [48, 48, 48]
audio_channels: [32, 32, 32]
hidden: 48
"""
SCHEDULE = ["--epochs", "20", "--window", "120", "--hop", "80", "--learning_rate", "1e-3", "--warmup_epochs", "2"]


def commands(out: Path, seed: int) -> list[list[str]]:
    """What is run, in order; it all stays in ``out``."""
    data, runs = out / "data", {target: out / f"run-{target}" for target in TARGETS}
    words = [
        ["synth", "--out", str(data), "--videos", "32", "--length", "[150, 400]", "--seed", str(seed), *FEATURES],
        ["doctor", "--data", str(data), *FEATURES],
    ]
    for target, run in runs.items():
        what = ["--data", str(data), "--target", target, "--out", str(run), "--seed", str(seed)]
        words.append(["train", *what, *SCHEDULE, "--model", str(out / "model.yaml")])
        words.append(["evaluate", "--run", str(run), "--data", str(data), "--compare", "eager"])
    both = ["--run", str(runs["valence"]), "--other", str(runs["arousal"])]
    words.append(["predict", *both, "--data", str(data), "--split", "validate", "--out", str(out / "predicted")])
    return words


def demo(config: DemoConfig) -> int:
    """Run the commands; the exit code of the first that fails, else 0."""
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
A model of the authors' size is trained by grjca train --data DATA --target valence --out RUN."""
    )
    return 0
