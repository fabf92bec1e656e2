"""Publish the benchmarks: ``python -m benchmarks.report``.

It runs them, then those of whole_step, roofline and scaling that have not been run yet, keeps the rows of this machine
in ``results/``, and rewrites the tables of README.md between two markers.
``--check`` only fails where those tables are not the ones of the rows. Rows of GPUs, which ``benchmarks.gpu`` keeps in
``results/*.jsonl``, get tables too; there need not be any.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy

from benchmarks import ledger, roofline, row_files, scaling, whole_step
from benchmarks.row_files import ROOT, Row

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
MARKERS = "<!-- results -->", "<!-- /results -->"
COLUMNS = {"eager": "eager, released", "strong": "eager, strong", "compiled": "torch.compile", "fused": "fused"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Publish the benchmarks.")
    parser.add_argument(
        "json", nargs="?", type=Path, help="of pytest --benchmark-json; without it the benchmarks are run"
    )
    parser.add_argument("--check", action="store_true", help="only compare README.md with the rows that are kept")
    arguments = parser.parse_args(argv)
    if not arguments.check:
        path = store(rows(arguments.json) if arguments.json else measure(), RESULTS)
        print(f"wrote {path.relative_to(ROOT)}")
    if not arguments.check and not arguments.json:
        for part in (whole_step, roofline, scaling):
            part.main([])
    try:
        text = README.read_text()
        fresh = replaced(text, tables(RESULTS))
    except (OSError, ValueError) as error:
        print(f"README.md: {error}", file=sys.stderr)
        return 1
    if fresh == text:
        print("README.md is up to date")
    elif arguments.check:
        print("README.md is not the table of benchmarks/results; run python -m benchmarks.report", file=sys.stderr)
        return 1
    else:
        README.write_text(fresh)
        print("wrote README.md")
    return 0


def measure() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "benchmarks.json")
        command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", f"--benchmark-json={path}"]
        code = subprocess.run(command, cwd=ROOT).returncode
        if code:
            print("What failed its check has no time, and an empty cell in the table.", file=sys.stderr)
        if not path.exists() or not path.read_text():  # not one row
            raise SystemExit(code)
        return rows(path)


def rows(path: Path) -> list[Row]:
    """One flat row per case of a file that pytest-benchmark wrote.

    ``samples_ms`` are its times in the order in which they were taken, at most 50, evenly spaced: benchmarks.compare
    wants them.
    """
    result = []
    for case in json.loads(path.read_text())["benchmarks"]:
        times = numpy.array(case["stats"]["data"]) * 1e3
        p20, median, p80 = (float(f"{value:.4g}") for value in numpy.percentile(times, [20, 50, 80]))
        kept = times[numpy.linspace(0, len(times) - 1, min(len(times), 50)).round().astype(int)]
        samples = [float(f"{value:.4g}") for value in kept]
        measured = {"rounds": len(times), "ms": median, "ms_p20": p20, "ms_p80": p80, "samples_ms": samples}
        result.append({**case["extra_info"], **measured})
    return result


def store(rows: list[Row], folder: Path) -> Path:
    """Keep the rows of one machine."""
    path = row_files.file_of(folder, rows[0])
    row_files.write(path, rows)
    return path


def tables(folder: Path) -> str:
    """A table for every machine, first those of GPUs; then those of whole steps, ceilings and growth."""
    of_gpus = [gpu_table(ledger.current(ledger.read(path))) for path in sorted(folder.glob("*.jsonl"))]
    of_processors = [table(row_files.read(path)) for path in sorted(folder.glob("*.json"))]
    others = [text(path) for name, text in PARTS.items() for path in sorted((folder / name).glob("*.json"))]
    return "\n\n".join([*of_gpus, *of_processors, *others])


def growth(path: Path) -> str:
    """What benchmarks.scaling found on a machine."""
    rows = row_files.read(path)
    first, plots = rows[0], f"benchmarks/results/{path.parent.name}/{path.stem}"
    about = (
        f"Growth around abaw: {first['device']}, {first['threads']} threads, {first['dtype']}, torch {first['torch']}, "
        f"{whole_step.commits(rows)}. The exponent is the slope in the plots of [time]({plots}/scaling.svg) and "
        f"[memory]({plots}/memory.svg)."
    )
    return "\n\n".join([about, scaling.exponents_table(rows).strip(), scaling.capacity_table(rows).strip()])


PARTS: dict[str, Callable[[Path], str]] = {
    "whole_step": lambda path: whole_step.table(row_files.read(path)),
    "roofline": lambda path: roofline.table(row_files.read(path)),
    "scaling": growth,
}


def table(rows: list[Row]) -> str:
    """A line for every shape, dtype and pass, with what the fused block gains over the released formulation and over
    the best of the others."""
    first = rows[0]
    columns = [name for name in COLUMNS if any(row["implementation"] == name for row in rows)]
    lines = [
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}, commit {first['commit']}: "
        "median in milliseconds, and MB saved for the backward.",
        "",
        f"| shape | dtype | pass | {' | '.join(COLUMNS[name] for name in columns)} | against eager | against the best "
        "other | saved: eager | fused |",
        "|---|---|---|" + "--:|" * (len(columns) + 4),
    ]
    places = ("shape", "batch", "dtype", "pass")
    for place in dict.fromkeys(tuple(row[name] for name in places) for row in rows):
        cell = {row["implementation"]: row for row in rows if tuple(row[name] for name in places) == place}
        ms = {key: cell[key]["ms"] if key in cell else None for key in columns}
        others = [value for key, value in ms.items() if key != "fused" and value is not None]
        saved = [cell[key].get("saved_bytes") if key in cell else None for key in ("eager", "fused")]
        shape, batch, dtype, name = place
        cells = [f"{shape}, B = {batch}", dtype, name, *(_number(ms[key]) for key in columns)]
        cells += [_ratio(ms.get("eager"), ms.get("fused")), _ratio(min(others, default=None), ms.get("fused"))]
        lines.append(_line([*cells, *(_number(value and value / 1e6) for value in saved)]))
    return "\n".join(lines)


GPU_COLUMNS = {
    "eager": "eager",
    "eager-graph": "eager, graph",
    "compiled": "torch.compile",
    "fused": "Triton",
    "fused-graph": "Triton, graph",
    "cuda": "CUDA C++",
    "cuda-graph": "CUDA C++, graph",
}
GPU_RATIOS = {
    "Triton against eager": ("eager", "fused"),
    "CUDA C++ against eager": ("eager", "cuda"),
    "Triton against compile, graphs": ("compiled", "fused-graph"),
    "CUDA C++ against compile, graphs": ("compiled", "cuda-graph"),
}


def gpu_table(rows: list[Row]) -> str:
    """Times of every shape, pass and dtype on a GPU, then what became of the goals."""
    timed = [row for row in rows if row.get("kind") == "time"]
    if not timed:
        raise ValueError("a file of results/*.jsonl holds no time: commit it when it does.")
    first = timed[0]
    lines = [
        f"{first['device']}, driver {first['driver']}, torch {first['torch']}, Triton {first['triton']}, "
        f"commit {first['commit']}: median in milliseconds on the device; torch.compile is max-autotune, with CUDA "
        "graphs.",
        "",
        f"| shape | pass | dtype | {' | '.join([*GPU_COLUMNS.values(), *GPU_RATIOS])} |",
        "|---|---|---|" + "--:|" * (len(GPU_COLUMNS) + len(GPU_RATIOS)),
    ]
    places = ("shape", "batch", "pass", "dtype")
    for place in dict.fromkeys(tuple(row[name] for name in places) for row in timed):
        of_place = [row for row in timed if tuple(row[name] for name in places) == place]
        ms = dict.fromkeys(GPU_COLUMNS) | {row["implementation"]: row["device_ms"] for row in of_place}
        shape, batch, *others = place
        cells = [f"{shape}, B = {batch}", *others, *(_number(ms[name]) for name in GPU_COLUMNS)]
        cells += [_ratio(ms[base], ms[ours]) for base, ours in GPU_RATIOS.values()]
        lines.append(_line(cells))
    return "\n".join([*lines, "", *ledger.lines(ledger.verdicts(rows))])


def replaced(text: str, table: str) -> str:
    """``text`` with ``table`` between the markers."""
    start, stop = MARKERS
    if text.count(start) != 1 or text.count(stop) != 1 or text.index(start) > text.index(stop):
        raise ValueError(f"expected {start} and {stop} once each, in this order.")
    return f"{text.partition(start)[0]}{start}\n{table}\n{stop}{text.partition(stop)[2]}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.1f}x" if value and base else ""


if __name__ == "__main__":
    sys.exit(main())
