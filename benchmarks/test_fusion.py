"""The fusion block: inference, and a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import DROPOUT, IMPLEMENTATIONS, Problem
from benchmarks.gate import check_forward, check_training, small
from grjca.measure import saved_bytes


def test_forward(implementation: str, subject: Problem, measure: Callable[..., None]) -> None:
    """Eval mode, without autograd."""
    block = IMPLEMENTATIONS[implementation](subject)
    check_forward(block, subject)
    with torch.no_grad():
        measure("forward", block, lambda: None)


def test_training(implementation: str, subject: Problem, measure: Callable[..., None], benchmark: Any) -> None:
    """Forward and backward with dropout. PyTorch's masks are not those of the fused block, so the check is without."""
    make = IMPLEMENTATIONS[implementation]
    check_training(make(subject, dropout=0.0), subject)
    if implementation == "fused":
        check_training(make(small(subject), dropout=DROPOUT), small(subject), DROPOUT)
    block = make(subject, dropout=DROPOUT).train()

    def forget() -> None:
        block.zero_grad()
        for visual, audio in subject.inputs:
            visual.grad = audio.grad = None

    def step(visual: torch.Tensor, audio: torch.Tensor) -> None:
        block(visual, audio).backward(subject.gradient)

    measure("training step", step, forget)
    # Last, because torch.compile may compile anew where tensors are watched.
    benchmark.extra_info["saved_bytes"] = saved_bytes(lambda: block(*subject.inputs[0]), block.parameters())
