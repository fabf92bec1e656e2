"""The native CPU kernels: tensors in, one call for the whole forward and one for the whole backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from grjca_kernels.shapes import Problem, check_lengths_values

_why_not: str | None = None
try:
    import grjca_kernels._native as _native
except ModuleNotFoundError:
    _native = None  # type: ignore[assignment]
    _why_not = "its native code was not built; install a C++17 compiler, then this package again."
except ImportError as error:
    _native = None  # type: ignore[assignment]
    _why_not = f"its native code does not load ({error}); install this package again."

_instruction_set: ContextVar[str | None] = ContextVar("grjca_instruction_set", default=None)


def why_not() -> str | None:
    """Why this backend cannot run here, or None."""
    return _why_not


def instruction_sets() -> list[str]:
    """What this processor can run of "avx512bf16", "avx512", "avx2" and "baseline"; the first is used.

    "avx512bf16" is for bfloat16, of which it rounds the operands of products as eager PyTorch does; other dtypes go by
    the next.
    """
    return [] if _native is None else _native.instruction_sets()


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Use one of :func:`instruction_sets` within a ``with`` block, for tests and measurements."""
    token = _instruction_set.set(name)
    try:
        yield
    finally:
        _instruction_set.reset(token)


def forward(
    problem: Problem,
    features: Sequence[Tensor],
    parameters: Sequence[Tensor],
    lengths: Tensor | None,
    seed: Tensor | None,
    outputs: Sequence[Tensor],
    iterates: Tensor,
    gates: Sequence[Tensor],
) -> None:
    """Fill ``outputs`` [B, L, d_m], ``iterates`` [T, B, L, d] and, unless empty, ``gates`` [B, L, ways]."""
    call = _Call(problem, features, parameters, lengths, seed, iterates)
    _native.cpu_forward(
        **call.arguments(backward=False),
        outputs=[_strided(y) for y in outputs],
        gates=[_strided(g) for g in gates] or call.absent,
    )


def backward(
    problem: Problem,
    features: Sequence[Tensor],
    parameters: Sequence[Tensor],
    lengths: Tensor | None,
    seed: Tensor | None,
    iterates: Tensor,
    grad_outputs: Sequence[Tensor | None],
    grad_iterates: Sequence[Tensor | None],
    grad_gates: Sequence[Tensor | None],
    grad_features: Sequence[Tensor | None],
    grad_parameters: Sequence[Tensor | None],
) -> None:
    """Fill ``grad_features`` and ``grad_parameters`` where not None; incoming gradients that are None are zero."""
    call = _Call(problem, features, parameters, lengths, seed, iterates)
    _native.cpu_backward(
        **call.arguments(backward=True),
        grad_outputs=[_strided(g) for g in grad_outputs],
        grad_iterates=[None if g is None else (g.data_ptr(), *g.stride()[1:]) for g in grad_iterates] or call.absent,
        grad_iterates_steps=[0 if g is None else g.stride(0) for g in grad_iterates],
        grad_gates=[_strided(g) for g in grad_gates] or call.absent,
        grad_features=[_strided(g) for g in grad_features],
        grad_parameters=[0 if g is None else g.data_ptr() for g in grad_parameters],
    )


class _Call:
    """What both directions pass; keeps alive the tensors whose addresses are passed."""

    def __init__(
        self,
        problem: Problem,
        features: Sequence[Tensor],
        parameters: Sequence[Tensor],
        lengths: Tensor | None,
        seed: Tensor | None,
        iterates: Tensor,
    ) -> None:
        if lengths is not None:
            check_lengths_values(lengths, problem.length)
            lengths = lengths.to(torch.int64).contiguous()
        self.problem = _native.Problem(
            batch=problem.batch,
            length=problem.length,
            widths=list(problem.widths),
            iterations=problem.iterations,
            gating=problem.gating,
            form=problem.form,
            dtype=str(features[0].dtype).removeprefix("torch."),
            dropout=problem.dropout,
            temperature=problem.temperature,
            normalize=problem.normalize,
            shared=problem.shared,
        )
        self.features = features
        self.parameters = [parameter.contiguous() for parameter in parameters]
        self.lengths = lengths
        self.seed = 0 if seed is None else int(seed) & (2**64 - 1)
        self.iterates = iterates
        self.absent: list[None] = [None] * len(features)

    def arguments(self, *, backward: bool) -> dict[str, Any]:
        threads, isa = torch.get_num_threads(), _instruction_set.get()
        size = _native.cpu_workspace(self.problem, backward, threads, isa)
        self.workspace = torch.empty(size, dtype=torch.uint8)
        return {
            "problem": self.problem,
            "features": [_strided(x) for x in self.features],
            "parameters": [parameter.data_ptr() for parameter in self.parameters],
            "lengths": 0 if self.lengths is None else self.lengths.data_ptr(),
            "seed": self.seed,
            "iterates": self.iterates.data_ptr(),
            "workspace": self.workspace.data_ptr(),
            "threads": threads,
            "instruction_set": isa,
        }


def _strided(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else (x.data_ptr(), *x.stride())
