"""Times of the phases of the CPU kernels: ``python -m benchmarks.roofline --phases [SHAPE ...]``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cases import DROPOUT, Problem, where
from grjca.measure import Shape
from grjca_kernels import GatedRJCAFused, cpu, keeping
from grjca_kernels import problem as problems

SECONDS, FEWEST = 3.0, 3  # of measuring a shape in a dtype; rounds
WARM_UPS = 2
DTYPES = (torch.float32, torch.bfloat16)
HELD_FROM = 64  # kHeldFrom of csrc/cpu/backward_memory.h
GROUP = 256  # kGroup of csrc/cpu/workspace.h
TOGETHER = ("pack", "sum_weights")  # phases that all threads share in any case
HEAD = "| shape | dtype | pass | phase | ms | GFLOP | GFLOP/s | of the highest |\n|---|---|---|---|--:|--:|--:|--:|"
LEGEND = """These are passes of a training step with dropout, each in the round in which it took the median. Where each
thread takes samples of its own, a phase has the mean of the threads; what the total lacks is Python, and the time that
threads waited for each other. A multiply-add counts as two operations. The last column is a share of the highest matrix
rate that was reached just now in float32, {ceiling:.0f} GFLOP/s; for bfloat16 it is a share
of {bfloat16}."""


def flop(problem: problems.Problem) -> dict[str, dict[str, int]]:
    """Return the products by pass and phase, if every gradient is wanted, given what ``problem.keep`` keeps."""
    length, width, gated = problem.length, problem.width, problem.length * problem.width * sum(problem.gate_ways)
    scores, key = length * width**2, length**2 * width  # scores: K J, V C, U, and products as large
    joint, value = scores * problem.projected, length * sum(d_m**2 for d_m in problem.widths)

    def anew(bit: int) -> bool:
        return not problem.keep & bit

    attends, correlates = anew(keeping.HIDDEN), anew(keeping.CORRELATION)
    twice = correlates and not (attends and length >= HELD_FROM)  # K J, of which no tanh is held
    start, sizes = {"pack": 0, "load": 0}, {"project_joint": joint, "project_key": key, "project_value": value}
    bits = zip(sizes.items(), (keeping.JOINT, keeping.KEY, keeping.VALUE), strict=True)
    forward = {**start, **sizes, "attend": 2 * scores, "output": scores, "gate": 0}
    recomputed = {phase: size * anew(bit) for (phase, size), bit in bits} | {
        "attend": scores * attends * (1 + correlates)
    }
    backward = {**start, "gates_backward": 0, **recomputed}
    backward["output_backward"] = scores * (problem.released and anew(keeping.SIGNS))
    backward |= {"attended_backward": scores, "correlation_backward": scores * (4 + twice)}  # d C, d J, d V, d K
    backward |= {"value_backward": value, "key_backward": key, "joint_backward": joint}
    backward["sum_weights"] = joint + key + value + scores
    of_gates = {"gate": gated, "gates_backward": 2 * gated, "sum_weights": gated}

    def of_batch(phase: str, size: int) -> int:
        return 2 * problem.batch * (problem.iterations * size + of_gates.get(phase, 0))

    both = {"forward": forward, "backward": backward}
    return {name: {phase: of_batch(phase, size) for phase, size in of.items()} for name, of in both.items()}


def table(shapes: Mapping[str, Shape], ceiling: float) -> str:
    """Markdown; ``ceiling`` is in GFLOP/s."""
    lines = [f"{where()}.", "", HEAD]
    factors = {dtype: 2 if cpu.held(dtype) == 2 else 1 for dtype in DTYPES}  # products of pairs are twice as fast
    for name, shape in shapes.items():
        for dtype, factor in factors.items():
            lines += _rows(name, shape, dtype, factor * ceiling)
    doubled = "twice that, because its instruction takes two products for one" if max(factors.values()) > 1 else "that"
    return "\n".join([*lines, "", LEGEND.format(ceiling=ceiling, bfloat16=doubled)])


def _rows(title: str, shape: Shape, dtype: torch.dtype, ceiling: float) -> list[str]:
    lines, problem = [], described(shape, dtype)
    about, threads = (f"{title}, B = {shape.batch}", str(dtype).removeprefix("torch.")), cpu._threads(problem)
    for (name, counts), (wall, seconds) in zip(flop(problem).items(), measure(shape, dtype), strict=True):
        share = threads if of_own(problem, threads) else 1
        times = {phase: seconds[phase] / (1 if phase in TOGETHER else share) for phase in counts}
        rows = [(phase, times[phase], counts[phase]) for phase in counts]
        rows.append((f"total, of {1e3 * wall:.3g} ms that passed", sum(times.values()), sum(counts.values())))
        for phase, took, count in (row for row in rows if row[1]):  # what was kept is not computed again
            rate = count / took / 1e9
            percent = f"{100 * rate / ceiling:.0f} %" if rate else ""
            numbers = (f"{1e3 * took:.3g}", f"{count / 1e9:.3g}", f"{rate:.3g}" if rate else "", percent)
            lines.append(f"| {' | '.join((*about, name, phase, *numbers))} |")
    return lines


def described(shape: Shape, dtype: torch.dtype) -> problems.Problem:
    """Return the problem that a block of this shape passes to the kernels in training."""
    settings = (shape.iterations, shape.gating, "released", DROPOUT, 1.0, shape.normalize, False)
    problem = problems.Problem(shape.batch, shape.length, (shape.dim_visual, shape.dim_audio), *settings)
    return replace(problem, keep=keeping.choose(problem, "auto", dtype))


def of_own(problem: problems.Problem, threads: int) -> bool:
    """Return whether each thread takes samples of its own, as Split::plan() of csrc/cpu/workspace.h decides."""
    groups = -(-problem.batch // max(1, GROUP // problem.length))
    return groups >= 4 * threads or (groups > 0 and groups % threads == 0)


def measure(shape: Shape, dtype: torch.dtype) -> list[tuple[float, dict[str, float]]]:
    """Seconds of forward and backward, and of their phases, in the round in which the pass took the median."""
    problem, rounds = Problem(shape, dtype), []
    block = problem.block(GatedRJCAFused, dropout=DROPOUT, backend="cpu").train()
    features, incoming = problem.inputs[0], problem.gradient
    wanted, deadline = [*features, *block.parameters()], time.perf_counter() + SECONDS
    while len(rounds) < WARM_UPS + FEWEST or time.perf_counter() < deadline:
        output, *forward = _timed(block, *features)
        _, *backward = _timed(torch.autograd.grad, output, wanted, incoming)
        rounds.append((forward, backward))
    passes = (sorted(one, key=lambda measured: measured[0]) for one in zip(*rounds[WARM_UPS:], strict=True))
    return [(wall, seconds) for one in passes for wall, seconds in [one[len(one) // 2]]]


def _timed(call: Callable[..., Any], *given: Any) -> tuple[Any, float, dict[str, float]]:
    with cpu.phase_times() as times:
        start = time.perf_counter()
        result = call(*given)
        return result, time.perf_counter() - start, dict(times.seconds)
