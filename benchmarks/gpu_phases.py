"""The kernels on a GPU phase by phase: ``python -m benchmarks.gpu_phases``. It also checks them step by step."""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from triton.testing import do_bench

from benchmarks.cases import Problem, plain, where
from grjca.measure import SHAPES
from grjca_kernels import GatedRJCAFused, cuda, verification
from grjca_kernels.backends import TABLE
from grjca_kernels.triton_kernels import division, launch, launch_config

BACKENDS = ("cuda", "triton")
CELLS = [("abaw", 12), ("abaw", 64), ("clip", 64), ("clip", 128)]
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
KERNELS = ("grjca", "ward_kernel")
"""Parts of the names of our kernels, in CUDA C++ and in Triton, and of no others."""

Launched = tuple[Any, launch.Prepared, Any, Any, int]
"""The arguments of launch.run."""


def launches(call: Callable[[], object]) -> list[Launched]:
    """Run ``call`` and record its launches."""
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
def one_launch_per_step(backend: str) -> Iterator[None]:
    """Every step is a launch of its own, of the same kernel, so that no block waits for another."""

    def run(kernel: Any, prepared: launch.Prepared, arguments: Any, others: Any, batch: int) -> None:
        for step in range(prepared.launch.steps):
            run_steps((kernel, prepared, arguments, others, batch), step, step + 1)

    with patch.object(cuda, "together", False) if backend == "cuda" else patch.object(launch, "run", run):
        yield


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """The dtype; float32 products in TF32, or truly in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        yield PRECISIONS[name]
    finally:
        torch.set_float32_matmul_precision(before)


def self_check(backend: str) -> bool:
    """Check every precision, first step by step, then in one launch with its barrier, in which a kernel may hang."""
    device, passed = torch.device("cuda", torch.cuda.current_device()), True
    for alone in (True, False):
        for name in PRECISIONS:
            with precision(name) as dtype, one_launch_per_step(backend) if alone else nullcontext():
                reason = verification.check(TABLE[backend], device, dtype, tell=print).reason
            how = "step by step" if alone else "in one launch"
            print(f"{backend}, {name}, {how}: {reason or 'passed'}", flush=True)
            passed &= reason is None
    return passed


def step_names(of: launch_config.Launch, backward: bool) -> list[str]:
    """Name each step of a launch, in the order of forward_kernel and backward_kernel."""
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


def triton_phases(problem: Problem) -> Iterator[tuple[dict[str, float], float]]:
    """Microseconds of every step alone, and of all in one launch; of the forward, then of the backward."""
    block = problem.block(GatedRJCAFused, backend="triton", dropout=0.0)
    noted = launches(lambda: plain(block, problem.gradient)(problem.inputs[0]))

    def us(launched: Launched, first: int, last: int) -> float:
        return 1e3 * do_bench(functools.partial(run_steps, launched, first, last), return_mode="median")

    for launched, backward in zip(noted, (False, True), strict=True):
        of = launched[1].launch
        names = step_names(of, backward)
        yield added(names, [us(launched, i, i + 1) for i in range(of.steps)]), us(launched, 0, of.steps)


def cuda_phases(problem: Problem) -> Iterator[tuple[dict[str, float], float]]:
    """The same of the CUDA C++ kernels, by the profiler: each step launched alone, then all in one; caches are warm."""
    call = plain(problem.block(GatedRJCAFused, backend="cuda", dropout=0.0), problem.gradient)
    planned, launch_of = [], cuda.launch_of

    def noting(*arguments: Any, **options: Any) -> Any:
        planned.append(launch_of(*arguments, **options).plan())
        return launch_of(*arguments, **options)

    with patch.object(cuda, "launch_of", noting):
        whole = kernel_times(lambda: call(problem.inputs[0]))
    with one_launch_per_step("cuda"):
        alone = kernel_times(lambda: call(problem.inputs[0]))
    for plan, backward, us in zip(planned[:2], (False, True), whole, strict=True):
        steps, streamed, reduced = plan["all_steps"], bool(plan["streamed"]), plan["parts"] > 0
        names = names_of_steps(steps, problem.shape.iterations, True, streamed, backward, reduced)
        yield added(names, alone[:steps]), us
        del alone[:steps]


PHASES = {"cuda": cuda_phases, "triton": triton_phases}


def added(names: list[str], times: list[float]) -> dict[str, float]:
    """Microseconds of each step, over all chunks of the batch."""
    result = dict.fromkeys(names, 0.0)
    for name, us in zip(names, times, strict=True):
        result[name] += us
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
    return any(part in kernel for part in KERNELS)


# ---- for compute-sanitizer

RESIDENT = (16, 2)
"""Blocks to which the CUDA C++ kernels are held: several teams of several blocks, and sums of weights in parts; or so
few that a team, and the backward, have several chunks."""


def exercise(backend: str) -> None:
    """A forward and a backward of every path: C streamed and stored, dropout, lengths, all gates, several chunks."""
    for frames, gating in ((16, "hierarchical"), (40, "flat"), (40, "none")):
        if backend == "triton":  # every dtype more is a compilation more
            with chunks_of(3):
                both_passes(backend, frames, gating, 5, torch.float16)
            continue
        for resident in RESIDENT:
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                with at_most(resident):
                    both_passes(backend, frames, gating, 80, dtype)
    if backend == "cuda":
        with precision("tf32"):
            both_passes(backend, 40, "flat", 5, torch.float32)


def both_passes(backend: str, frames: int, gating: str, batch: int, dtype: torch.dtype) -> None:
    options = {"gating": gating, "normalize": True, "dropout": 0.5, "output": "concat", "backend": backend}
    block = GatedRJCAFused(48, 24, frames, device="cuda", dtype=dtype, **options)
    x = [torch.randn(batch, frames, width, device="cuda").to(dtype).requires_grad_() for width in (48, 24)]
    lengths = torch.tensor([(frames, 0, 1, 9, frames)[i % 5] for i in range(batch)], device="cuda")
    y = block(*x, lengths)
    gradients = torch.autograd.grad(y.float().square().sum(), [*x, *block.parameters()])
    if not all(bool(value.isfinite().all()) for value in (y, *gradients)):
        raise AssertionError(f"{frames} frames, {gating}, {dtype}: not finite")


@contextmanager
def chunks_of(samples: int) -> Iterator[None]:
    """Triton launches that go through a batch by so many samples at a time."""
    with patch.object(division, "chunk_of", lambda problem, *_: min(problem.batch, samples)):
        launch._prepare.cache_clear()
        try:
            yield
        finally:
            launch._prepare.cache_clear()


@contextmanager
def at_most(resident: int) -> Iterator[None]:
    """CUDA C++ launches of at most so many blocks. Asking how many there might be also prepares the kernel."""
    ask = cuda._resident

    def held(*of: Any) -> tuple[int, int]:
        blocks, sharing = ask(*of)
        return min(resident, blocks), sharing

    cuda._launch.cache_clear()
    with patch.object(cuda, "_resident", held):
        yield
    cuda._launch.cache_clear()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_phases", description="Time every phase on a GPU.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--self-check", choices=BACKENDS, help="compare with the reference, step by step and as a whole")
    what.add_argument("--exercise", choices=BACKENDS, help="run every path once; for compute-sanitizer")
    asked = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu_phases: expected a GPU, and PyTorch sees none here.")
    if asked.self_check:
        return 0 if self_check(asked.self_check) else 1
    if asked.exercise:
        exercise(asked.exercise)
        return 0
    print(f"{where()}; microseconds, bfloat16, no dropout")
    for backend, measure_phases in PHASES.items():
        for name, batch in CELLS:
            problem = Problem(replace(SHAPES[name], batch=batch), torch.bfloat16, "cuda")
            for direction, (times, us) in zip(("forward", "backward"), measure_phases(problem), strict=True):
                of = ", ".join(f"{phase} {value:.1f}" for phase, value in times.items())
                print(f"{backend}, {name}, B = {batch}, {direction}: {us:.1f} in one launch; {of}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
