"""The native CPU kernels: one call of the library for the whole forward, and one for the whole backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from grjca_kernels import memory, native
from grjca_kernels.call import Call, Gradients
from grjca_kernels.modes import constant_when_compiled
from grjca_kernels.problem import Problem

_instruction_set: ContextVar[str | None] = ContextVar("grjca_instruction_set", default=None)
_times: ContextVar[Any] = ContextVar("grjca_phase_times", default=None)


def why_not() -> str | None:
    """Return why this backend cannot run here, or None."""
    return native.missing


def instruction_sets() -> list[str]:
    """Return which of "avx512bf16", "avx512", "avx2" and "baseline" this processor can run; the first is used.

    "avx512bf16" is for bfloat16 only, and rounds the operands of products as eager PyTorch does; other dtypes use the
    next one.
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


@contextmanager
def phase_times() -> Iterator[Any]:
    """Measure the calls within a ``with`` block: the object it yields has the ``seconds`` of each phase.

    The seconds are summed over the threads if each thread works on its own samples. Otherwise they are the wall time
    until all threads are done.
    """
    token = _times.set(times := native.library.PhaseTimes())
    try:
        yield times
    finally:
        _times.reset(token)


@constant_when_compiled
def held(dtype: torch.dtype) -> int:
    """Return how many bytes one element of the saved activations takes: they are stored as the products read them."""
    if dtype == torch.bfloat16:
        pairs = (_instruction_set.get() or instruction_sets()[0]) == "avx512bf16"
        return 2 if pairs else 4
    return 8 if dtype == torch.float64 else 4


def forward(call: Call) -> None:
    """Fill the results that the call wants."""
    problem, host = _prepared(call, backward=False)
    native.library.cpu_forward(problem, call, host)


def backward(call: Call, gradients: Gradients) -> None:
    """Fill the gradients that are wanted."""
    problem, host = _prepared(call, backward=True)
    native.library.cpu_backward(problem, call, gradients, host)


def _prepared(call: Call, backward: bool) -> tuple[Any, tuple[Tensor, int, str | None, Any]]:
    """Return the library's problem, and a workspace, the number of threads, the instruction set and a clock."""
    problem = native.problem_of(call.problem, call.features[0].dtype)
    threads, isa = _threads(call.problem), _instruction_set.get()
    workspace = memory.take(native.library.cpu_workspace(problem, backward, threads, isa))
    return problem, (workspace, threads, isa, _times.get())


FOR_A_THREAD = 1 << 22
"""The multiply-adds that justify waking one more thread, about a tenth of a millisecond. Every thread must be waited
for, which may take long on a busy machine."""


def _threads(problem: Problem) -> int:
    """Return PyTorch's number of threads, or fewer for small problems. Results do not depend on it."""
    work = problem.batch * problem.length * problem.width * (problem.width + problem.length) * problem.iterations
    return min(torch.get_num_threads(), 1 + work // FOR_A_THREAD)
