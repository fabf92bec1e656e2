"""Valence of a live stream, frame by frame.

    python examples/live.py [RUN]

RUN is the folder of a training on features; without it, the model is untrained and its values mean nothing. Random
features stand in for the stream here. Where the run was trained ``--from arrays``, push faces and log-mel patches.
"""

import sys
from pathlib import Path
from time import perf_counter

import torch

from grjca.config import ModelConfig
from grjca.live import Live
from grjca.model.audiovisual import AudioVisualModel
from grjca.training.runs import load_best

EVERY, FRAMES = 3, 30


def main(run: str | None = None) -> None:
    """Push a second of frames, and print the values."""
    torch.manual_seed(0)
    model = load_best(Path(run))[1] if run else AudioVisualModel(ModelConfig(), fusion="grjca", length=300)
    live = Live(model, every=EVERY)  # a value for every third frame; the others only enter the window
    start = perf_counter()
    for number in range(1, FRAMES + 1):
        features = [torch.randn(width) for width in live.model.widths.values()]  # the face first, then the voice
        value = live.push(*features)
        if value is not None:
            print(f"frame {number}: {value:+.3f}")
    print(f"{FRAMES / (perf_counter() - start):.0f} frames per second")


if __name__ == "__main__":
    main(*sys.argv[1:])
