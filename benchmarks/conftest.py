"""How a call is timed, and what is kept of it: ``pytest benchmarks --benchmark-only``, with ``--full`` for the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import DEVICE, THREADS, machine

SECONDS = 3.0  # of measuring a case, unless FEWEST rounds take longer
FEWEST, MOST = 3, 50
KEPT = ("min", "max", "median", "q1", "q3", "iqr", "mean", "stddev", "rounds", "iterations", "ops")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also the benchmarks of benchmarks/test_full.py")


def pytest_configure(config: pytest.Config) -> None:
    """The columns that people compare, unless others are asked for."""
    if not any(argument.startswith("--benchmark-columns") for argument in config.invocation_params.args):
        config.option.benchmark_columns = ["median", "iqr", "min", "max", "rounds"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == "test_full.py" and not config.getoption("--full") else None


def pytest_benchmark_generate_machine_info() -> dict[str, str | int]:
    """Describe the machine without the name of the host."""
    return machine()


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Drop the time of every round, and everything else that benchmarks.report does not use."""
    for row in output_json["benchmarks"]:
        row["stats"] = {name: row["stats"][name] for name in KEPT}
        del row["options"], row["params"]


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Equal threads for all, and no compiled code left over."""
    torch.set_num_threads(THREADS)
    yield
    torch.compiler.reset()


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """``measure(call, **about)`` times a call; ``about`` are its shape, pass, implementation and dtype, and figures."""

    def run(call: Callable[[], object], **about: Any) -> None:
        about = {"dtype": "float32", **about}
        benchmark.group = f"{about['shape']}, {about['dtype']}, {about['pass']}"
        benchmark.extra_info.update(about)
        seconds = 0.0
        for _ in range(2):  # the first one compiles and allocates; the second one says how many are to follow
            start = time.perf_counter()
            _synchronized(call)
            seconds = time.perf_counter() - start
            if seconds > SECONDS / 2 and about["implementation"] != "compiled":
                break
        rounds = min(max(int(SECONDS / seconds), FEWEST), MOST)
        if DEVICE == "cuda":
            from triton.testing import do_bench

            benchmark.extra_info["device_ms"] = do_bench(call, return_mode="median")
        benchmark.pedantic(lambda: _synchronized(call), rounds=rounds)

    return run


def _synchronized(call: Callable[[], object]) -> None:
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
