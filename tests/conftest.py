"""One thread for all tests: on small problems, threads that wait for each other are all the time there is.

Where there is no GPU, backend="triton" computes in Triton's interpreter.
"""

import os
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks while it is imported, and the next line may do that

from grjca.measure import threads
from grjca_kernels import cpu

LONGEST = ("test_triton_compiled.py", "test_cuda.py", "test_triton.py", "test_footage_to_values.py", "test_train.py")
"""Files that take minutes. They begin first, or the last one of them would go on while all other processes are idle."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run every case: also tests marked exhaustive, and all sampled")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if not config.getoption("--all") and not any("::" in argument for argument in config.args):
        left_out = set(_left_out(items))
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _left_out(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Yield what runs with ``--all`` only: tests marked exhaustive, and the cases that sampled(count) skips."""
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("exhaustive"):
            yield item
        elif item.get_closest_marker("sampled"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for of_test in cases.values():
        (count,) = of_test[0].get_closest_marker("sampled").args
        kept = {round(i * (len(of_test) - 1) / max(1, count - 1)) for i in range(count)}
        yield from (item for i, item in enumerate(of_test) if i not in kept)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests that ask for more threads get them, however little there is to do."""
    monkeypatch.setattr(cpu, "FOR_A_THREAD", 1)
    with threads(1):
        yield
