"""The CUDA C++ kernels: tensors in, one launch for the whole forward and one for the whole backward.

They have not yet run on a GPU. Nothing here compiles, waits for the device, or touches it before the first call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from grjca_kernels import native
from grjca_kernels.call import Call, Gradients
from grjca_kernels.modes import allows_tf32
from grjca_kernels.problem import Problem

if TYPE_CHECKING:
    from grjca_kernels._native import CudaLaunch

# ---- availability


def why_not() -> str | None:
    """Return why this backend cannot run here, or None."""
    reason = native.missing or native.library.cuda_why_not()
    if reason is not None:
        return reason
    if torch.version.hip:
        return "it computes on NVIDIA GPUs, and this PyTorch was built for AMD's."
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU."
    return _why_not_on(torch.cuda.get_device_capability(), native.library.cuda_architectures)


@functools.cache
def _why_not_on(capability: tuple[int, int], architectures: str) -> str | None:
    """Return why the built ``architectures`` do not cover a device of this ``capability``, or None.

    Machine code runs on later chips of the same generation, and PTX of the oldest architecture on all later chips.
    Names with a letter stand for exactly those chips.
    """
    found = ".".join(map(str, capability))
    if capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 (Ampere) or later, and this one has {found}."
    names = architectures.split(";")
    plain = [divmod(int(name), 10) for name in names if name.isdecimal()]
    exact = [divmod(int(name[:-1]), 10) for name in names if not name.isdecimal()]
    code = any(built[0] == capability[0] and built <= capability for built in plain)
    if code or capability in exact or (plain and min(plain) <= capability):
        return None
    return (
        f"it was built for {architectures}, and this GPU has compute capability {found}; install this package again "
        f"with GRJCA_CUDA_ARCHITECTURES={found.replace('.', '')}."
    )


def refusal(device: str, dtype: torch.dtype) -> str | None:
    """Return why the backend does not compute tensors of this device type and dtype, or None."""
    if device != "cuda":
        return f"it computes on cuda tensors, and these are on {device}."
    if dtype == torch.float64:
        return "its kernels have no float64; convert, or use the reference."
    return None


# ---- entry points


def forward(call: Call) -> None:
    """Fill the results that the call wants."""
    launch = launch_of(call, backward=False, weights=False)
    _start(call, launch, launch.forward, call)


def backward(call: Call, gradients: Gradients) -> None:
    """Fill the gradients that are wanted."""
    weights = any(gradient is not None for gradient in gradients.parameters)
    launch = launch_of(call, backward=True, weights=weights)
    _start(call, launch, launch.backward, call, gradients)


def _start(call: Call, launch: CudaLaunch, start: Callable[..., None], *tensors: Any) -> None:
    """Launch all steps as one cooperative kernel, on the device's current stream or into the graph that it captures.

    Memory allocated here may be freed before the kernel has run, because the allocator reuses it in stream order.

    Raises:
        RuntimeError: if the driver refuses the launch, for example because another process holds part of the GPU.
    """
    device = call.iterates.device
    with torch.cuda.device(device):
        workspace = torch.empty(launch.workspace_bytes, dtype=torch.uint8, device=device)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        start(*tensors, (workspace.data_ptr(), stream, device.index), together)


together = True
"""Whether all steps go into one launch; benchmarks set this to False to launch every step alone."""


# ---- launches


def launch_of(call: Call, *, backward: bool, weights: bool) -> CudaLaunch:
    """Return the cached launch for a call; ``weights`` says whether the gradient of any parameter is wanted."""
    dtype = call.iterates.dtype
    tf32 = dtype == torch.float32 and (call.problem.reduced or allows_tf32())
    return _launch(call.problem, dtype, tf32, call.iterates.device.index, backward, weights)


@functools.lru_cache(maxsize=512)
def _launch(problem: Problem, dtype: torch.dtype, tf32: bool, device: int, backward: bool, weights: bool) -> CudaLaunch:
    with torch.cuda.device(device):
        blocks, sharing = _resident(dtype, tf32, backward, device)
    return plan(problem, dtype, blocks, sharing, tf32=tf32, backward=backward, weights=weights)


@functools.cache
def _resident(dtype: torch.dtype, tf32: bool, backward: bool, device: int) -> tuple[int, int]:
    """Return how many blocks the device can hold at once, and how many of them share a multiprocessor."""
    return native.library.cuda_resident(str(dtype).removeprefix("torch."), tf32, backward, device)


def plan(
    problem: Problem, dtype: torch.dtype, resident: int, sharing: int = 2, *, tf32: bool, backward: bool, weights: bool
) -> CudaLaunch:
    """Plan the launch on a device that holds ``resident`` blocks at once, ``sharing`` of them per multiprocessor.

    This needs no device.
    """
    return native.library.CudaLaunch(
        problem=native.problem_of(problem, dtype),
        tf32=tf32,
        backward=backward,
        weights=weights,
        resident=resident,
        sharing=sharing,
    )
