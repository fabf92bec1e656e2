"""How much memory a call takes, measured in a process of its own."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DROPOUT, Problem
from grjca.measure import Shape
from grjca_kernels import GatedRJCAFused


def run_in_subprocess(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a fresh process.

    Raises:
        BrokenProcessPool: if the process is killed, as the system does when memory runs out.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.submit(function, *arguments).result()


class UntouchedProblem(Problem):
    """A problem whose tensors are made without detours, which would leave traces in the peak of memory."""

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return self.shape.block(GatedRJCAFused, dtype=self.dtype, device=self.device).state_dict()

    def input(self, seed: int) -> tuple[Tensor, Tensor]:
        shape, options = self.shape, {"dtype": self.dtype, "device": self.device, "requires_grad": True}
        visual, audio = (
            torch.randn(shape.batch, shape.length, width, **options) for width in (shape.dim_visual, shape.dim_audio)
        )
        return visual, audio

    @cached_property
    def gradient(self) -> Tensor:
        shape = self.shape
        size = (shape.batch, shape.length, shape.dim_visual + shape.dim_audio)
        return torch.ones(size, dtype=self.dtype, device=self.device)


def peak_memory(
    shape: Shape, implementation: str, training: bool, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> int | None:
    """Return by how many bytes a call raises the peak memory, including its results.

    On a processor that is the resident set of this process, which has to be fresh; None where the system does not say.
    """
    small = UntouchedProblem(replace(shape, length=4, dim_visual=8, dim_audio=4, batch=2), dtype, device)
    small.call(implementation, training, dropout=DROPOUT)(small.input(0))  # loads code and starts threads
    problem = UntouchedProblem(shape, dtype, device)
    call, inputs = problem.call(implementation, training, dropout=DROPOUT), problem.input(0)
    before = peak(device)
    results = call(inputs)
    after = peak(device)
    del results
    return None if before is None or after is None else after - before


def peak(device: str) -> int | None:
    """Bytes so far."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    # Not getrusage, whose maximum a process inherits from the one that started it.
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.exists() else None
    return 1024 * int(found[1]) if found else None
