"""How the fusion block grows with B, L, its widths and T: ``python -m benchmarks.scaling``.

One axis varies at a time around ``abaw``. Of every point, eager and fused are timed in turns, weighed and counted,
behind a correctness gate, and its rows are written before the next point begins; run again, it goes on where it
stopped. torch.compile is left out: it would compile anew at each point, which takes longer than all else. Processors
only: GPUs have benchmarks.gpu.
"""

from __future__ import annotations

import argparse
import bisect
import importlib.util
import itertools
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import DROPOUT, IMPLEMENTATIONS, ROTATED, VARYING, Problem, provenance
from benchmarks.memory import OUT_OF_MEMORY, ProcessError, apart, available_memory, ready, sentence, weighed
from benchmarks.row_files import ROOT, Row, file_of, read, state_of, write
from grjca.measure import SHAPES, Shape, alternate, saved_bytes
from grjca.model.eager import GatedRJCAEager

RESULTS = ROOT / "benchmarks" / "results" / "scaling"


BASE = SHAPES["abaw"]
SIZES: dict[str, tuple[int, ...]] = {
    "B": tuple(2**k for k in range(10)),
    "L": tuple(2**k for k in range(4, 12)),
    "width": tuple(2**k for k in range(6, 11)),
    "T": tuple(range(1, 9)),
}
"""Most valuable axis first. The width is that of ``visual``; ``audio`` has half of it."""
FIELDS = {"B": "B", "L": "L", "width": "d_v", "T": "T"}
"""What a row calls the size along an axis."""
COMPARED = ("eager", "fused")
PASSES = {"forward": False, "training step": True}

SECONDS = 2.0  # of measuring per point and pass, unless FEWEST rounds take longer
FEWEST, MOST = 5, 50
OVERHEAD = 5  # calls of a point that are not rounds: weighing, check, warm-up, counts
LIMIT = 8.0  # seconds of a call; a point that is predicted to take longer is left out
CHECKED = 2  # samples whose gradients are compared with the reference
TRIED = 0.9  # share of the available memory that a point may be predicted to need
GROWTH = {"B": 1, "L": 2, "width": 2, "T": 1}  # exponents of a curve with one point so far
GIGABYTES = (8, 24, 80)
TIMED = (
    *(
        "grjca_kernels/**/*.py",
        "csrc/*.*",
        "csrc/cpu/*",
        "setup.py",
        "python/grjca/model/eager.py",
        "python/grjca/measure.py",
    ),
    *(
        "tests/support/tolerances.py",
        "benchmarks/baselines.py",
        "benchmarks/cases.py",
        "benchmarks/gate.py",
        "benchmarks/memory.py",
        "benchmarks/scaling.py",
    ),
)
"""What a row depends on; rows of other sources are measured anew."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description="How the block grows.")
    parser.add_argument("--minutes", type=float, default=20, help="no point begins that would end later (20)")
    parser.add_argument("--axis", nargs="+", choices=SIZES, default=list(SIZES), help="only these axes")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"longest call to measure, in seconds ({LIMIT:g})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows, the tables and the plots")
    arguments = parser.parse_args(argv)
    path = file_of(arguments.out, provenance())
    complete = run(path, arguments.axis, time.monotonic() + 60 * arguments.minutes, arguments.limit)
    rows = read(path)
    if not rows:
        print("benchmarks.scaling: no row yet; allow more --minutes.", file=sys.stderr)
        return 1
    print("\n" + exponents_table(rows), capacity_table(rows), sep="\n")
    draw(rows, path.with_suffix(""))
    print(f"\nwrote {path}" + ("" if complete else "; the time is up, run it again for what is missing"))
    return 1 if any("error" in row and not settled(row) for row in rows) else 0


def draw(rows: Sequence[Row], folder: Path) -> None:
    """The plots, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("benchmarks.scaling: no plots without matplotlib; pip install matplotlib has it.", file=sys.stderr)
        return
    from benchmarks import plots

    plots.write_all(rows, folder)


# ---- which points, in which order


def at(axis: str, size: int) -> Shape:
    """The base shape with another size along an axis."""
    changes = {
        "B": {"batch": size},
        "L": {"length": size},
        "width": {"dim_visual": size, "dim_audio": size // 2},
        "T": {"iterations": size},
    }
    return replace(BASE, **changes[axis])


def plan(axes: Sequence[str]) -> dict[Shape, list[str]]:
    """Shapes in the order in which they are measured, with the axes on whose curves they lie."""
    points = {BASE: list(SIZES)}
    for axis in SIZES:
        for size in SIZES[axis] if axis in axes else ():
            points.setdefault(at(axis, size), [axis])
    return points


# ---- rows


def described(shape: Shape) -> Row:
    return {
        "B": shape.batch,
        "L": shape.length,
        "d_v": shape.dim_visual,
        "d_a": shape.dim_audio,
        "T": shape.iterations,
        "gating": shape.gating,
        "normalize": shape.normalize,
    }


def shape_of(row: Row) -> Shape:
    return Shape(row["L"], row["d_v"], row["d_a"], row["T"], row["B"], row["gating"], row["normalize"])


def about() -> Row:
    """What all rows of one run share."""
    return {"dtype": "float32", "dropout": DROPOUT, **provenance(), "source": source()}


def source() -> str:
    """The state of what a time depends on. Not ledger.source: that is of what GPUs run."""
    return state_of(TIMED)


def key(row: Row) -> tuple[Any, ...]:
    return (shape_of(row), row["pass"], row["implementation"])


def settled(row: Row | None) -> bool:
    """Whether a rerun need not try again: a time is known, or that there is none for lack of memory."""
    return row is not None and ("ms" in row or row.get("error", "").startswith(OUT_OF_MEMORY))


class Book:
    """The rows of a file, which is rewritten as soon as one is added; those of other sources are dropped."""

    def __init__(self, path: Path) -> None:
        self.path, self.about = path, about()
        same = {name: value for name, value in self.about.items() if name not in VARYING}
        self.rows = {key(row): row for row in read(path) if same.items() <= row.items()}

    def get(self, shape: Shape, what: str, implementation: str) -> Row | None:
        return self.rows.get((shape, what, implementation))

    def add(self, shape: Shape, axes: Sequence[str], what: str, figures: Mapping[str, Row]) -> None:
        """The figures of each implementation at one point."""
        for implementation, of in figures.items():
            row = {"axes": list(axes), **described(shape), "pass": what, "implementation": implementation}
            self.rows[key(row)] = {**row, **self.about, **of}
        write(self.path, list(self.rows.values()))


def run(path: Path, axes: Sequence[str], deadline: float, limit: float = LIMIT) -> bool:
    """Measure what is missing in ``path``; whether all of it was reached before ``deadline``."""
    book = Book(path)
    for (shape, of), what in itertools.product(plan(axes).items(), PASSES):
        reasons = {name: reason_to_leave_out(book, shape, of, what, name, limit) for name in COMPARED}
        names = [name for name in COMPARED if not reasons[name]]
        if not all(settled(book.get(shape, what, name)) for name in names):
            if time.monotonic() + expected_seconds(book, shape, of, what, names) > deadline:
                return False
            book.add(shape, of, what, figures := measured(shape, names, PASSES[what]))
            show(shape, what, figures)
        left_out = {name: {"left_out": text} for name, text in reasons.items() if text}
        if any(not settled(book.get(shape, what, name)) for name in left_out):
            book.add(shape, of, what, left_out)
            show(shape, what, left_out)
    return True


def show(shape: Shape, what: str, figures: Mapping[str, Row]) -> None:
    place = " ".join(f"{name}={value}" for name, value in list(described(shape).items())[:5])
    for name, of in figures.items():
        text = f"{of['ms']:.4g} ms" if "ms" in of else of.get("error") or of["left_out"]
        print(f"{place} {what}, {name}: {text}", flush=True)


# ---- what is not run


def reason_to_leave_out(
    book: Book, shape: Shape, axes: Sequence[str], what: str, implementation: str, limit: float
) -> str | None:
    """In a sentence; None if the point is to be measured, or has been."""
    if settled(book.get(shape, what, implementation)):
        return None
    guess = [predicted(book, shape, axes, what, implementation, quantity) for quantity in ("ms", "peak_bytes")]
    if guess[0] is not None and guess[0] > 1e3 * limit:
        return f"left out: {guess[0] / 1e3:.3g} s a call predicted from smaller points, more than --limit {limit:g}."
    memory = available_memory()
    if guess[1] is not None and memory is not None and (need := guess[1] + held_bytes(shape)) > TRIED * memory:
        return f"left out: {need / 1e9:.3g} GB predicted from smaller points, {memory / 1e9:.3g} GB are available."
    return None


def predicted(
    book: Book, shape: Shape, axes: Sequence[str], what: str, implementation: str, quantity: str
) -> float | None:
    """From the last three smaller points of its curve; None if there is none."""
    axis = axes[0]
    size = described(shape)[FIELDS[axis]]
    smaller = [point for point in curve(book.rows.values(), axis, what, implementation, quantity) if point[0] < size]
    if not smaller:
        return None
    sizes, values = numpy.log(numpy.array(smaller[-3:], dtype=float)).T
    slope = max(float(numpy.polyfit(sizes, values, 1)[0]), 1.0) if len(smaller) > 1 else GROWTH[axis]
    return smaller[-1][1] * (size / smaller[-1][0]) ** slope


def expected_seconds(book: Book, shape: Shape, axes: Sequence[str], what: str, names: Sequence[str]) -> float:
    """Of measuring a point; what cannot be predicted counts as nothing."""
    calls = sum((predicted(book, shape, axes, what, name, "ms") or 0) / 1e3 for name in names)
    return max(SECONDS, FEWEST * calls) + OVERHEAD * calls


def held_bytes(shape: Shape) -> int:
    """Of all inputs that take turns, and of the gradient of the output."""
    return 4 * (ROTATED + 1) * shape.batch * shape.length * (shape.dim_visual + shape.dim_audio)


def measured(shape: Shape, names: Sequence[str], training: bool) -> dict[str, Row]:
    """The figures of each implementation, or its error: weighed each in a process, then timed together in another."""
    figures: dict[str, Row] = {}
    for name in names:
        try:
            figures[name] = apart(weighed, shape, name, training)
        except ProcessError as error:
            figures[name] = {"error": str(error)}
    alive = [name for name in names if "error" not in figures[name]]
    if not alive:
        return figures
    seconds = sum(figures[name].pop("seconds") for name in alive)
    rounds = min(max(int(SECONDS / seconds), FEWEST), MOST)
    try:
        times = apart(timed, shape, alive, training, rounds)
    except ProcessError as error:
        times = {name: {"error": str(error)} for name in alive}
    for name in alive:
        figures[name] = times[name] if "error" in times[name] else {**times[name], **figures[name]}
    return figures


# ---- one point, in a process of its own


@dataclass(frozen=True)
class Ends(Problem):
    """The first and the last sample of a problem, which the others do not touch: small enough for the reference."""

    whole: Problem = field(kw_only=True)

    @classmethod
    def of(cls, whole: Problem) -> Ends:
        return cls(replace(whole.shape, batch=min(whole.shape.batch, CHECKED)), whole=whole)

    @property
    def places(self) -> list[int]:
        return [0, self.whole.shape.batch - 1][: self.shape.batch]

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return self.whole.weights

    @cached_property
    def inputs(self) -> list[tuple[Tensor, Tensor]]:
        visual, audio = (x.detach()[self.places].requires_grad_() for x in self.whole.input(self.seed))
        return [(visual, audio)]

    @cached_property
    def gradient(self) -> Tensor:
        return self.whole.gradient[self.places]


def timed(shape: Shape, names: Sequence[str], training: bool, rounds: int) -> dict[str, Row]:
    """Times, taken in turns, and counts of those that pass the check; the error of those that do not."""
    problem, figures = Problem(shape), {}
    for name in names:
        try:
            figures[name] = {"checked": check(problem, name, training)}
        except AssertionError as error:
            figures[name] = {"error": sentence(error)}
    calls = {name: ready(problem, name, training, problem.inputs) for name in names if "error" not in figures[name]}
    for name, seconds in alternate(calls, rounds).items():
        p20, p50, p80 = (float(f"{1e3 * value:.4g}") for value in numpy.percentile(seconds, [20, 50, 80]))
        figures[name] |= {"rounds": rounds, "ms": p50, "ms_p20": p20, "ms_p80": p80, **counted(problem, name, training)}
        if training:
            block = IMPLEMENTATIONS[name](problem, dropout=DROPOUT).train()
            figures[name]["saved_bytes"] = saved_bytes(lambda b=block: b(*problem.inputs[0]), block.parameters())
    return figures


def check(problem: Problem, implementation: str, training: bool) -> str:
    """What was compared with the reference in float64; AssertionError if it is not as exact as the rule asks."""
    from benchmarks import gate

    make, ends = IMPLEMENTATIONS[implementation], Ends.of(problem)
    with torch.no_grad():  # without dropout, for whose masks there is no reference but at a small batch
        output = make(problem, dropout=0.0).train(training)(*problem.inputs[0])[ends.places]
    truth, draws = gate.expected(ends, 0.0)
    gate.check_draws("output", output, truth.output, [draw.output for draw in draws], gate.largest)
    said = "output of the first and the last sample of the batch"
    if training:
        gate.check_training(make(ends, dropout=0.0), ends)
        said += ", without dropout; all gradients of these two alone"
        if implementation == "fused":
            gate.check_training(make(ends, dropout=DROPOUT), ends, DROPOUT)
            said += ", without and with dropout"
    return said


# ---- counts


class Counter(TorchDispatchMode):
    """Operators that compute something, and the sizes of what they read and write; views and empty tensors are free."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read, written = list(tensors((args, kwargs))), list(tensors(result))
        name = str(func).split(".")[1]
        known = {x.untyped_storage().data_ptr() for x in read}
        view = not name.endswith("_") and all(x.untyped_storage().data_ptr() in known for x in written)
        if not view and not name.startswith(("empty", "new_empty")):
            self.operators += 1
            self.bytes += sum(x.numel() * x.element_size() for x in (*read, *written))
        return result


def tensors(value: Any) -> Iterator[Tensor]:
    """All of them, in lists of lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors(one)


def counted(problem: Problem, implementation: str, training: bool) -> Row:
    """Of a fused operator, ``bytes_moved`` is what goes in and comes out; what it moves inside, nobody sees."""
    block = IMPLEMENTATIONS[implementation](problem, dropout=DROPOUT).train(training)
    inputs = [x.detach().requires_grad_() for x in problem.inputs[0]]
    with torch.set_grad_enabled(training), FlopCounterMode(display=False) as flops, Counter() as counter:
        output = block(*inputs)
        if training:
            output.backward(problem.gradient)  # FlopCounterMode cannot follow torch.autograd.grad
    return {"operators": counter.operators, "bytes_moved": counter.bytes, "flop": flops.get_total_flops()}


# ---- curves and exponents; pure functions of rows


class Fit(NamedTuple):
    """A power law: its exponent, the standard error of that (None of two points), and what it was fitted to."""

    exponent: float
    error: float | None
    points: int
    low: int
    high: int

    def __str__(self) -> str:
        return f"{self.exponent:.2f}" if self.error is None else f"{self.exponent:.2f} ± {self.error:.2f}"


def curve(rows: Any, axis: str, what: str, implementation: str, quantity: str = "ms") -> list[tuple[int, float]]:
    """(size, value) by size, of the points that have been measured."""
    return sorted(
        (row[FIELDS[axis]], row[quantity])
        for row in rows
        if axis in row["axes"] and (row["pass"], row["implementation"]) == (what, implementation) and row.get(quantity)
    )


def fit(points: Sequence[tuple[int, float]]) -> Fit | None:
    """The slope of log(value) against log(size); None of fewer than two points."""
    if len(points) < 2:
        return None
    x, y = numpy.log(numpy.array(points, dtype=float)).T
    if len(points) == 2:
        slope, error = float(numpy.polyfit(x, y, 1)[0]), None
    else:
        slopes, covariance = numpy.polyfit(x, y, 1, cov=True)
        slope, error = float(slopes[0]), math.sqrt(max(float(covariance[0, 0]), 0.0))
    return Fit(slope, error, len(points), points[0][0], points[-1][0])


def upper_half(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """Of the sizes; the middle one belongs to it, and there are two at least."""
    return points[max(0, min(len(points) // 2, len(points) - 2)) :]


def curves(rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    """(axis, pass, implementation) of all that have a time."""
    for place in itertools.product(SIZES, PASSES, COMPARED):
        if curve(rows, *place):
            yield place


def exponents(rows: Sequence[Row], quantity: str = "ms") -> dict[tuple[str, str, str], tuple[Fit, Fit]]:
    """Of every curve with two points or more: over its upper half, and over all of it."""
    found = {}
    for place in curves(rows):
        points = curve(rows, *place, quantity)
        upper, whole = fit(upper_half(points)), fit(points)
        if upper and whole:
            found[place] = upper, whole
    return found


def exponents_table(rows: Sequence[Row]) -> str:
    """In Markdown: how time, and memory, grow along each axis."""
    of_time, of_saved, of_peak = (exponents(rows, quantity) for quantity in ("ms", "saved_bytes", "peak_bytes"))
    lines = [
        "| axis | pass | implementation | time: exponent, upper half | all of it | saved bytes, upper half "
        "| peak bytes, upper half | measured |",
        "|---|---|---|--:|--:|--:|--:|---|",
    ]
    for place, (upper, whole) in of_time.items():
        memory = [str(found[place][0]) if place in found else "" for found in (of_saved, of_peak)]
        cells = [*place, str(upper), str(whole), *memory, f"{whole.low} to {whole.high}, {whole.points} points"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# ---- what fits in a given memory; extrapolated


class Capacity(NamedTuple):
    """Bytes that autograd saves, ``start + slope * size`` along an axis, and how far off that is at worst."""

    axis: str
    base: Shape
    start: float
    slope: float
    residual: float  # relative

    def needed(self, size: int) -> float:
        """By a training step: what is saved, weights and their gradients, the output, its and the inputs' gradients.

        The weights are where L^2 comes from: W_k is [L, L], for each iteration and modality.
        """
        shape = replace(self.base, **{{"B": "batch", "L": "length"}[self.axis]: size})
        parameters = sum(parameter.numel() for parameter in shape.block(GatedRJCAEager, device="meta").parameters())
        frames = shape.batch * shape.length * (shape.dim_visual + shape.dim_audio)
        return self.start + self.slope * size + 4 * (2 * parameters + 3 * frames)

    def largest(self, gigabytes: float) -> int:
        """0 if not even 1 fits."""
        return bisect.bisect_right(range(1, 1 << 24), 1e9 * gigabytes, key=self.needed)


def capacity(rows: Sequence[Row], axis: str, implementation: str) -> Capacity | None:
    """From the saved bytes along B or L, in which every activation is linear; None of fewer than three points."""
    points = numpy.array(curve(rows, axis, "training step", implementation, "saved_bytes"), dtype=float)
    base = next((shape_of(row) for row in rows if len(row["axes"]) == len(SIZES)), None)
    if len(points) < 3 or base is None:
        return None
    sizes, saved = points.T
    slope, start = (float(value) for value in numpy.polyfit(sizes, saved, 1, w=1 / saved))
    return Capacity(axis, base, start, slope, float(numpy.abs((start + slope * sizes) / saved - 1).max()))


def capacity_table(rows: Sequence[Row], gigabytes: Sequence[int] = GIGABYTES) -> str:
    """In Markdown: the largest batch and the longest sequence that a training step has room for."""
    lines = [
        "Extrapolated from counted bytes, not run: what autograd saves, fitted linearly, plus float32 weights and "
        "their gradients, the output, and the gradients of output and inputs. An optimiser's state and the workspace "
        "within a call come on top.",
        "",
        f"| largest | implementation |{''.join(f' {size} GB |' for size in gigabytes)} fit is off by at most |",
        f"|---|---|{'--:|' * (len(gigabytes) + 1)}",
    ]
    for axis, implementation in itertools.product(("B", "L"), COMPARED):
        if model := capacity(rows, axis, implementation):
            cells = [axis, implementation, *(str(model.largest(size)) for size in gigabytes), f"{model.residual:.1%}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from benchmarks import scaling  # by its own name, under which other processes find its functions

    sys.exit(scaling.main())
