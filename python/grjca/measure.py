"""What a block costs: the shapes that matter, the bytes its backward needs, and times that can be compared."""

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
"""The operator's contract: an error of at most twice that of eager PyTorch, and a few ulp."""

Block = TypeVar("Block", bound=GatedRJCAFused)


@dataclass(frozen=True)
class Shape:
    """A block and its input, by the letters of operator.md: L, d_v, d_a, T, B."""

    length: int
    dim_visual: int
    dim_audio: int
    iterations: int
    batch: int
    gating: str = "none"
    normalize: bool = False

    def block(self, kind: type[Block], **options: Any) -> Block:
        """A block of this shape that puts out the concatenation."""
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
        """Random ``visual`` [B, L, d_v] and ``audio`` [B, L, d_a]."""
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
    """Bytes that stay alive between the forward, ``call``, and its backward because autograd has saved them.

    A storage counts once however many tensors share it, and whole, because as a whole it stays alive. ``parameters``
    live anyway and do not count. Inputs do, wherever they are saved: the eager and the fused block both need them.
    """
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself may be an output, which would then keep its own graph alive for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # held until all is counted, so that no address is used twice
    for parameter in parameters:
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    del result
    return sum(sizes.values())


def alternate(calls: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each call, ``repetitions`` times, after one to warm up.

    They take turns, so that a slow moment of the machine strikes all of them.
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
