"""The fusion block by every implementation: a forward, and a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cases import DEVICE, DROPOUT, IMPLEMENTATIONS, OURS, PLAIN, Problem
from benchmarks.gate import at_small_batch, check
from grjca.measure import SHAPES, saved_bytes

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_forward(name: str, implementation: str, measure: Callable[..., None]) -> None:
    """Eval mode, without autograd."""
    time_forward(name, Problem(SHAPES[name], DTYPE, DEVICE), implementation, measure)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_training(name: str, implementation: str, measure: Callable[..., None]) -> None:
    """Forward and backward with dropout."""
    time_training(name, Problem(SHAPES[name], DTYPE, DEVICE), implementation, measure)


def time_forward(name: str, problem: Problem, implementation: str, measure: Callable[..., None], **about: Any) -> None:
    call = problem.call(implementation, training=False)
    check(call, problem, training=False)
    measure(problem.in_turns(call), **described(name, problem, "forward", implementation), **about)


def time_training(name: str, problem: Problem, implementation: str, measure: Callable[..., None], **about: Any) -> None:
    """PyTorch's masks are not those of the fused block, so it alone is also checked with dropout."""
    few = at_small_batch(problem)
    check(few.call(implementation, training=True, dropout=0.0), few, training=True)
    if implementation in OURS:
        check(few.call(implementation, training=True, dropout=DROPOUT), few, training=True, dropout=DROPOUT)
    call = problem.call(implementation, training=True, dropout=DROPOUT)
    if implementation in PLAIN:  # torch.compile would compile anew where saved tensors are watched
        block = problem.block(**PLAIN[implementation], dropout=DROPOUT).train()
        about["saved_bytes"] = saved_bytes(lambda: block(*problem.inputs[0]), block.parameters())
    measure(problem.in_turns(call), **described(name, problem, "training step", implementation), **about)


def described(name: str, problem: Problem, pass_name: str, implementation: str) -> dict[str, Any]:
    dtype = str(problem.dtype).removeprefix("torch.")
    shape = f"{name}, B = {problem.shape.batch}"
    return {"shape": shape, "dtype": dtype, "pass": pass_name, "implementation": implementation}
