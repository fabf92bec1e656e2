"""Plots of how the block grows: ``python -m benchmarks.plots FILE``.

They show the rows of benchmarks.scaling and depend on nothing else: equal rows give equal bytes, as long as matplotlib
is the same.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.row_files import Row, read
from benchmarks.scaling import COMPARED, FIELDS, PASSES, SIZES, Fit, curve, exponents
from grjca import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 9.0  # inches
COLOURS = {"eager": "#D55E00", "fused": "#0072B2"}  # of Okabe and Ito's palette, made for the colour-blind
LINES = {"forward": "--", "training step": "-"}
MARKERS = {"eager": "o", "fused": "s"}
SHORT = {"forward": "forward", "training step": "training"}
NAMES = {
    "B": "batch B",
    "L": "sequence length L, frames",
    "width": "width $d_v$ ($d_a$ is half of it)",
    "T": "iterations T",
}
SYMBOLS = {"B": "B", "L": "L", "width": "d", "T": "T"}
GAP = 0.085  # between labels, as a share of the height of a panel
SETTINGS = {"svg.hashsalt": "grjca", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9}
"""What would make the files differ: random ids, and fonts that are not matplotlib's own."""

Series = tuple[str, str]
"""Pass and implementation."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description="Draw the rows of a file.")
    parser.add_argument("rows", type=Path, help="of benchmarks.scaling, results/scaling/<device>.json")
    parser.add_argument("--out", type=Path, help="folder of the plots; without it, one beside the file")
    arguments = parser.parse_args(argv)
    rows = read(arguments.rows)
    if not rows:
        print(f"{arguments.rows}: expected rows of benchmarks.scaling, found none.", file=sys.stderr)
        return 1
    for path in write_all(rows, arguments.out or arguments.rows.with_suffix("")):
        print(f"wrote {path}")
    return 0


def write_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """scaling.svg and memory.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in FIGURES.items():
        save(draw, rows, path := folder / f"{name}.svg")
        paths.append(path)
    return paths


def save(draw: Callable[[Sequence[Row]], Figure], rows: Sequence[Row], path: Path) -> None:
    """In the format that the name of ``path`` ends with; as SVG without a date, so that equal rows give equal bytes."""
    import matplotlib

    kind = path.suffix[1:]
    metadata = {"Date": None, "Creator": None} if kind == "svg" else None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update(SETTINGS)
        figure = draw(rows)
        files.write(path, lambda partial: figure.savefig(partial, format=kind, dpi=120, metadata=metadata))


def scaling(rows: Sequence[Row]) -> Figure:
    """Time against size along every axis: bands from p20 to p80, exponents of the upper half in the labels."""
    figure, grid = _figure(2, 2, 7.0)
    fits = exponents(rows)
    for axes, axis in zip(grid.flat, SIZES, strict=True):
        lines = {
            (what, name): points for what in PASSES for name in COMPARED if (points := curve(rows, axis, what, name))
        }
        for series, points in lines.items():
            _line(axes, axis, series, points)
            low, high = ([value for _, value in curve(rows, axis, *series, f"ms_{p}")] for p in ("p20", "p80"))
            axes.fill_between([size for size, _ in points], low, high, color=COLOURS[series[1]], alpha=0.2, lw=0)
        labels = {
            (what, name): _label(axis, f"{name} {SHORT[what]}", fits.get((axis, what, name))) for what, name in lines
        }
        _finish(axes, axis, lines, labels, _absent(rows, axis, PASSES))
        axes.set_ylabel("ms, median")
    handles = [_sample(color=COLOURS[name], marker=MARKERS[name], ms=4) for name in COMPARED]
    handles += [_sample(color="#555555", ls=LINES[what]) for what in PASSES]
    figure.legend(handles, [*COMPARED, *PASSES], loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(_where(rows), fontsize=8, color="#555555")
    return figure


def memory(rows: Sequence[Row]) -> Figure:
    """What autograd saves for the backward, against B and L."""
    figure, grid = _figure(1, 2, 3.9)
    fits = exponents(rows, "saved_bytes")
    for axes, axis in zip(grid.flat, ("B", "L"), strict=True):
        what, lines, labels = "training step", {}, {}
        for name in COMPARED:
            if points := curve(rows, axis, what, name, "saved_bytes"):
                lines[what, name] = [(size, value / 1e6) for size, value in points]
                labels[what, name] = _label(axis, name, fits.get((axis, what, name)))
                _line(axes, axis, (what, name), lines[what, name])
        _finish(axes, axis, lines, labels, _absent(rows, axis, [what]))
        axes.set_ylabel("MB saved for the backward")
    figure.suptitle(_where(rows), fontsize=8, color="#555555")
    return figure


FIGURES: dict[str, Callable[[Sequence[Row]], Any]] = {"scaling": scaling, "memory": memory}


def _line(axes: Any, axis: str, series: Series, points: Sequence[tuple[int, float]]) -> None:
    what, name = series
    style = {"color": COLOURS[name], "ls": LINES[what], "marker": MARKERS[name], "ms": 3.5, "lw": 1.5}
    (line,) = axes.plot(*zip(*points, strict=True), **style)
    line.set_gid(f"{axis}, {what}, {name}")  # the id in the SVG


def _finish(
    axes: Any,
    axis: str,
    lines: dict[Series, list[tuple[int, float]]],
    labels: dict[Series, str],
    absent: Sequence[str],
) -> None:
    """Scales, ticks at the sizes, and labels to the right, where the lines end."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set(xscale="log", yscale="log", xlabel=NAMES[axis])
    sizes = ticks(sorted({size for points in lines.values() for size, _ in points}))
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    edge = max((points[-1][0] for points in lines.values()), default=1)
    bottom, top = (math.log(limit) for limit in axes.get_ylim())
    ends = {series: (math.log(ahead(points, edge)) - bottom) / (top - bottom) for series, points in lines.items()}
    for series, height in spread(ends, GAP if axes.get_gridspec().nrows > 1 else 0.7 * GAP).items():
        place = {"transform": axes.transAxes, "va": "center", "ha": "left", "clip_on": False}
        axes.text(1.02, height, labels[series], color=COLOURS[series[1]], fontsize=8, **place)
    if absent:
        style = {"transform": axes.transAxes, "fontsize": 6.5, "color": "#555555", "va": "top"}
        axes.text(0.02, 0.99, "not run: " + "\n".join(absent), **style)


def ahead(points: Sequence[tuple[int, float]], size: int) -> float:
    """Where a line would be at ``size`` if it went on straight: one that ends early still has its label in order."""
    (x0, y0), (x1, y1) = points[-2:] if len(points) > 1 else (points[0], points[0])
    return y1 if x1 in (x0, size) else y1 * (size / x1) ** (math.log(y1 / y0) / math.log(x1 / x0))


def spread(heights: dict[Series, float], gap: float) -> dict[Series, float]:
    """Shares of a panel's height, in the same order, moved apart where two are nearer than ``gap``."""
    places = {series: min(height, 1.0) for series, height in sorted(heights.items(), key=lambda item: item[1])}
    names = list(places)
    for _ in range(100):
        for below, above in itertools.pairwise(names):
            lack = gap - (places[above] - places[below])
            if lack > 1e-9:
                places[below] -= lack / 2
                places[above] += lack / 2
    return places


def _label(axis: str, name: str, of: tuple[Fit, Fit] | None) -> str:
    """The exponent as superscript, where there is one."""
    return name if of is None else f"{name}  ${SYMBOLS[axis]}^{{{of[0].exponent:.2f}}}$"


def ticks(sizes: Sequence[int]) -> list[int]:
    """All of them, or, over more than five octaves, every second octave: their names would overlap."""
    if not sizes or sizes[-1] <= 32 * sizes[0]:
        return list(sizes)
    octaves = [sizes[0] * 4**k for k in range(sizes[-1].bit_length())]
    return [size for size in octaves if size in sizes]


def _absent(rows: Sequence[Row], axis: str, passes: Any) -> list[str]:
    """The points without a time, and whether they were left out or failed."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if axis in row["axes"] and row["pass"] in passes and "ms" not in row:
            why = "" if "left_out" in row else " (failed)"
            found.setdefault(f"{row['implementation']} {SHORT[row['pass']]}", []).append(f"{row[FIELDS[axis]]}{why}")
    return [f"{name} at {', '.join(sizes)}" for name, sizes in found.items()]


def _where(rows: Sequence[Row]) -> str:
    """What was measured, on what."""
    row = rows[0]
    base = next((row for row in rows if len(row["axes"]) == len(SIZES)), row)
    names = {"B": "B", "L": "L", "d_v": "$d_v$", "d_a": "$d_a$", "T": "T"}
    shape = ", ".join(f"{letter} = {base[name]}" for name, letter in names.items())
    device = str(row["device"]).replace("$", r"\$")
    return (
        f"One axis at a time around {shape}; {base['gating']} gates, dropout {row['dropout']}\n"
        f"{device}, {row['threads']} threads, {row['dtype']}, torch {row['torch']}, commit {row['commit']}"
    )


def _sample(**style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], lw=1.5, **style)


def _figure(rows: int, columns: int, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06, hspace=0.06)  # type: ignore[union-attr]
    return figure, figure.subplots(rows, columns, squeeze=False)


if __name__ == "__main__":
    sys.exit(main())
