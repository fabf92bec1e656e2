"""A pool of large blocks of CPU memory: the system clears every new large allocation page by page.

That clearing takes as long as a tenth of a training step, so the process keeps up to :data:`MOST` bytes of unused
blocks. A block stays in use as long as a tensor from :func:`take`, or a view of it, exists.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from contextlib import suppress

import torch
from torch import Tensor

SMALLEST = 1 << 17
"""The smallest block in bytes that is pooled; the C library already reuses smaller ones."""
MOST = 1 << 30
"""The most bytes of unused blocks that the pool keeps."""
STEP = 1 << 21
"""The size in bytes of which every block is a multiple: the large page of most processors."""

_unused: list[mmap.mmap] = []


def take(size: int) -> Tensor:
    """Return ``size`` bytes of uninitialised CPU memory."""
    if size < SMALLEST or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    block = _again(size) or _new(size)
    view = (ctypes.c_uint8 * size).from_buffer(block)  # torch releases this when the last tensor on it dies
    weakref.finalize(view, _give_back, block).atexit = False
    return torch.frombuffer(view, dtype=torch.uint8)


def _new(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, -(-size // STEP) * STEP, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # the system has no large pages
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _again(size: int) -> mmap.mmap | None:
    """Return the smallest unused block that fits and is not much larger, or None."""
    for block in sorted(_unused, key=len):
        if size <= len(block) <= 2 * max(size, STEP):
            try:
                _unused.remove(block)
            except ValueError:  # another thread, or a signal handler, took it first
                continue
            return block
    return None


def _give_back(block: mmap.mmap) -> None:
    _unused.append(block)
    with suppress(IndexError):  # another thread took it first
        while sum(map(len, _unused)) > MOST:
            _unused.pop(0)
