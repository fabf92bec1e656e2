"""Memory that is used again: a large allocation is new memory each time, which the system clears page by page.

That takes as long as a tenth of a training step. Blocks that are not in use, of at most :data:`MOST` bytes in all,
therefore stay with the process. Whoever holds a tensor of :func:`take`, or a view of it, holds its block.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from contextlib import suppress

import torch
from torch import Tensor

SMALLEST = 1 << 17
"""Bytes from which on a block is used again; less is left to the C library, which does so itself."""
MOST = 1 << 30
"""Bytes of unused blocks at most."""
STEP = 1 << 21
"""Blocks are multiples of this, the large page of most processors."""

_unused: list[mmap.mmap] = []


def take(size: int) -> Tensor:
    """``size`` bytes of memory of the processor, with anything in them."""
    if size < SMALLEST or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    block = _again(size) or _new(size)
    view = (ctypes.c_uint8 * size).from_buffer(block)  # torch lets go of it when the last tensor on it ends
    weakref.finalize(view, _give_back, block).atexit = False
    return torch.frombuffer(view, dtype=torch.uint8)


def _new(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, -(-size // STEP) * STEP, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without large pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _again(size: int) -> mmap.mmap | None:
    """The smallest unused block that fits and is not much larger."""
    for block in sorted(_unused, key=len):
        if size <= len(block) <= 2 * max(size, STEP):
            try:
                _unused.remove(block)
            except ValueError:  # another thread, or a signal handler, was faster
                continue
            return block
    return None


def _give_back(block: mmap.mmap) -> None:
    _unused.append(block)
    with suppress(IndexError):  # another thread was faster
        while sum(map(len, _unused)) > MOST:
            _unused.pop(0)
