"""How a call is timed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from benchmarks.cases import IMPLEMENTATIONS, THREADS, WARM_UPS, Problem, provenance
from grjca.measure import SHAPES

SECONDS = 3.0  # of measuring per case, unless FEWEST rounds take longer
FEWEST, MOST = 5, 50
HALVES = [*((name, torch.bfloat16) for name in SHAPES), ("abaw", torch.float16)]
CASES = [*((name, torch.float32) for name in SHAPES), *HALVES]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Equal threads for all, and no compiled code left over."""
    torch.set_num_threads(THREADS)
    yield
    torch.compiler.reset()


def _name(case: tuple[str, torch.dtype]) -> str:
    return f"{case[0]}-{str(case[1]).removeprefix('torch.')}"


# Of this scope, so that what is measured of one shape and dtype follows one another.
@pytest.fixture(scope="session", params=CASES, ids=_name)
def case(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    return request.param


@pytest.fixture(scope="session")
def subject(case: tuple[str, torch.dtype]) -> Problem:
    shape, dtype = case
    return Problem(SHAPES[shape], dtype)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def measure(
    benchmark: Any, case: tuple[str, torch.dtype], subject: Problem, implementation: str
) -> Callable[..., None]:
    """``measure(pass_name, call, before)`` times ``call(visual, audio)`` on inputs that take turns."""

    def run(pass_name: str, call: Callable[..., object], before: Callable[[], object]) -> None:
        turns = itertools.cycle(subject.inputs)

        def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
            before()
            return next(turns), {}

        for _ in range(WARM_UPS):  # the first one compiles and allocates; the last one says how many are to follow
            before()
            start = time.perf_counter()
            call(*next(turns))
            seconds = time.perf_counter() - start
        rounds = int(SECONDS / seconds)
        dtype = str(subject.dtype).removeprefix("torch.")
        benchmark.group = f"{case[0]}, {dtype}, {pass_name}"
        benchmark.extra_info.update(
            shape=case[0],
            batch=subject.shape.batch,
            **{"pass": pass_name},
            implementation=implementation,
            dtype=dtype,
            **provenance(),
        )
        benchmark.pedantic(call, setup=setup, rounds=min(max(rounds, FEWEST), MOST))

    return run
