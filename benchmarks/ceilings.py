"""What the GPU can do at best: memory, matrices, tanh, a wait of the whole grid, a launch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from grjca_kernels.triton_kernels.primitives import grid_barrier, tanh

Timer = Callable[[Callable[[], object]], float]
"""Median milliseconds of a call on the device."""

GIB = 1 << 30


@dataclass(frozen=True)
class Asked:
    """What tanh and grid_barrier of primitives ask of the launch configuration."""

    approximate_tanh: bool = False
    hip: bool = False


@triton.jit
def tanh_kernel(p, repeats, BLOCK: tl.constexpr, C: tl.constexpr):
    """repeats x BLOCK values of tanh in each program; a value needs the one before it, so none can be left out."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p + o)
    for _ in range(repeats):
        x = tanh(x + 0.5, C)
    tl.store(p + o, x)


@triton.jit
def barrier_kernel(p_counter, p, count, C: tl.constexpr):
    """Every program waits ``count`` times for all others, and then counts itself."""
    for _ in range(count):
        grid_barrier(p_counter, C)
    tl.atomic_add(p, 1)


@triton.jit
def empty_kernel(p):
    """Nothing."""


def copy(timer: Timer) -> dict[str, float]:
    """TB/s of a copy within the device, counting what is read and what is written."""
    a, b = (torch.empty(2 * GIB, dtype=torch.uint8, device="cuda").fill_(value) for value in (1, 2))
    return {"TB/s": 4 * GIB / timer(lambda: b.copy_(a)) / 1e9}


def matrix(timer: Timer, dtype: torch.dtype, size: int = 8192) -> dict[str, float]:
    """TFLOP/s of a product of random matrices."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return {"TFLOP/s": 2 * size**3 / timer(lambda: a @ b) / 1e9}


def tanh_rate(timer: Timer, approximate: bool, device: str = "cuda", programs: int = 0, repeats: int = 4096) -> dict:
    """tanh per second, in thousands of millions."""
    multiprocessors = programs or torch.cuda.get_device_properties(0).multi_processor_count
    block, programs = 1024, 8 * multiprocessors
    values = torch.randn(programs * block, device=device)
    ms = timer(lambda: tanh_kernel[(programs,)](values, repeats, block, Asked(approximate), num_warps=4))
    rate = programs * block * repeats / ms / 1e6
    return {"G/s": rate, "G/s per multiprocessor": rate / multiprocessors, "ms": ms}


def barrier(timer: Timer, device: str = "cuda", programs: int = 0, count: int = 2000) -> dict[str, float]:
    """Microseconds of one wait of the whole grid: the difference of many to none."""
    programs = programs or torch.cuda.get_device_properties(0).multi_processor_count
    counter, arrived = (torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2))

    def launch(waits: int) -> None:
        barrier_kernel[(programs,)](counter, arrived, waits, Asked(), num_warps=4, launch_cooperative_grid=True)

    launch(1)
    if int(arrived) != programs:
        raise AssertionError(f"{int(arrived)} of {programs} programs came back")
    none, many = timer(lambda: launch(0)), timer(lambda: launch(count))
    return {"us": 1e3 * (many - none) / count, "launch ms": none}


def launch(timer: Timer, cooperative: bool, device: str = "cuda", programs: int = 0) -> dict[str, float]:
    """Microseconds of an empty launch: of the host, and on the device where launches wait in line."""
    programs = programs or torch.cuda.get_device_properties(0).multi_processor_count
    x = torch.zeros(1, device=device)

    def once() -> None:
        empty_kernel[(programs,)](x, num_warps=4, launch_cooperative_grid=cooperative)

    once()
    start = time.perf_counter()
    for _ in range(200):
        once()
    host = (time.perf_counter() - start) / 200
    ten = timer(lambda: [once() for _ in range(10)])
    return {"host us": 1e6 * host, "device us": 1e3 * ten / 10}


CEILINGS: dict[str, Callable[[Timer], dict[str, float]]] = {
    "copy": copy,
    "matrix bfloat16": lambda timer: matrix(timer, torch.bfloat16),
    "matrix float16": lambda timer: matrix(timer, torch.float16),
    "tanh.approx.f32": lambda timer: tanh_rate(timer, True),
    "tanh accurate": lambda timer: tanh_rate(timer, False, repeats=1024),
    "grid barrier": barrier,
    "launch": lambda timer: launch(timer, False),
    "cooperative launch": lambda timer: launch(timer, True),
}
