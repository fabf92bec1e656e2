"""The time of a live value: ``python -m benchmarks.live`` pushes frames one by one through the authors' model."""

from __future__ import annotations

import math
import statistics
import time

import torch

from grjca import environment
from grjca.config import ModelConfig
from grjca.live import Live
from grjca.model.audiovisual import AudioVisualModel

FRAMES, RATE, LENGTH = 40, 30, 300


def main() -> None:
    """Print the milliseconds of a value with the fused and the eager block, and which ``every`` keeps up."""
    where = f"{environment.processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{where}, commit {environment.commit()}: L = {LENGTH}, 256 + 128, T = 2, float32")
    for backend in ("auto", "eager"):
        torch.manual_seed(0)
        live = Live(AudioVisualModel(ModelConfig(), fusion="grjca", length=LENGTH, backend=backend))
        stream = [(torch.randn(512), torch.randn(128)) for _ in range(LENGTH + FRAMES)]
        for frame in stream[:LENGTH]:
            live.frames.append(frame)
        times = []
        for frame in stream[LENGTH:]:
            start = time.perf_counter()
            live.push(*frame)
            times.append(time.perf_counter() - start)
        worst = sorted(times)[int(0.9 * FRAMES)]
        every = math.ceil(worst * RATE)
        median = 1e3 * statistics.median(times)
        print(
            f"{backend:<6} {median:.1f} ms a value (p90 {1e3 * worst:.1f}): {RATE} frames a second with every = {every}"
        )


if __name__ == "__main__":
    main()
