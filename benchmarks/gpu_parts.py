"""The kernels phase by phase, other launch configurations, and a short run for compute-sanitizer."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import gpu_block
from benchmarks.gpu import NAMES, VARIANTS
from benchmarks.gpu_block import Clock, Subject, described, measure, plain
from grjca.measure import SHAPES
from grjca_kernels import GatedRJCAFused, cuda, verification
from grjca_kernels.backends import TABLE
from grjca_kernels.triton_kernels import division, launch, launch_config

Launched = tuple[Any, launch.Prepared, Any, Any, int]
"""The arguments of launch.run."""


def launches(call: Callable[[], object]) -> list[Launched]:
    """What ``call`` launches: it runs as always, and every launch is noted."""
    noted, run = [], launch.run

    def noting(*arguments: Any) -> None:
        noted.append(arguments)
        run(*arguments)

    with patch.object(launch, "run", noting):
        call()
    return noted


def run_steps(launched: Launched, first: int, last: int) -> None:
    """Steps first <= step < last of a launch."""
    launch.run_steps(*launched, first, last)


@contextmanager
def apart(backend: str) -> Iterator[None]:
    """Every step is a launch of its own, of the same kernel, so that no block waits for another."""

    def run(kernel: Any, prepared: launch.Prepared, arguments: Any, others: Any, batch: int) -> None:
        for step in range(prepared.launch.steps):
            run_steps((kernel, prepared, arguments, others, batch), step, step + 1)

    with patch.object(cuda, "together", False) if backend == "cuda" else patch.object(launch, "run", run):
        yield


def self_check(backend: str, launches: str, precision: str) -> None:
    """Every finding of one precision, and the verdict on a line of its own."""
    device = torch.device("cuda", torch.cuda.current_device())
    alone = apart(backend) if launches == "launch by launch" else nullcontext()
    with gpu_block.precision(precision), alone:
        verdict = verification.check(TABLE[backend], device, gpu_block.DTYPES[precision], tell=print)
    print(f"\n{precision}: {verdict.reason or 'passed'}", flush=True)


def step_names(of: launch_config.Launch, backward: bool) -> list[str]:
    """What each step of a launch is, in the order of forward_kernel and backward_kernel."""
    constants = of.constants
    return names_of_steps(
        of.steps, constants.iterations, constants.released, constants.stream, backward, reduced=of.reduced
    )


def names_of_steps(
    steps: int, iterations: int, released: bool, streamed: bool, backward: bool, reduced: bool
) -> list[str]:
    """Both backends go through the same phases."""
    turns = range(iterations)
    attend = ["attend"] if streamed else ["correlate", "attend"]
    if not backward:
        phases = ["project", *attend, "output"]
        chunk = ["initial", *(f"{phase} {t + 1}" for t in turns for phase in phases), "gate"]
        return chunk * (steps // len(chunk))
    phases = ["project", *attend, *["output_backward"] * released, "attend_backward"]
    phases += ["correlate_backward"] + ["key_joint_backward"] * (not streamed) + ["project_backward"]
    chunk = ["initial", "gates_backward", *(f"{phase} {t + 1}" for t in reversed(turns) for phase in phases)]
    chunk += ["initial_backward"]
    return chunk * (steps // len(chunk)) + ["reduce"] * reduced


def phases(name: str, batch: int) -> dict[str, Any]:
    """Microseconds of every step alone, and of all in one launch."""
    subject = Subject(replace(SHAPES[name], batch=batch), "bfloat16")
    block = subject.block(GatedRJCAFused, backend="triton", dropout=0.0)
    noted = launches(lambda: plain(block, subject.gradient)(subject.inputs[0]))
    result: dict[str, Any] = {"kind": "phases", "shape": name, "batch": batch}
    clock = Clock()
    for direction, launched in zip(("forward", "backward"), noted, strict=True):
        of = launched[1].launch
        names = step_names(of, direction == "backward")
        times: dict[str, float] = {}
        for step, of_step in enumerate(names):
            us = 1e3 * clock.median(functools.partial(run_steps, launched, step, step + 1))
            times[of_step] = round(times.get(of_step, 0.0) + us, 2)
        whole = 1e3 * clock.median(functools.partial(run_steps, launched, 0, of.steps))
        result[direction] = times
        result[f"{direction} us"] = {"phases": round(sum(times.values()), 2), "one launch": round(whole, 2)}
        result[f"{direction} launch"] = {"programs": of.programs, "chunk": of.chunk, "tiles": str(of.tiles)}
    return result


def cuda_phases(name: str, batch: int) -> dict[str, Any]:
    """The same of the CUDA C++ kernels, by the profiler: each step launched alone, then all in one; caches are warm."""
    subject = Subject(replace(SHAPES[name], batch=batch), "bfloat16")
    call = plain(subject.block(GatedRJCAFused, backend="cuda", dropout=0.0), subject.gradient)
    planned, launch_of = [], cuda.launch_of

    def noting(*arguments: Any, **options: Any) -> Any:
        planned.append(launch_of(*arguments, **options).plan())
        return launch_of(*arguments, **options)

    with patch.object(cuda, "launch_of", noting):
        whole = kernel_times(lambda: call(subject.inputs[0]))
    with apart("cuda"):
        alone = kernel_times(lambda: call(subject.inputs[0]))
    result: dict[str, Any] = {"kind": "phases", "implementation": "cuda", "shape": name, "batch": batch}
    for direction, plan, us in zip(("forward", "backward"), planned[:2], whole, strict=True):
        backward, streamed = direction == "backward", bool(plan["streamed"])
        names = names_of_steps(
            plan["all_steps"], subject.shape.iterations, True, streamed, backward, reduced=plan["parts"] > 0
        )
        times: dict[str, float] = {}
        for of_step in names:
            times[of_step] = round(times.get(of_step, 0.0) + alone.pop(0), 2)
        result[direction] = times
        result[f"{direction} us"] = {"phases": round(sum(times.values()), 2), "one launch": round(us, 2)}
        result[f"{direction} launch"] = plan
    return result


def kernel_times(call: Callable[[], object], repetitions: int = 7) -> list[float]:
    """Median microseconds of every kernel of ours that ``call`` launches, in their order."""
    call()
    runs = []
    for _ in range(repetitions):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
            call()
            torch.cuda.synchronize()
        events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        ours = sorted(
            (event.time_range.start, event.time_range.elapsed_us()) for event in events if is_ours(event.name)
        )
        runs.append([us for _, us in ours])
    return [statistics.median(of_kernel) for of_kernel in zip(*runs, strict=True)]


def is_ours(kernel: str) -> bool:
    return any(part in kernel for part in NAMES.values())


# ---- other configurations


@contextmanager
def variant(changes: dict[str, Any]) -> Iterator[None]:
    """Other numbers than those of launch_config.py and division.py."""
    others = {
        "chunk": (division, "chunk_of", lambda problem, *_: min(problem.batch, changes["chunk"])),
        "w": (division, "weight_block", lambda *_: changes["w"]),
        "calls": (launch_config, "calls", lambda *_: bool(changes["calls"])),
    }
    of_tiles, tiles = {name: value for name, value in changes.items() if name not in others}, launch_config.tiles
    with ExitStack() as stack:
        stack.enter_context(patch.object(launch_config, "tiles", lambda *a, **o: replace(tiles(*a, **o), **of_tiles)))
        for name in others.keys() & changes.keys():
            stack.enter_context(patch.object(*others[name]))
        stack.callback(launch._prepare.cache_clear)
        launch._prepare.cache_clear()
        yield


def tried(name: str, batch: int, of_variant: str, training: bool) -> dict[str, Any]:
    """A row of a variant: checked, then timed."""
    subject = Subject(replace(SHAPES[name], batch=batch), "bfloat16")
    with variant(VARIANTS[of_variant]):
        call = gpu_block.make(subject, "fused", training, dropout=0.0)
        gpu_block.check(call, subject, training)
        figures = measure(call, subject.inputs)
    row = described(name, batch, "bfloat16", "fused", training)
    return {"kind": "variant", "variant": of_variant, **row, **figures}


# ---- for compute-sanitizer

RESIDENT = (16, 2)
"""Blocks to which the CUDA C++ kernels are held: several teams of several blocks, and sums of weights in parts; or so
few that a team, and the backward, have several chunks."""


def exercise(backend: str) -> None:
    """A forward and a backward of every path: C streamed and stored, dropout, lengths, all gates, several chunks."""
    for frames, gating in ((16, "hierarchical"), (40, "flat"), (40, "none")):
        if backend == "triton":  # every dtype more is a compilation more
            with variant({"chunk": 3}):
                both_passes(backend, frames, gating, 5, torch.float16)
            continue
        for resident in RESIDENT:
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                with held_to(resident):
                    both_passes(backend, frames, gating, 80, dtype)
    if backend == "cuda":
        with gpu_block.precision("tf32"):
            both_passes(backend, 40, "flat", 5, torch.float32)


def both_passes(backend: str, frames: int, gating: str, batch: int, dtype: torch.dtype) -> None:
    options = {"gating": gating, "normalize": True, "dropout": 0.5, "output": "concat", "backend": backend}
    block = GatedRJCAFused(48, 24, frames, device=gpu_block.DEVICE, dtype=dtype, **options)
    x = [torch.randn(batch, frames, width, device=gpu_block.DEVICE).to(dtype).requires_grad_() for width in (48, 24)]
    lengths = torch.tensor([(frames, 0, 1, 9, frames)[i % 5] for i in range(batch)], device=gpu_block.DEVICE)
    y = block(*x, lengths)
    gradients = torch.autograd.grad(y.float().square().sum(), [*x, *block.parameters()])
    if not all(bool(value.isfinite().all()) for value in (y, *gradients)):
        raise AssertionError(f"{frames} frames, {gating}, {dtype}: not finite")


@contextmanager
def held_to(resident: int) -> Iterator[None]:
    """CUDA C++ launches of at most so many blocks. Asking how many there might be also prepares the kernel."""
    ask = cuda._resident

    def held(*of: Any) -> tuple[int, int]:
        blocks, sharing = ask(*of)
        return min(resident, blocks), sharing

    cuda._launch.cache_clear()
    with patch.object(cuda, "_resident", held):
        yield
    cuda._launch.cache_clear()


def overhead(implementation: str, calls: int = 200) -> dict[str, float]:
    """Microseconds that the host needs for a call of the block, at a size that the device does in no time."""
    shape = replace(SHAPES["light"], batch=1)
    subject = Subject(shape, "bfloat16")
    result = {}
    for name, training in (("forward", False), ("training", True)):
        call = gpu_block.make(subject, implementation, training)
        call(subject.inputs[0])
        times = [gpu_block.host_seconds(lambda call=call: call(subject.inputs[0])) for _ in range(calls)]  # type: ignore[misc]
        result[f"{name} us"] = round(1e6 * statistics.median(times), 1)
    return result
