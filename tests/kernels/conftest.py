"""Fixtures of the tests that run Triton's interpreter."""

import pytest


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speed up Triton's interpreter, and prepare every launch again, because tests change what it is prepared from."""
    from grjca_kernels.triton_kernels import launch
    from interpreter import speed_up

    speed_up()
    monkeypatch.setattr(launch, "_prepare", launch._prepare.__wrapped__)
