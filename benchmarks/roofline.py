"""How near the kernels come to what this processor can do at best: ``python -m benchmarks.roofline``.

First the ceilings, with the threads of the other benchmarks: memory by a large copy, matrices by the fastest large
product or by one tile that caches hold, tanh by the fastest loop over a vector in the cache. Then, for every shape, how
long each resource alone must take for a forward and for a training step, and how long eager and fused did.

A ceiling is what some program reached. Another one may be faster, which shows as more than 100 % of the bound.

With ``--phases [SHAPE ...]`` it prints instead how long each phase of the native kernels takes, and keeps nothing.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import phases
from benchmarks.cases import IMPLEMENTATIONS, SCORES, THREADS, Problem, flop, provenance, tanhs
from benchmarks.gate import check_forward, check_training
from benchmarks.memory import ready
from benchmarks.row_files import ROOT, Row, file_of, is_known, keep, read, remove
from benchmarks.whole_step import commits, percentiles, rounded, source
from grjca import environment, files
from grjca.measure import SHAPES, Shape, alternate
from grjca_kernels import GatedRJCAFused, cpu
from tolerances import check_draws, largest

RESULTS = ROOT / "benchmarks" / "results" / "roofline"
COMPARED = ("eager", "fused")
PASSES = {"forward": False, "training step": True}
SECONDS = 3.0  # of measuring, for each ceiling and each implementation of a shape
FEWEST, MOST = 5, 200
COPIED = 1 << 29  # bytes, many times the largest cache
SIZES = (1024, 2048, 3072)  # of square matrices
VALUES = tuple(1 << k for k in range(13, 18))  # of tanh per thread: 32 KiB to 512 KiB
TERMS = (64, 128, 256)  # of the sums of a tile
RESOURCES = {"memory": "GB/s", "matrix": "GFLOP/s", "tanh": "G/s"}

LOOP = """
#include "cpu/matrix.h"
#include "cpu/tanh.h"
using namespace grjca::GRJCA_ISA;
extern "C" int lanes() { return kLanes<float>; }
extern "C" void values(const float* x, float* y, int64_t count, int64_t repeats) {
  for (; repeats; --repeats) {
    for (int64_t i = 0; i < count; i += kLanes<float>) store(y + i, tanh(load(x + i)));
    asm volatile("" ::: "memory");  // or one of the repeats would do for all
  }
}
extern "C" int rows() { return kTileRows; }
extern "C" int columns() { return kPanel<float>; }
extern "C" void one_tile(const float* a, const float* b, float* y, int64_t terms, int64_t repeats) {
  const float* row[kTileRows];
  for (int r = 0; r < kTileRows; ++r) row[r] = a + r * terms;
  for (; repeats; --repeats) {
    Vector<float> acc[kTileRows][2] = {};
    multiply<float, 2, 1>(acc, row, b, terms);
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < 2; ++v) store(y + r * kPanel<float> + v * kLanes<float>, acc[r][v]);
    asm volatile("" ::: "memory");
  }
}
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description="Measure against ceilings.")
    about = "print the time of each phase of the native kernels; by default for all of " + ", ".join(SHAPES)
    parser.add_argument("--phases", nargs="*", choices=list(SHAPES), metavar="SHAPE", help=about)
    asked = parser.parse_args(argv).phases
    torch.set_num_threads(THREADS)
    path, code = file_of(RESULTS, provenance()), 0
    if asked is not None:
        rates = [row["GFLOP/s"] for row in read(path) if row["row"].startswith("ceiling matrix")]
        print(phases.table({name: SHAPES[name] for name in asked or SHAPES}, max(rates, default=None)))
        return 0
    for name, measure in CEILINGS.items():
        place = {"row": f"ceiling {name}", "dtype": "float32", "settings": {"seconds": SECONDS}, "source": source()}
        if is_known(read(path), place):
            continue
        try:
            measured = measure()
        except (AssertionError, OSError, subprocess.CalledProcessError) as error:
            remove(path, place["row"])
            print(f"{place['row']}: not measured. {error}", file=sys.stderr)
            code |= isinstance(error, AssertionError)
        else:
            keep(path, {**place, **measured, **provenance()})
    ceilings = Ceilings.of(read(path))
    for what in PASSES:
        for name in SHAPES:
            code |= measure_shape(path, name, what, ceilings)
    if rows := read(path):
        print(table(rows))
        if any("bounds_ms" in row for row in rows):
            plot(rows, path.with_suffix(".svg"))
    return code


# ---- ceilings


@dataclass(frozen=True)
class Ceilings:
    """What the processor can do at best, and what it was measured by."""

    memory: float  # GB/s, read and written
    matrix: float  # GFLOP/s
    tanh: float  # thousands of millions of values per second
    by: tuple[str, ...] = ()

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Ceilings:
        """The fastest of each kind among rows of ceilings."""
        best = {}
        for resource, unit in RESOURCES.items():
            found = [row for row in rows if row["row"].startswith(f"ceiling {resource}")]
            if not found:
                raise SystemExit(f"Expected a ceiling of {resource}, got none: what is above says why; run it again.")
            best[resource] = max(found, key=lambda row, unit=unit: row[unit])
        rates = {resource: best[resource][unit] for resource, unit in RESOURCES.items()}
        return cls(**rates, by=tuple(row["row"].removeprefix("ceiling ") for row in best.values()))


def copy() -> Row:
    """A copy that no cache holds; bytes that are read and bytes that are written count, as the caller sees them."""
    a = torch.arange(COPIED // 4, dtype=torch.float32)
    b = torch.zeros_like(a)
    times = timed(lambda: b.copy_(a))
    if not torch.equal(a, b):
        raise AssertionError("A copy differs from its original.")
    return {"bytes": 2 * COPIED, **_rate("GB/s", 2 * COPIED, times)}


def mm() -> Row:
    """torch.mm, at the best of several sizes."""
    return best("GFLOP/s", (_product(size, lambda a, b, out: lambda: torch.mm(a, b, out=out)) for size in SIZES))


def convolution() -> Row:
    """The same product as a convolution by 1 x 1: oneDNN computes that, and may know the processor better."""

    def prepare(a: Tensor, b: Tensor, out: Tensor) -> Callable[[], Tensor]:
        size, pixels = len(a), (len(a) // 32, 32)
        image, kernel = b.reshape(1, size, *pixels), a.reshape(size, size, 1, 1)
        return lambda: F.conv2d(image, kernel).reshape(size, size)

    return best("GFLOP/s", (_product(size, prepare) for size in SIZES))


def one_tile() -> Row:
    """The inner loop of csrc/cpu/matrix.h on one tile per thread, whose operands stay next to the core: nothing but
    multiplying and adding."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(THREADS) as pool:
        native = _compile(LOOP, Path(folder))
        rows, columns = native.rows(), native.columns()

        def at(terms: int) -> Row:
            a, b = torch.randn(THREADS, rows, terms), torch.randn(THREADS, terms, columns)
            y = torch.empty(THREADS, rows, columns)

            def run(repeats: int) -> None:
                _on_every_core(pool, native.one_tile, (a, b, y), terms, repeats)

            run(1)
            check_draws(f"a tile of {terms} terms", y, a.double() @ b.double(), [a @ b], largest)
            flop = 2 * rows * columns * terms
            repeats = (1 << 31) // flop
            return {
                "size": f"{rows} x {columns} x {terms}",
                "instruction_set": cpu.instruction_sets()[0],
                **_rate("GFLOP/s", repeats * flop * THREADS, timed(lambda: run(repeats))),
            }

        return best("GFLOP/s", map(at, TERMS))


def torch_tanh() -> Row:
    """torch.tanh on a vector that the caches of the cores hold, at the best of several sizes."""

    def at(values: int) -> Row:
        x = SCORES * torch.randn(values * THREADS)
        y = torch.empty_like(x)
        _check_tanh(torch.tanh(x, out=y), x)
        repeats = max(1, (1 << 20) // values)
        times = timed(lambda: [torch.tanh(x, out=y) for _ in range(repeats)])
        return {"size": values * THREADS, **_rate("G/s", repeats * values * THREADS, times)}

    return best("G/s", map(at, VALUES))


def kernel_tanh() -> Row:
    """csrc/cpu/tanh.h, as the kernels use it, in a loop of its own over a vector per thread that its core holds."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(THREADS) as pool:
        native = _compile(LOOP, Path(folder))

        def at(values: int) -> Row:
            x = SCORES * torch.randn(THREADS, values)
            y = torch.empty_like(x)

            def run(repeats: int) -> None:
                _on_every_core(pool, native.values, (x, y), values, repeats)

            run(1)
            _check_tanh(y, x)
            repeats = max(1, (1 << 25) // values)
            return {
                "size": values * THREADS,
                "instruction_set": cpu.instruction_sets()[0],
                **_rate("G/s", repeats * values * THREADS, timed(lambda: run(repeats))),
            }

        return best("G/s", map(at, VALUES))


CEILINGS: dict[str, Callable[[], Row]] = {
    "memory, torch copy_": copy,
    "matrix, torch.mm": mm,
    "matrix, 1x1 convolution": convolution,
    "matrix, csrc/cpu/matrix.h": one_tile,
    "tanh, torch.tanh": torch_tanh,
    "tanh, csrc/cpu/tanh.h": kernel_tanh,
}


def best(unit: str, rows: Iterator[Row]) -> Row:
    """The fastest of these."""
    return max(rows, key=lambda row: row[unit])


def timed(call: Callable[[], object]) -> list[float]:
    """Milliseconds of each call, after one to warm up."""
    call()
    times: list[float] = []
    deadline = time.perf_counter() + SECONDS / max(len(SIZES), len(VALUES))
    while len(times) < FEWEST or (time.perf_counter() < deadline and len(times) < MOST):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _product(size: int, prepare: Callable[[Tensor, Tensor, Tensor], Callable[[], Tensor]]) -> Row:
    a, b, out = (torch.randn(size, size) for _ in range(3))
    with torch.no_grad():
        call = prepare(a, b, out)
        truth = a[:8].double() @ b.double()
        check_draws(f"a product of size {size}", call()[:8], truth, [a[:8] @ b], largest)
        return {"size": size, **_rate("GFLOP/s", 2 * size**3, timed(call))}


def _rate(unit: str, work: int, times: Sequence[float]) -> Row:
    """Thousands of millions per second, of the median."""
    ms = percentiles(times)
    return {"ms": ms, "rounds": len(times), unit: rounded(work / ms["p50"] / 1e6)}


def _check_tanh(y: Tensor, x: Tensor) -> None:
    check_draws("tanh", y, x.double().tanh(), [x.tanh()], largest)


def _on_every_core(
    pool: ThreadPoolExecutor, function: Callable[..., None], tensors: Sequence[Tensor], *sizes: int
) -> None:
    """A native function of pointers and sizes, on the first dimension of the tensors, without Python's lock."""
    integers = [ctypes.c_int64(size) for size in sizes]
    pointers = [[ctypes.c_void_p(tensor[i].data_ptr()) for tensor in tensors] for i in range(THREADS)]
    for call in [pool.submit(function, *row, *integers) for row in pointers]:
        call.result()


def _compile(text: str, folder: Path) -> ctypes.CDLL:
    """``text`` as a library, for the instruction set that the kernels choose here, with the flags of setup.py."""
    if not cpu.instruction_sets():
        raise OSError("The native kernels are not built.")
    name = cpu.instruction_sets()[0]
    flags = f"{_of_setup('FLAGS')} {_of_setup('INSTRUCTION_SETS')[name]} -fvisibility=default"
    command = [*shlex.split(os.environ.get("CXX") or "c++"), *shlex.split(flags), f"-DGRJCA_ISA={name}", "-shared"]
    library = folder / "loop.so"
    command += ["-I", str(ROOT / "csrc"), "-x", "c++", "-", "-o", str(library)]
    subprocess.run(command, input=text, text=True, check=True, stderr=subprocess.DEVNULL)
    return ctypes.CDLL(str(library))


def _of_setup(name: str) -> object:
    """A constant of setup.py, which builds when it is imported."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py: expected a constant {name}, got none; benchmarks/roofline.py compiles by it.")


# ---- shapes


def bounds(shape: Shape, what: str, ceilings: Ceilings) -> Row:
    """What a pass must do at least, and how long that takes each resource alone.

    Bytes are those of inputs, outputs and weights, once each, and in a training step of all their gradients. Its
    backward is two products for each one of the forward, and no tanh: what an implementation computes anew is not among
    what must be done. ``matrix + tanh`` is how long both take one after the other: on a processor they share the vector
    units, so it is nearer the truth than the greater of the two.
    """
    training = PASSES[what]
    frames = shape.batch * shape.length * (shape.dim_visual + shape.dim_audio)
    weights = sum(p.numel() for p in shape.block(GatedRJCAFused, device="meta").parameters())
    moved = 4 * (2 * frames + weights) * (2 if training else 1)
    work = {"bytes": moved, "flop": flop(shape) * (3 if training else 1), "tanhs": tanhs(shape)}
    rates = (ceilings.memory, ceilings.matrix, ceilings.tanh)
    ms = {name: amount / rate / 1e6 for name, amount, rate in zip(RESOURCES, work.values(), rates, strict=True)}
    binding = max(ms, key=ms.__getitem__)
    shown = {name: rounded(value) for name, value in ms.items()}
    return {
        **work,
        "bounds_ms": {**shown, "matrix + tanh": rounded(ms["matrix"] + ms["tanh"])},
        "binds": binding,
        "bound_ms": shown[binding],
    }


def measure_shape(path: Path, name: str, what: str, ceilings: Ceilings) -> int:
    """Rows of a shape and a pass, by eager and fused taking turns; 1 if one of them is wrong and so has none."""
    shape, code = SHAPES[name], 0
    problem, fixed = Problem(shape), bounds(shape, what, ceilings)
    fixed |= {"ceilings": {**asdict(ceilings), "by": list(ceilings.by)}, "settings": {"seconds": SECONDS}}
    fixed |= {"shape": name, "pass": what, "dtype": "float32", **asdict(shape), "source": source()}
    fixed["backend"] = environment.backend_used("auto", "cpu")
    places = {how: {"row": f"{name} B={shape.batch} {what} {how}", "implementation": how, **fixed} for how in COMPARED}
    if all(is_known(read(path), place) for place in places.values()):
        return 0
    calls = {}
    for how, place in places.items():
        check = check_training if PASSES[what] else check_forward
        try:
            check(IMPLEMENTATIONS[how](problem, dropout=0.0), problem)
            calls[how] = ready(problem, how, PASSES[what], problem.inputs)
        except AssertionError as failure:
            remove(path, place["row"])
            print(f"{place['row']}: no time. {failure}", file=sys.stderr)
            code = 1
    seconds = sum(sum(times) for times in alternate(calls, 1).values()) or 1.0
    for how, times in alternate(calls, min(max(int(SECONDS * len(calls) / seconds), FEWEST), MOST)).items():
        ms = percentiles([1e3 * value for value in times])
        row = {**places[how], "ms": ms, "rounds": len(times), "fraction": rounded(fixed["bound_ms"] / ms["p50"])}
        keep(path, {**row, **provenance()})
    return code


# ---- what is shown


def table(rows: Sequence[Row]) -> str:
    """Markdown: the ceilings, and where each shape stands."""
    first = rows[0]
    lines = [
        f"Ceilings of {first['device']}, {first['threads']} threads, float32, torch {first['torch']}, {commits(rows)}.",
        "",
        "| ceiling | rate | size |",
        "|---|--:|--:|",
    ]
    for row in rows:
        if row["row"].startswith("ceiling "):
            unit = next(unit for unit in RESOURCES.values() if unit in row)
            size = f"{row['bytes'] / 1e6:.0f} MB" if "bytes" in row else f"{row['size']}"
            lines.append(f"| {row['row'].removeprefix('ceiling ')} | {row[unit]:.3g} {unit} | {size} |")
    heads = ["shape", "pass", "implementation", "GFLOP", "G tanh", "MB", *(f"{name} ms" for name in RESOURCES), "binds"]
    heads += ["measured ms (p20 to p80)", "of the bound", "of matrix + tanh"]
    lines += ["", f"| {' | '.join(heads)} |", "|---|---|---|" + "--:|" * 6 + "---|" + "--:|" * 3]
    for row in rows:
        if "bounds_ms" in row:
            ms, of = row["ms"], row["bounds_ms"]
            cells = [f"{row['shape']}, B = {row['batch']}", row["pass"], row["implementation"]]
            cells += [f"{row[name] / unit:.3g}" for name, unit in (("flop", 1e9), ("tanhs", 1e9), ("bytes", 1e6))]
            cells += [f"{of[name]:.3g}" for name in RESOURCES] + [row["binds"]]
            cells += [f"{ms['p50']:.3g} ({ms['p20']:.3g} to {ms['p80']:.3g})", f"{100 * row['fraction']:.0f} %"]
            cells += [f"{100 * of['matrix + tanh'] / ms['p50']:.0f} %"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


COLOURS = {"eager": "#D55E00", "fused": "#0072B2"}  # of Okabe and Ito's palette, made for the colour-blind
MARKS = {"eager": "s", "fused": "o"}
LIMIT = "#666666"
FAR = 10  # times the roof: what tanh allows beyond that is not drawn


def plot(rows: Sequence[Row], path: Path) -> None:
    """A roofline as SVG: FLOP per byte against GFLOP/s, what the ceilings allow, and a point for every time.

    Equal rows give equal bytes.
    """
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "grjca", "font.size": 10}):
        figure = _figure([row for row in rows if "bounds_ms" in row])
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, lambda partial: figure.savefig(partial, format="svg", metadata={"Date": None}))


def _figure(rows: Sequence[Row]) -> Any:
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("rows: expected at least one time of a shape, got none; run python -m benchmarks.roofline.")
    passes = {what: of for what in PASSES if (of := [row for row in rows if row["pass"] == what])}
    figure = Figure((10.0, 5.0 * len(passes)), layout="constrained")
    for axes, (what, of) in zip(figure.subplots(len(passes), squeeze=False).flat, passes.items(), strict=True):
        _panel(axes, of)
        about = f"{what}, float32: {of[0]['device']}, {of[0]['threads']} threads"
        axes.set_title(about.replace("$", r"\$"), loc="left")
    return figure


def _panel(axes: Any, rows: Sequence[Row]) -> None:
    rates = rows[0]["ceilings"]
    points = [(_intensity(row), row["flop"] / row["ms"]["p50"] / 1e6, row) for row in rows]
    limits = {row["shape"]: (_intensity(row), row["flop"] / row["bounds_ms"]["tanh"] / 1e6) for row in rows}
    limits = {shape: (x, y) for shape, (x, y) in limits.items() if y < FAR * rates["matrix"]}
    ridge = rates["matrix"] / rates["memory"]
    x = (min(ridge / 4, *(x for x, _, _ in points)) / 2, 2 * max(ridge, *(x for x, _, _ in points)))
    heights = [rates["matrix"], *(y for _, y, _ in points), *(y for _, y in limits.values())]
    y = (min(*heights, x[0] * rates["memory"]) / 1.5, 1.6 * max(heights))

    axes.plot([x[0], ridge, x[1]], [x[0] * rates["memory"], *2 * [rates["matrix"]]], color="#000000", lw=1.5)
    about = {"xycoords": "data", "textcoords": "offset points"}
    by_memory = f"memory, {rates['memory']:.3g} GB/s"
    axes.annotate(by_memory, ((x[0] * ridge) ** 0.5, (x[0] * ridge) ** 0.5 * rates["memory"]), (8, -12), **about)
    by_matrix = f"matrix, {rates['matrix']:.3g} GFLOP/s"
    axes.annotate(by_matrix, (ridge, rates["matrix"]), (0, 6), ha="center", **about)
    labels = []
    for at, height, row in points:
        how = row["implementation"]
        axes.plot([at], [height], MARKS[how], color=COLOURS[how], ms=7, zorder=3)
        text = f"{row['shape']}, {how}: {height:.3g}, {100 * row['fraction']:.0f} % of the bound"
        labels.append((at, height, text, COLOURS[how]))
    for shape, (at, height) in limits.items():
        axes.plot([at], [height], "_", color=LIMIT, ms=16, mew=2, zorder=2)
        labels.append((at, height, f"{shape}, all that tanh allows: {height:.0f}", LIMIT))
    _label(axes, labels, x[1], y)
    axes.set(xscale="log", yscale="log", xlim=x, ylim=y, xlabel="FLOP per byte of inputs, outputs and weights")
    axes.set_ylabel("GFLOP/s")
    axes.grid(which="major", color="#E8E8E8", lw=0.6, zorder=0)


def _intensity(row: Row) -> float:
    return row["flop"] / row["bytes"]


def _label(axes: Any, labels: Sequence[tuple[float, float, str, str]], x: float, y: tuple[float, float]) -> None:
    """Text right of the axes, one line below the other, for points that lie too close for text beside them."""
    room = (y[1] / y[0]) ** (1 / 20)  # between two lines, as a factor on the logarithmic axis
    heights: list[float] = []
    ordered = sorted(labels, key=lambda label: label[1])
    for _, height, _, _ in ordered:
        heights.append(max(height, heights[-1] * room) if heights else height)
    over = max(1.0, heights[-1] * room / y[1])  # what was pushed out at the top
    for i in reversed(range(len(heights))):
        top = y[1] / room if i == len(heights) - 1 else heights[i + 1] / room
        heights[i] = min(heights[i], top) if over > 1 else heights[i]
    for (at, height, text, colour), place in zip(ordered, heights, strict=True):
        line = {"arrowstyle": "-", "color": colour, "lw": 0.6, "relpos": (0, 0.5), "shrinkA": 2, "shrinkB": 4}
        options = {"va": "center", "color": colour, "arrowprops": line, "annotation_clip": False}
        axes.annotate(text, (at, height), (x * 1.06, place), textcoords="data", **options)


if __name__ == "__main__":
    sys.exit(main())
