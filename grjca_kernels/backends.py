"""The table of backends, fastest first. Each row says why it cannot run; ops.py calls the chosen one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grjca_kernels import cpu, cuda, triton_kernels, verdicts
from grjca_kernels.call import Call, Gradients
from grjca_kernels.modes import constant_when_compiled
from grjca_kernels.problem import check_choice

ENVIRONMENT = "GRJCA_BACKEND"


@dataclass(frozen=True)
class Backend:
    """A row of the table.

    ``why_not()`` returns why the backend cannot run on this machine, or None; ``refuses(device type, dtype)`` returns
    why it does not compute such tensors. ``forward(call)`` and ``backward(call, gradients)`` fill the tensors they are
    given, for at least one sample; the reference has neither, because autograd differentiates its PyTorch code. "auto"
    chooses an ``unproven`` backend only for devices and dtypes that :mod:`grjca_kernels.verdicts` passes; ``checking``
    says how long that check takes for one dtype. ``held(dtype)`` returns how many bytes one element of the saved
    activations takes (keeping.py); it is None where nothing but X^t is saved.
    """

    name: str
    why_not: Callable[[], str | None]
    refuses: Callable[[str, torch.dtype], str | None]
    forward: Callable[[Call], None] | None = None
    backward: Callable[[Call, Gradients], None] | None = None
    unproven: bool = False
    checking: str = "a few seconds"
    held: Callable[[torch.dtype], int] | None = None

    def refusal(self, device: str, dtype: torch.dtype) -> str | None:
        """Return why the backend cannot compute tensors of this device type and dtype, or None.

        The tensors are checked first, because asking CUDA anything initialises it, which fails in the forked workers of
        a DataLoader.
        """
        return self.refuses(device, dtype) or self.why_not()


def _on(expected: str) -> Callable[[str, torch.dtype], str | None]:
    def refuses(device: str, dtype: torch.dtype) -> str | None:
        return None if device == expected else f"it computes on {expected} tensors, and these are on {device}."

    return refuses


TABLE = {
    row.name: row
    for row in (
        Backend("cuda", cuda.why_not, cuda.refusal, cuda.forward, cuda.backward, unproven=True),
        Backend(
            "triton",
            triton_kernels.why_not,
            triton_kernels.refusal,
            triton_kernels.forward,
            triton_kernels.backward,
            True,
            "one or two minutes",
        ),
        Backend("cpu", cpu.why_not, _on("cpu"), cpu.forward, cpu.backward, held=cpu.held),
        Backend("reference", lambda: None, lambda device, dtype: None),
    )
}
CHOICES = ("auto", *TABLE)


def backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Return for each backend why it cannot run on this machine (None if it can), in the order in which "auto" tries
    them.

    With a ``device``, return why "auto" passes each over for float32 tensors there; "auto" takes the first with None.
    On a GPU this may run the self-check.
    """
    if device is None:
        return {name: row.why_not() for name, row in TABLE.items()}
    place = torch.device(device)
    return {name: _passed_over(row, place.type, place.index, torch.float32) for name, row in TABLE.items()}


def _passed_over(row: Backend, device: str, index: int | None, dtype: torch.dtype, reduced: bool = False) -> str | None:
    """Return why "auto" does not take the backend, or None."""
    reason = row.refusal(device, dtype)
    if reason is None and row.unproven and not verdicts.passed(row, device, index, dtype, reduced):
        if device == "cpu":
            return "its interpreter is for tests, and slow; it is used where it is named."
        return f"the self-check did not pass it on this device; grjca_kernels.self_check({row.name!r}) prints why."
    return reason


def choose(name: str | None, tensor: Tensor, reduced: bool = False) -> str:
    """Return the name of the backend for tensors like ``tensor``.

    "auto" defers to ``GRJCA_BACKEND``, and then to the first backend that can run. ``reduced`` is that of Problem.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for a named backend that cannot run, with its reason.
    """
    source = "backend"
    if name is None or name == "auto":
        source, name = ENVIRONMENT, _default()
    check_choice(source, name, CHOICES)
    device = tensor.device
    if name == "auto":
        return _first_that_can(device.type, device.index, tensor.dtype, reduced)
    reason = _refusal(name, device.type, tensor.dtype)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run: {reason} Choose another, or backend='auto'.")
    return name


@constant_when_compiled
def _default() -> str:
    return os.environ.get(ENVIRONMENT) or "auto"


@constant_when_compiled
def _refusal(name: str, device: str, dtype: torch.dtype) -> str | None:
    return TABLE[name].refusal(device, dtype)


@constant_when_compiled
def _first_that_can(device: str, index: int | None, dtype: torch.dtype, reduced: bool = False) -> str:
    for row in TABLE.values():
        if row.unproven and device == "cpu":
            continue  # an interpreter, used only when named
        if _passed_over(row, device, index, dtype, reduced) is None:
            break
    return row.name
