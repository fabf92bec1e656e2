"""Who can compute: a table, fastest first. A row says why it cannot run; ops.py calls the one that is chosen."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from grjca_kernels import cpu
from grjca_kernels.shapes import check_choice

ENVIRONMENT = "GRJCA_BACKEND"


@dataclass(frozen=True)
class Backend:
    """A row of the table.

    ``why_not()`` is the reason it cannot run on this machine, or None; ``devices`` are the device types it computes on
    (empty: any). ``forward`` and ``backward`` have the signatures of :mod:`grjca_kernels.cpu`; the reference has none,
    because it is PyTorch code that autograd differentiates.
    """

    name: str
    why_not: Callable[[], str | None]
    devices: tuple[str, ...]
    forward: Callable[..., None] | None = None
    backward: Callable[..., None] | None = None

    def refusal(self, device: str) -> str | None:
        """Why it cannot compute tensors of this device type, or None."""
        reason = self.why_not()
        if reason is None and self.devices and device not in self.devices:
            return f"it computes on {' and '.join(self.devices)} tensors, and these are on {device}."
        return reason


TABLE = {
    row.name: row
    for row in (
        Backend("cuda", lambda: "the CUDA C++ kernels are not part of this version.", ("cuda",)),
        Backend("triton", lambda: "the Triton kernels are not part of this version.", ("cuda",)),
        Backend("cpu", cpu.why_not, ("cpu",), cpu.forward, cpu.backward),
        Backend("reference", lambda: None, ()),
    )
}
CHOICES = ("auto", *TABLE)


def backends() -> dict[str, str | None]:
    """Name -> why it cannot run on this machine, None if it can; in the order in which "auto" tries them."""
    return {name: row.why_not() for name, row in TABLE.items()}


def choose(name: str | None, tensor: Tensor) -> str:
    """The backend to run for tensors like ``tensor``; "auto" defers to ``GRJCA_BACKEND``, then to the first that can.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for a named backend that cannot run, with its reason.
    """
    if name is None or name == "auto":
        name = os.environ.get(ENVIRONMENT) or "auto"
        check_choice(ENVIRONMENT, name, CHOICES)
    else:
        check_choice("backend", name, CHOICES)
    device = tensor.device.type
    if name == "auto":
        return next(row.name for row in TABLE.values() if row.refusal(device) is None)
    reason = TABLE[name].refusal(device)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run: {reason} Choose another, or backend='auto'.")
    return name
