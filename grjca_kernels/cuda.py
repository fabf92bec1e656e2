"""The CUDA C++ kernels: tensors in, one launch for the whole forward and one for the whole backward.

They have not yet run on a GPU. Nothing here compiles, waits for the device, or touches it before the first call.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grjca_kernels.precision import allows_tf32
from grjca_kernels.shapes import Problem

if TYPE_CHECKING:
    from grjca_kernels._native import CudaLaunch

_not_loaded: str | None = None
try:
    import grjca_kernels._native as _native
except ModuleNotFoundError:
    _native = None  # type: ignore[assignment]
    _not_loaded = "the native code was not built; install a C++17 compiler and nvcc, then this package again."
except ImportError as error:
    _native = None  # type: ignore[assignment]
    _not_loaded = f"the native code does not load ({error}); install this package again."
else:
    if not hasattr(_native, "cuda_why_not"):  # an editable install whose Python files have moved on
        _not_loaded = "the native code is older than its Python files; install this package again."


# ---- whether


def why_not() -> str | None:
    """Why this backend cannot run here, or None."""
    reason = _not_loaded or _native.cuda_why_not()
    if reason is not None:
        return reason
    if torch.version.hip:
        return "it computes on NVIDIA GPUs, and this PyTorch was built for AMD's."
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU."
    return _why_not_on(torch.cuda.get_device_capability(), _native.cuda_architectures)


def _why_not_on(capability: tuple[int, int], architectures: str) -> str | None:
    """Machine code runs on later chips of the same generation, and there is PTX of the oldest for all later ones; names
    with a letter stand for these chips alone."""
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
    """Why it does not compute tensors of this device type and dtype, or None."""
    if device != "cuda":
        return f"it computes on cuda tensors, and these are on {device}."
    if dtype == torch.float64:
        return "its kernels have no float64; convert, or use the reference."
    return None


# ---- what


def forward(
    problem: Problem,
    features: Sequence[Tensor],
    parameters: Sequence[Tensor],
    lengths: Tensor | None,
    seed: Tensor | None,
    outputs: Sequence[Tensor],
    iterates: Tensor,
    gates: Sequence[Tensor],
) -> None:
    """Fill ``outputs`` [B, L, d_m], ``iterates`` [T, B, L, d] and, unless empty, ``gates`` [B, L, ways]."""
    if problem.batch == 0:
        return
    launch = launch_of(problem, iterates.dtype, iterates.device, backward=False, weights=False)
    of_outputs = {
        "outputs": [_strided(y) for y in outputs],
        "gates": [_strided(g) for g in gates] or [None] * len(features),
    }
    _run(launch, launch.forward, problem, features, parameters, lengths, seed, iterates, of_outputs)


def backward(
    problem: Problem,
    features: Sequence[Tensor],
    parameters: Sequence[Tensor],
    lengths: Tensor | None,
    seed: Tensor | None,
    iterates: Tensor,
    grad_outputs: Sequence[Tensor | None],
    grad_iterates: Sequence[Tensor | None],
    grad_gates: Sequence[Tensor | None],
    grad_features: Sequence[Tensor | None],
    grad_parameters: Sequence[Tensor | None],
) -> None:
    """Fill ``grad_features`` and ``grad_parameters`` where not None; incoming gradients that are None are zero."""
    if problem.batch == 0:
        for gradient in grad_parameters:
            if gradient is not None:
                gradient.zero_()
        return
    weights = any(gradient is not None for gradient in grad_parameters)
    launch = launch_of(problem, iterates.dtype, iterates.device, backward=True, weights=weights)
    absent = [None] * len(features)
    of_gradients = {
        "grad_outputs": [_strided(g) for g in grad_outputs],
        "grad_iterates": [None if g is None else (g.data_ptr(), *g.stride()[1:]) for g in grad_iterates] or absent,
        "grad_iterates_steps": [0 if g is None else g.stride(0) for g in grad_iterates],
        "grad_gates": [_strided(g) for g in grad_gates] or absent,
        "grad_features": [_strided(g) for g in grad_features],
        "grad_parameters": [0 if g is None else g.data_ptr() for g in grad_parameters],
    }
    _run(launch, launch.backward, problem, features, parameters, lengths, seed, iterates, of_gradients)


def _strided(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else (x.data_ptr(), *x.stride())


def _run(
    launch: CudaLaunch,
    start: Callable[..., bool],
    problem: Problem,
    features: Sequence[Tensor],
    parameters: Sequence[Tensor],
    lengths: Tensor | None,
    seed: Tensor | None,
    iterates: Tensor,
    others: dict[str, Any],
) -> None:
    """All steps in one cooperative launch, on the current stream of the tensors' device.

    Where the driver refuses it, since something else holds a part of the GPU, every step becomes a launch of its own.
    What is allocated here may be freed before the kernel has run: memory is given out anew in the order of the stream.
    """
    device = iterates.device
    with torch.cuda.device(device):
        given = [parameter.contiguous() for parameter in parameters]
        if lengths is not None:
            lengths = lengths.to(torch.int64).contiguous()
        if seed is None and problem.dropout:
            seed = torch.zeros((), dtype=torch.int64, device=device)  # as on the CPU
        workspace = torch.empty(launch.workspace_bytes, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        counters = _counters_of(launch, device, stream)
        call = functools.partial(
            start,
            features=[_strided(x) for x in features],
            parameters=[parameter.data_ptr() for parameter in given],
            lengths=0 if lengths is None else lengths.data_ptr(),
            seed=0 if seed is None else seed.data_ptr(),
            iterates=iterates.data_ptr(),
            **others,
            workspace=workspace.data_ptr(),
            counters=counters.data_ptr(),
            stream=stream,
            device=device.index,
        )
        if device not in _apart:
            if call(together=True):
                return
            _apart.add(device)
            warnings.warn(
                f"grjca_kernels: {device} refuses one launch for all steps; each step is launched alone from now on, "
                "with the same results but slower. Are other processes using this GPU?",
                stacklevel=3,
            )
        call(together=False)


_apart: set[torch.device] = set()
"""Devices on which every step is launched alone."""


# ---- launches


def launch_of(
    problem: Problem, dtype: torch.dtype, device: torch.device, *, backward: bool, weights: bool
) -> CudaLaunch:
    """The launch for a problem, remembered. ``weights``: whether gradients of any parameter are wanted."""
    tf32 = dtype == torch.float32 and allows_tf32()
    return _launch(problem, str(dtype).removeprefix("torch."), tf32, device.index, backward, weights)


@functools.lru_cache(maxsize=512)
def _launch(problem: Problem, dtype: str, tf32: bool, device: int, backward: bool, weights: bool) -> CudaLaunch:
    with torch.cuda.device(device):
        blocks = _resident(dtype, tf32, backward, device)
    return plan(problem, dtype, blocks, tf32=tf32, backward=backward, weights=weights)


@functools.cache
def _resident(dtype: str, tf32: bool, backward: bool, device: int) -> int:
    return _native.cuda_resident(dtype, tf32, backward, device)


def plan(problem: Problem, dtype: str, resident: int, *, tf32: bool, backward: bool, weights: bool) -> CudaLaunch:
    """The launch for a problem on a device that holds ``resident`` blocks at once. Needs no device."""
    described = _native.Problem(
        batch=problem.batch,
        length=problem.length,
        widths=list(problem.widths),
        iterations=problem.iterations,
        gating=problem.gating,
        form=problem.form,
        dtype=dtype,
        dropout=problem.dropout,
        temperature=problem.temperature,
        normalize=problem.normalize,
        shared=problem.shared,
    )
    return _native.CudaLaunch(problem=described, tf32=tf32, backward=backward, weights=weights, resident=resident)


MOST_COUNTERS = 4096
_counters: dict[tuple[torch.device, int], Tensor] = {}


def _counters_of(launch: CudaLaunch, device: torch.device, stream: int) -> Tensor:
    """Of the barriers: one set for each stream, since kernels of two streams may run at once.

    They are 0, or 2^31, between launches. A graph under capture gets its own, which it clears at every replay: it may
    be replayed on any stream.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(launch.counters, dtype=torch.int32, device=device)
    key = device, stream
    if key not in _counters or _counters[key].numel() < launch.counters:
        _counters[key] = torch.zeros(max(MOST_COUNTERS, launch.counters), dtype=torch.int32, device=device)
    return _counters[key]
