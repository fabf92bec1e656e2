"""One thread for all tests: on small problems, threads that wait for each other are all the time there is."""

from collections.abc import Iterator

import pytest

from grjca.measure import threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield
