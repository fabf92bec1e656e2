"""The kernels phase by phase, other launch configurations, and a short run for compute-sanitizer."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import gpu_block
from benchmarks.gpu import VARIANTS
from benchmarks.gpu_block import ALL_SHAPES, Clock, Subject, described, measure, plain
from grjca_kernels import GatedRJCAFused, config
from grjca_kernels.triton import launch

Launched = tuple[Any, config.Launch, Any, Any, int]
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
    kernel, of, arguments, others, batch = launched
    counter = launch.counter(arguments.iterates.device)
    options = launch.options(of, together=last - first > 1)
    kernel[(of.programs,)](arguments, others, batch, first, last, counter, of.constants, **options)


def step_names(of: config.Launch, backward: bool) -> list[str]:
    """What each step of a launch is, in the order of forward_kernel and backward_kernel."""
    constants = of.constants
    turns = range(constants.iterations)
    attend = ["attend"] if constants.stream else ["correlate", "attend"]
    if not backward:
        phases = ["project", *attend, "output"]
        chunk = ["initial", *(f"{phase} {t + 1}" for t in turns for phase in phases), "gate"]
        return chunk * (of.steps // len(chunk))
    phases = ["recompute", *attend, *["output backward"] * constants.released, "attended and weights"]
    phases += ["correlation backward"] + ["key and joint backward"] * (not constants.stream) + ["inputs and weights"]
    chunk = ["initial", "gates backward", *(f"{phase} {t + 1}" for t in reversed(turns) for phase in phases)]
    chunk += ["initial backward"]
    return chunk * (of.steps // len(chunk)) + ["reduce"] * (of.parts > 0)


def phases(name: str, batch: int) -> dict[str, Any]:
    """Microseconds of every step alone, and of all in one launch."""
    subject = Subject(replace(ALL_SHAPES[name], batch=batch), "bfloat16")
    block = subject.block(GatedRJCAFused, backend="triton", dropout=0.0)
    noted = launches(lambda: plain(block, subject.gradient)(subject.inputs[0]))
    result: dict[str, Any] = {"kind": "phases", "shape": name, "batch": batch}
    clock = Clock()
    for direction, launched in zip(("forward", "backward"), noted, strict=True):
        of = launched[1]
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


# ---- other configurations


@contextmanager
def variant(changes: dict[str, Any]) -> Iterator[None]:
    """config.py with other numbers."""
    others = {
        "chunk": ("chunk_of", lambda problem, *_: min(problem.batch, changes["chunk"])),
        "w": ("weight_block", lambda *_: changes["w"]),
        "calls": ("calls", lambda *_: bool(changes["calls"])),
    }
    of_tiles, tiles = {name: value for name, value in changes.items() if name not in others}, config.tiles
    with ExitStack() as stack:
        stack.enter_context(patch.object(config, "tiles", lambda *a, **o: replace(tiles(*a, **o), **of_tiles)))
        for name in others.keys() & changes.keys():
            stack.enter_context(patch.object(config, *others[name]))
        yield


def tried(name: str, batch: int, of_variant: str, training: bool) -> dict[str, Any]:
    """A row of a variant: checked, then timed."""
    subject = Subject(replace(ALL_SHAPES[name], batch=batch), "bfloat16")
    with variant(VARIANTS[of_variant]):
        call = gpu_block.make(subject, "fused", training, dropout=0.0)
        gpu_block.check(call, subject, training)
        figures = measure(call, subject.inputs)
    row = described(name, batch, "bfloat16", "fused", training)
    return {"kind": "variant", "variant": of_variant, **row, **figures}


# ---- for compute-sanitizer


def exercise() -> None:
    """A forward and a backward of every path: C streamed and stored, dropout, lengths, all gates, several chunks."""
    for frames, gating in ((16, "hierarchical"), (40, "flat"), (40, "none")):
        options = {"gating": gating, "normalize": True, "dropout": 0.5, "output": "concat", "backend": "triton"}
        block = GatedRJCAFused(48, 24, frames, device=gpu_block.DEVICE, dtype=torch.float16, **options)
        x = [torch.randn(5, frames, width, device=gpu_block.DEVICE).half().requires_grad_() for width in (48, 24)]
        lengths = torch.tensor([frames, 0, 1, 9, frames], device=gpu_block.DEVICE)
        with variant({"chunk": 3}):
            y = block(*x, lengths)
            gradients = torch.autograd.grad(y.float().square().sum(), [*x, *block.parameters()])
        finite = [bool(value.isfinite().all()) for value in (y, *gradients)]
        if not all(finite):
            raise AssertionError(f"{frames} frames, {gating}: not finite")


def overhead(calls: int = 200) -> dict[str, float]:
    """Microseconds that the host needs for a call of the block, at a size that the device does in no time."""
    shape = replace(ALL_SHAPES["light"], batch=1)
    subject = Subject(shape, "bfloat16")
    result = {}
    for name, training in (("forward", False), ("training", True)):
        call = gpu_block.make(subject, "fused", training)
        call(subject.inputs[0])
        times = [gpu_block.host_seconds(lambda call=call: call(subject.inputs[0])) for _ in range(calls)]  # type: ignore[misc]
        result[f"{name} us"] = round(1e6 * statistics.median(times), 1)
    return result
