"""Nothing is timed before its result is right: the rule of tests/support/tolerances.py, applied to a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from benchmarks.cases import ROTATED, Call, Problem, plain
from grjca_kernels import GatedRJCAFused
from tolerances import check_draws, largest, length

DRAWS = 2  # of eager's rounding errors; the tests take more, at smaller shapes
SEED = 1  # of dropout masks
BATCH = 2  # of a training step that is checked: the reference in float64 is slow


def check(call: Call, problem: Problem, training: bool, dropout: float = 0.0) -> None:
    """Check output and gradients of ``call``; with dropout, its masks must be those of the fused block.

    Where rounding flips a relu, one element of a gradient is wrong as a whole, in eager as in all others, and by much
    where a gate is nearly shut. Other inputs have other such errors, but the same mistakes. So a gradient has to pass
    on one of the inputs of the problem.

    Raises:
        AssertionError: if an error is larger than the rule allows.
    """
    kinds = kinds_of(problem)
    failing = list(dict.fromkeys(kinds)) if training else []
    failures: dict[str, AssertionError] = {}
    for turn in range(ROTATED):
        torch.manual_seed(SEED)
        results = [value.clone() for value in call(problem.inputs[turn])]
        truth, draws = expected(problem, turn, training, dropout)
        if turn == 0:
            check_draws("output", results[0], truth[0], [draw[0] for draw in draws], largest)
        for name in list(failing):
            ours, exact, *drawn = (joined(values[1:], kinds, name) for values in (results, truth, *draws))
            try:
                check_draws(f"d {name}", ours, exact, drawn, length, torch.finfo(problem.dtype).eps)
                failing.remove(name)
            except AssertionError as failure:
                failures[name] = failure
        if not failing:
            return
    raise failures[failing[0]]


def at_small_batch(problem: Problem) -> Problem:
    """The problem with so few samples that a training step of the reference is quick."""
    return replace(problem, shape=replace(problem.shape, batch=min(problem.shape.batch, BATCH)))


@lru_cache(maxsize=2 * ROTATED)
def expected(problem: Problem, turn: int, training: bool, dropout: float) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The reference in float64, and draws of its errors in the dtype: at the weights, and half an ulp away."""

    def run(block: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(SEED)
        inputs = [x.detach().to(dtype).requires_grad_() for x in problem.inputs[turn]]
        return plain(block, problem.gradient.to(dtype) if training else None)(inputs)

    block = problem.block(GatedRJCAFused, backend="reference", dropout=dropout)
    draws = []
    for draw in range(DRAWS):
        draws.append(run(block, problem.dtype))
        move_weights(block, draw)
    exact = problem.block(GatedRJCAFused, backend="reference", dropout=dropout, dtype=torch.float64)
    return run(exact, torch.float64), draws


def move_weights(block: nn.Module, seed: int) -> None:
    """Move every weight by half an ulp, up or down."""
    with torch.no_grad():
        for parameter in block.parameters():
            signs = torch.randint(2, parameter.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
            half = torch.finfo(parameter.dtype).eps / 2
            parameter.copy_(parameter.double() * (1 + signs.to(parameter.device) * half))


def kinds_of(problem: Problem) -> list[str]:
    """Name every gradient that a training step returns."""
    return ["features", "features", *map(kind, problem.weights)]


def kind(name: str) -> str:
    """``layers.1.key.audio.weight`` -> ``key``, ``gates.visual.0.bias`` -> ``gates``."""
    words = name.split(".")
    return words[2] if words[0] == "layers" else words[0]


def joined(gradients: Sequence[Tensor], kinds: Sequence[str], name: str) -> Tensor:
    """All gradients of one kind, as a vector in float64."""
    chosen = [value.double().flatten() for value, of in zip(gradients, kinds, strict=True) if of == name]
    return torch.cat(chosen)
