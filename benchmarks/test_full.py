"""Everything that ``pytest benchmarks --benchmark-only --full`` measures beyond the four shapes in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import whole_step
from benchmarks.cases import DEVICE, IMPLEMENTATIONS, OURS, PLAIN, Problem
from benchmarks.memory import peak_memory, run_in_subprocess
from benchmarks.test_block import DTYPE, described, time_forward, time_training
from grjca.config import TrainConfig
from grjca.measure import SHAPES, Shape, threads

Measure = Callable[..., None]
COMPARED = ("eager", *OURS)
PASSES = {"forward": time_forward, "training step": time_training}
DTYPES = [("abaw", torch.bfloat16), ("clip", torch.bfloat16), ("abaw", torch.float16)]
SIZES = [{"batch": 1}, {"batch": 4}, {"batch": 48}, {"length": 75}, {"length": 600}, {"length": 1200}]
"""Sizes of abaw that are varied one at a time."""
TINY = Shape(4, 8, 4, 2, 1, "flat")


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("name", "dtype"), DTYPES, ids=str)
def test_dtype(name: str, dtype: torch.dtype, implementation: str, pass_name: str, measure: Measure) -> None:
    PASSES[pass_name](name, Problem(SHAPES[name], dtype, DEVICE), implementation, measure)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", SHAPES)
def test_one_sample(name: str, implementation: str, measure: Measure) -> None:
    """B = 1, as live prediction has it."""
    time_forward(name, Problem(replace(SHAPES[name], batch=1), DTYPE, DEVICE), implementation, measure)


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("implementation", COMPARED)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_growth(size: dict[str, int], implementation: str, pass_name: str, measure: Measure) -> None:
    shape = replace(SHAPES["abaw"], **size)
    PASSES[pass_name](f"abaw, L = {shape.length}", Problem(shape, DTYPE, DEVICE), implementation, measure)


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize(("name", "training"), [(name, training) for name in SHAPES for training in (False, True)])
def test_peak_memory(name: str, training: bool, implementation: str, benchmark: Any) -> None:
    """The time of this row is that of a process, and says nothing."""
    problem, pass_name = Problem(SHAPES[name], DTYPE, DEVICE), "training step" if training else "forward"
    given = (problem.shape, implementation, training, DTYPE, DEVICE)
    about = described(name, problem, pass_name, implementation)
    benchmark.group = f"{about['shape']}, {about['dtype']}, peak memory of a {pass_name}"
    peak_bytes = benchmark.pedantic(run_in_subprocess, args=(peak_memory, *given), rounds=1)
    benchmark.extra_info.update(about, peak_bytes=peak_bytes)


# ---- call overhead: blocks so small that their kernel takes next to no time


def tiny_call(implementation: str) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A call, and the leaves of its graph."""
    x = [value.to(DEVICE).requires_grad_() for value in TINY.inputs(0)]
    if implementation == "MultiheadAttention":
        attention = nn.MultiheadAttention(TINY.dim_visual, 1, batch_first=True, device=DEVICE)
        return lambda: attention(x[0], x[0], x[0])[0], [x[0], *attention.parameters()]
    block = TINY.block(**PLAIN[implementation], device=DEVICE)
    return lambda: block(*x), [*x, *block.parameters()]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("implementation", [*COMPARED, "MultiheadAttention"])
def test_call_overhead(implementation: str, training: bool, measure: Measure) -> None:
    call, leaves = tiny_call(implementation)

    def step() -> None:
        with torch.set_grad_enabled(training):
            output = call()
        if training:
            torch.autograd.grad(output, leaves, torch.ones_like(output))

    about = {"shape": "call overhead, B = 1, L = 4, d = 8 + 4", "implementation": implementation}
    with threads(1):
        measure(step, **{"pass": "training step" if training else "forward"}, **about)


# ---- the whole model


@pytest.mark.skipif(DEVICE != "cpu", reason="its batches are of the processor")
@pytest.mark.parametrize("implementation", whole_step.BACKENDS)
@pytest.mark.parametrize("fusion", whole_step.FUSIONS)
def test_whole_model(fusion: str, implementation: str, measure: Measure) -> None:
    """A training step with everything around the block."""
    batch = TrainConfig.batch_size
    whole_step.check(fusion)
    about = {"shape": f"whole model, {fusion}, B = {batch}", "implementation": implementation}
    measure(whole_step.stepping(fusion, implementation, batch), **{"pass": "training step"}, **about)
