"""The native CPU kernels: one call of the library for the whole forward, and one for the whole backward."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from grjca_kernels import native
from grjca_kernels.call import Call, Gradients

_instruction_set: ContextVar[str | None] = ContextVar("grjca_instruction_set", default=None)


def why_not() -> str | None:
    """Why this backend cannot run here, or None."""
    return native.missing


def instruction_sets() -> list[str]:
    """What this processor can run of "avx512bf16", "avx512", "avx2" and "baseline"; the first is used.

    "avx512bf16" is for bfloat16, of which it rounds the operands of products as eager PyTorch does; other dtypes go by
    the next.
    """
    return [] if native.missing else native.library.instruction_sets()


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Use one of :func:`instruction_sets` within a ``with`` block, for tests and measurements."""
    token = _instruction_set.set(name)
    try:
        yield
    finally:
        _instruction_set.reset(token)


def forward(call: Call) -> None:
    """Fill what the call wants."""
    problem, resources = _prepared(call, backward=False)
    native.library.cpu_forward(problem, call, resources)
    if resources[0].numel() == KEPT:
        _kept.workspace = resources[0]


def backward(call: Call, gradients: Gradients) -> None:
    """Fill the gradients that are wanted."""
    problem, resources = _prepared(call, backward=True)
    native.library.cpu_backward(problem, call, gradients, resources)
    if resources[0].numel() == KEPT:
        _kept.workspace = resources[0]


KEPT = 1 << 17
"""Bytes of workspace that a thread keeps from call to call: taking and returning them costs more than a small call."""


class _Kept(threading.local):
    workspace: Tensor | None = None


_kept = _Kept()


def _prepared(call: Call, backward: bool) -> tuple[Any, tuple[Tensor, int, str | None]]:
    """The problem in the library's words; a workspace, the number of threads, and the instruction set."""
    problem = native.problem_of(call.problem, call.features[0].dtype)
    threads, isa = torch.get_num_threads(), _instruction_set.get()
    size = native.library.cpu_workspace(problem, backward, threads, isa)
    workspace = None
    if size <= KEPT:  # the call takes it away, for a signal handler may call a kernel on this thread meanwhile
        workspace, _kept.workspace = _kept.workspace, None
    if workspace is None:
        workspace = torch.empty(max(size, KEPT), dtype=torch.uint8, device="cpu")
    return problem, (workspace, threads, isa)
