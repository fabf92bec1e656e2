"""No time for a wrong result: the rule of tests/support/tolerances.py, applied to what is about to be timed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from benchmarks.cases import Problem
from grjca_kernels import GatedRJCAFused
from tolerances import check_draws, largest, length

DRAWS = 2  # of eager's rounding errors; the tests take more, at smaller shapes
RETRIES = 3  # of gradients
SEED = 1
DROPOUT_BATCH = 8  # of the check with dropout: making the reference's masks takes longer than all else


@dataclass(frozen=True)
class Result:
    """An output and the gradients, one vector per kind."""

    output: Tensor
    gradients: dict[str, Tensor]


def check_forward(block: nn.Module, problem: Problem) -> None:
    """AssertionError unless the output of ``block``, in eval mode, is as exact as the rule asks."""
    with torch.no_grad():
        output = block.eval()(*problem.inputs[0])
    truth, draws = expected(problem, 0.0)
    check_draws("output", output, truth.output, [draw.output for draw in draws], largest)


def check_training(block: nn.Module, problem: Problem, dropout: float = 0.0) -> None:
    """The same for output and gradients of ``block`` in training mode; it must have been made with ``dropout``.

    Where rounding flips a relu, one element of a gradient is wrong as a whole, in eager as in all others, and by much
    where a gate is nearly shut. Such an error is gone with other inputs, and a mistake stays: a gradient that fails is
    computed anew at those, up to RETRIES times.
    """
    failing: list[str] = []
    for attempt in range(1 + RETRIES):
        here = replace(problem, seed=problem.seed + attempt) if attempt else problem
        truth, draws = expected(here, dropout)
        result = run(block.train(), here, problem.dtype)
        if attempt == 0:
            check_draws("output", result.output, truth.output, [draw.output for draw in draws], largest)
        failures = {}
        for kind in failing or truth.gradients:
            eager = [draw.gradients[kind] for draw in draws]
            try:
                check_draws(f"d {kind}", result.gradients[kind], truth.gradients[kind], eager, length)
            except AssertionError as failure:
                failures[kind] = failure
        if not failures:
            return
        failing = list(failures)
    raise next(iter(failures.values()))


def small(problem: Problem) -> Problem:
    """The problem at the batch of the check with dropout."""
    return replace(problem, shape=replace(problem.shape, batch=min(problem.shape.batch, DROPOUT_BATCH)))


@lru_cache(maxsize=2)
def expected(problem: Problem, dropout: float) -> tuple[Result, list[Result]]:
    """The reference in float64, and draws of its errors in the dtype: at the weights, and half an ulp away."""
    block = problem.block(GatedRJCAFused, backend="reference", dropout=dropout)
    draws = []
    for draw in range(DRAWS):
        draws.append(run(block, problem, problem.dtype))
        nudge(block, draw)
    exact = problem.block(GatedRJCAFused, backend="reference", dropout=dropout, dtype=torch.float64)
    return run(exact, problem, torch.float64), draws


def nudge(block: nn.Module, seed: int) -> None:
    """Move every weight by half an ulp, up or down."""
    with torch.no_grad():
        for parameter in block.parameters():
            signs = torch.randint(2, parameter.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
            parameter.copy_(parameter.double() * (1 + signs * torch.finfo(parameter.dtype).eps / 2))


def run(block: nn.Module, problem: Problem, dtype: torch.dtype) -> Result:
    """Forward and backward on the first inputs of the problem, with one seed of the dropout masks."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in problem.inputs[0]]
    block.zero_grad()
    torch.manual_seed(SEED)
    output = block(*inputs)
    output.backward(problem.gradient.to(dtype))
    parts: dict[str, list[Tensor]] = {"features": [x.grad.flatten() for x in inputs]}
    for name, parameter in block.named_parameters():
        parts.setdefault(kind(name), []).append(parameter.grad.flatten())
    block.zero_grad()
    return Result(output.detach(), {kind: torch.cat(gradients) for kind, gradients in parts.items()})


def kind(name: str) -> str:
    """``layers.1.key.audio.weight`` -> ``key``, ``gates.visual.0.bias`` -> ``gates``; torch.compile puts a prefix."""
    words = name.removeprefix("_orig_mod.").split(".")
    return words[2] if words[0] == "layers" else words[0]
