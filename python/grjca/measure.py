"""Measurement of a block: standard shapes, the bytes saved for its backward pass, and comparable times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from grjca_kernels import GatedRJCAFused

EAGER_FACTOR, FEW_ULP = 2, 4
"""The operator's contract: an error of at most twice that of eager PyTorch plus a few ulp."""

Block = TypeVar("Block", bound=GatedRJCAFused)


@dataclass(frozen=True)
class Shape:
    """Sizes of a block and its input; in the letters of operator.md: L, d_v, d_a, T, B."""

    length: int
    dim_visual: int
    dim_audio: int
    iterations: int
    batch: int
    gating: str = "none"
    normalize: bool = False

    def block(self, kind: type[Block], **options: Any) -> Block:
        """Make a block of this shape, whose output is the concatenation."""
        return kind(
            self.dim_visual,
            self.dim_audio,
            self.length,
            iterations=self.iterations,
            gating=self.gating,
            normalize=self.normalize,
            output="concat",
            **options,
        )

    def inputs(self, seed: int, *, requires_grad: bool = False) -> tuple[Tensor, Tensor]:
        """Draw random ``visual`` [B, L, d_v] and ``audio`` [B, L, d_a]."""
        generator = torch.Generator().manual_seed(seed)
        visual, audio = (
            torch.randn(self.batch, self.length, width, generator=generator).requires_grad_(requires_grad)
            for width in (self.dim_visual, self.dim_audio)
        )
        return visual, audio


SHAPES = {
    "abaw": Shape(300, 256, 128, 2, 12, "flat", normalize=True),  # the authors' GRJCA on Aff-Wild2
    "clip": Shape(16, 512, 512, 2, 64),  # RJCA
    "light": Shape(300, 128, 64, 3, 32, "flat"),  # small widths, more iterations
    "long": Shape(1024, 512, 512, 2, 8, "flat"),
}


def saved_bytes(call: Callable[[], object], parameters: Iterable[Tensor] = ()) -> int:
    """Count the bytes that autograd saves between the forward pass, ``call``, and its backward pass.

    A storage counts once, however many tensors share it, and in full, because all of it stays alive. ``parameters`` do
    not count, because they stay alive anyway. Saved inputs count: both the eager and the fused block need them.
    """
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output would keep its own graph alive forever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # held until counting is done, so that no address is reused
    for parameter in parameters:
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    del result
    return sum(sizes.values())


def alternate(calls: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Time each call ``repetitions`` times, in seconds, after one warm-up.

    The calls take turns, so that a slow moment of the machine affects all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repetition:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch use ``count`` threads within a ``with`` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
