"""One thread for all tests: on small problems, threads that wait for each other are all the time there is.

Where there is no GPU, backend="triton" computes in Triton's interpreter.
"""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton looks while it is imported, and the next line may do that

from grjca.measure import threads
from grjca_kernels import cpu

LONGEST = ("test_triton_compiled.py", "test_triton.py", "test_train.py", "test_cuda.py")
"""Files that take minutes. They begin first, or the last one of them would go on while all other processes are idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests that ask for more threads get them, however little there is to do."""
    monkeypatch.setattr(cpu, "FOR_A_THREAD", 1)
    with threads(1):
        yield
