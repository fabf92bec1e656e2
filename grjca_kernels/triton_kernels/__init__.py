"""The Triton kernels: one launch forward, one backward.

This file does not import Triton, so neither does grjca_kernels: ``launch`` is imported on first use. With
``TRITON_INTERPRET=1`` in the environment the same kernels run in Triton's interpreter on CPU tensors, for tests.
"""

from __future__ import annotations

import functools
import os
from importlib import metadata

import torch

from grjca_kernels.call import Call, Gradients

OLDEST, CAPABILITY = (3, 6), (8, 0)


@functools.cache
def _version() -> str | None:
    """Return the version of the installed Triton, or None."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def interpreted() -> bool:
    """Return whether kernels run in the interpreter, on CPU tensors and with a grid of one program."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def why_not() -> str | None:
    """Return why this backend cannot run here, or None."""
    version = _version()
    if version is None:
        return "Triton is not installed; `pip install triton`, which PyTorch's GPU builds for Linux bring along."
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"it needs Triton {OLDEST[0]}.{OLDEST[1]} or later, and {version} is installed; `pip install -U triton`."
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU. (With TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly, for tests.)"
    if not torch.version.hip and torch.cuda.get_device_capability() < CAPABILITY:
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        return f"it needs a GPU of compute capability 8.0 (Ampere) or later, and this one has {found}."
    return None


def refusal(device: str, dtype: torch.dtype) -> str | None:
    """Return why the backend does not compute tensors of this device type and dtype, or None."""
    if interpreted() and device != "cpu":
        return f"TRITON_INTERPRET=1 runs it on cpu tensors, and these are on {device}; unset it."
    if not interpreted() and device != "cuda":
        return f"it computes on cuda tensors, and these are on {device}."
    if dtype == torch.float64:
        return "its kernels have no float64; convert, or use the reference."
    if interpreted() and dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly; use float32 or float16 there."
    return None


def forward(call: Call) -> None:
    """Call :func:`launch.forward`."""
    from grjca_kernels.triton_kernels import launch

    launch.forward(call)


def backward(call: Call, gradients: Gradients) -> None:
    """Call :func:`launch.backward`."""
    from grjca_kernels.triton_kernels import launch

    launch.backward(call, gradients)
