"""The fusion block: inference, and a training step with the forward in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.baselines import FORMULATIONS
from benchmarks.cases import DROPOUT, IMPLEMENTATIONS, WARM_UPS, Problem
from benchmarks.gate import check_forward, check_training, small
from benchmarks.memory import apart, weighed
from grjca.measure import alternate, saved_bytes

TRIALS = 5  # of each formulation, to choose which one torch.compile is to be measured with

Maker = Callable[..., nn.Module]


def test_forward(implementation: str, subject: Problem, measure: Callable[..., None], benchmark: Any) -> None:
    """Eval mode, without autograd."""

    def call(block: nn.Module) -> None:
        with torch.no_grad():
            block.eval()(*subject.inputs[0])

    block = chosen(implementation, subject, call, benchmark)(subject)
    check_forward(block, subject)
    with torch.no_grad():
        measure("forward", block, lambda: None)
    note_peak(implementation, subject, False, benchmark)


def test_training(implementation: str, subject: Problem, measure: Callable[..., None], benchmark: Any) -> None:
    """Forward and backward with dropout. PyTorch's masks are not those of the fused block, so the check is without."""

    def call(block: nn.Module) -> None:
        forget(block, subject)
        block.train()(*subject.inputs[0]).backward(subject.gradient)

    make = chosen(implementation, subject, call, benchmark, dropout=DROPOUT)
    check_training(make(subject, dropout=0.0), subject)
    if implementation == "fused":
        fewer = small(subject)
        check_training(make(fewer, dropout=DROPOUT), fewer, DROPOUT)
    block = make(subject, dropout=DROPOUT).train()

    forwards: list[float] = []

    def step(visual: torch.Tensor, audio: torch.Tensor) -> None:
        start = time.perf_counter()
        output = block(visual, audio)
        forwards.append(time.perf_counter() - start)
        output.backward(subject.gradient)

    measure("training step", step, lambda: forget(block, subject))
    benchmark.extra_info["forward_seconds"] = forwards[WARM_UPS:]
    # Last, because torch.compile may compile anew where tensors are watched.
    benchmark.extra_info["saved_bytes"] = saved_bytes(lambda: block(*subject.inputs[0]), block.parameters())
    note_peak(implementation, subject, True, benchmark)


def note_peak(implementation: str, subject: Problem, training: bool, benchmark: Any) -> None:
    """Not of torch.compile: its first call compiles, and with that the peak is another."""
    if implementation != "compiled":
        figures = apart(weighed, subject.shape, implementation, training, subject.dtype)
        benchmark.extra_info["peak_bytes"] = figures["peak_bytes"]


def chosen(
    implementation: str, subject: Problem, call: Callable[[nn.Module], None], benchmark: Any, **options: Any
) -> Maker:
    """What makes the blocks: of torch.compile those of the formulation that is faster here, which the row names."""
    make = IMPLEMENTATIONS[implementation]
    if implementation != "compiled":
        return make
    blocks = {name: make(subject, formulation=name, **options) for name in FORMULATIONS}
    seconds = alternate({name: partial(call, block) for name, block in blocks.items()}, TRIALS)
    medians = {name: median(times) for name, times in seconds.items()}
    best = min(medians, key=lambda name: medians[name])
    trial = {name: float(f"{1e3 * value:.4g}") for name, value in medians.items()}
    benchmark.extra_info.update(formulation=best, trial_ms=trial)
    return partial(make, formulation=best)


def forget(block: nn.Module, subject: Problem) -> None:
    """All gradients."""
    block.zero_grad()
    for visual, audio in subject.inputs:
        visual.grad = audio.grad = None
