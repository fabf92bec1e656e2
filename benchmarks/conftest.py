"""How a call is timed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.cases import IMPLEMENTATIONS, THREADS, Problem, provenance
from grjca.measure import SHAPES

SECONDS = 3.0  # of measuring per case, unless FEWEST rounds take longer
FEWEST, MOST = 5, 50


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Equal threads for all, and no compiled code left over."""
    torch.set_num_threads(THREADS)
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session", params=SHAPES)  # of this scope, so that cases of one shape follow one another
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def subject(shape: str) -> Problem:
    return Problem(SHAPES[shape])


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def measure(benchmark: Any, shape: str, subject: Problem, implementation: str) -> Callable[..., None]:
    """``measure(pass_name, call, before)`` times ``call(visual, audio)`` on inputs that take turns."""

    def run(pass_name: str, call: Callable[..., object], before: Callable[[], object]) -> None:
        turns = itertools.cycle(subject.inputs)

        def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
            before()
            return next(turns), {}

        before()
        call(*next(turns))  # warm-up: compilation, allocation
        before()
        start = time.perf_counter()
        call(*next(turns))
        rounds = int(SECONDS / (time.perf_counter() - start))
        benchmark.group = f"{shape}, {pass_name}"
        benchmark.extra_info.update(
            shape=shape,
            batch=subject.shape.batch,
            **{"pass": pass_name},
            implementation=implementation,
            dtype="float32",
            **provenance(),
        )
        benchmark.pedantic(call, setup=setup, rounds=min(max(rounds, FEWEST), MOST))

    return run
