"""Publish the benchmarks: ``python -m benchmarks.report``.

It runs them, then host, then those of whole_step, roofline and scaling that have not been run yet, keeps the rows of
this machine in ``results/``, and rewrites what stands between two markers in README.md, docs/results.md and RESULTS.md.
``--render`` does the last alone, and ``--check`` only fails where that is not what the rows say. Rows of GPUs, which
``benchmarks.gpu`` keeps in ``results/*.jsonl``, get tables too; there need not be any.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy

from benchmarks import host, ledger, roofline, row_files, scaling, whole_step
from benchmarks.row_files import ROOT, Row

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
TIMES = ROOT / "docs" / "results.md"
DETAILS = ROOT / "benchmarks" / "RESULTS.md"
MARKERS = "<!-- results -->", "<!-- /results -->"
COLUMNS = {"eager": "eager, released", "strong": "eager, strong", "compiled": "torch.compile", "fused": "fused"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Publish the benchmarks.")
    parser.add_argument(
        "json", nargs="?", type=Path, help="of pytest --benchmark-json; without it the benchmarks are run"
    )
    parser.add_argument("--check", action="store_true", help="only compare these files with the rows that are kept")
    parser.add_argument("--render", action="store_true", help="only rewrite these files from the rows that are kept")
    arguments = parser.parse_args(argv)
    only_text = arguments.check or arguments.render
    if not only_text:
        path = store(rows(arguments.json) if arguments.json else measure(), RESULTS)
        print(f"wrote {path.relative_to(ROOT)}")
    if not only_text and not arguments.json:
        for part in (host, whole_step, roofline, scaling):
            part.main([])
    pages = ((README, headline), (TIMES, summary), (DETAILS, details))
    return max(publish(path, text_of, arguments.check) for path, text_of in pages)


def publish(path: Path, text_of: Callable[[Path], str], check: bool) -> int:
    """Bring what stands between the markers of ``path`` up to date, or only say whether it is; 1 where it is not."""
    name = path.relative_to(ROOT)
    try:
        text = path.read_text()
        fresh = replaced(text, text_of(RESULTS))
    except (OSError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    if fresh == text:
        print(f"{name} is up to date")
    elif check:
        print(f"{name} does not show benchmarks/results; run python -m benchmarks.report", file=sys.stderr)
        return 1
    else:
        path.write_text(fresh)
        print(f"wrote {name}")
    return 0


def measure() -> list[Row]:
    import pytest  # here, because tables are made without it

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "benchmarks.json")
        # In this process: one of its own would go on when this is killed, and spoil whatever is measured next.
        place = [f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}", str(ROOT / "benchmarks")]
        code = pytest.main([*place, "--benchmark-only", f"--benchmark-json={path}"])
        if code:
            print("What failed its check has no time, and an empty cell in the table.", file=sys.stderr)
        if not path.exists() or not path.read_text():  # not one row
            raise SystemExit(code)
        return rows(path)


def rows(path: Path) -> list[Row]:
    """One flat row per case of a file that pytest-benchmark wrote, and one for the forward within a training step."""
    result = []
    for case in json.loads(path.read_text())["benchmarks"]:
        about = case["extra_info"]
        forwards = about.pop("forward_seconds", None)
        if forwards:
            of_step = {name: value for name, value in about.items() if name not in WEIGHED}
            result.append({**of_step, "pass": "training forward", **statistics(forwards)})
        result.append({**about, **statistics(case["stats"]["data"])})
    return result


def statistics(seconds: list[float]) -> Row:
    """Milliseconds. ``samples_ms``, which benchmarks.compare wants, are at most 50 of them, evenly spaced, in order."""
    times = numpy.array(seconds) * 1e3
    p20, median, p80 = (float(f"{value:.4g}") for value in numpy.percentile(times, [20, 50, 80]))
    kept = times[numpy.linspace(0, len(times) - 1, min(len(times), 50)).round().astype(int)]
    samples = [float(f"{value:.4g}") for value in kept]
    return {"rounds": len(times), "ms": median, "ms_p20": p20, "ms_p80": p80, "samples_ms": samples}


def store(rows: list[Row], folder: Path) -> Path:
    """Keep the rows of one machine."""
    path = row_files.file_of(folder, rows[0])
    row_files.write(path, rows)
    return path


def headline(folder: Path) -> str:
    """A row for each shape in float32, on the machine that measured most: fused against eager PyTorch at its best."""
    rows = max(_files(folder), key=len)
    lines = [
        f"{_where(rows)}, float32: medians in milliseconds.",
        "",
        "| shape | forward: eager | fused | | training step: eager | fused | |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    places = _places(row for row in rows if row["dtype"] == "float32")
    for shape in dict.fromkeys(shape for shape, _, _ in places):
        cells = [shape]
        for which in ("forward", "training step"):
            of = places.get((shape, "float32", which), {})
            ms = {name: of[name]["ms"] for name in ("eager", "strong", "fused") if name in of}
            best = min((value for name, value in ms.items() if name != "fused"), default=None)
            cells += [_number(best), _number(ms.get("fused")), _ratio(best, ms.get("fused"))]
        lines.append(_line(cells))
    return "\n".join(lines)


def summary(folder: Path) -> str:
    """Times of every machine, first those of GPUs; then whole steps."""
    of_gpus = [gpu_table(ledger.current(ledger.read(path))) for path in sorted(folder.glob("*.jsonl"))]
    of_processors = [f"{_where(rows)}: median in milliseconds.\n\n{times(rows)}" for rows in _files(folder)]
    return "\n\n".join([*of_gpus, *of_processors, *map(whole_step.table, _files(folder / "whole_step"))])


def details(folder: Path) -> str:
    """Memory, the host's time, ceilings and growth, on every machine."""
    weighed = [f"{_where(rows)}, in MB.\n\n{memory(rows)}" for rows in _files(folder)]
    hosts = [*map(host.table, _files(folder / "host"))]
    ceilings = [ceilings_of(path) for path in sorted((folder / "roofline").glob("*.json"))]
    growths = [growth_of(path) for path in sorted((folder / "scaling").glob("*.json"))]
    parts = {"Memory": weighed, "Host": hosts, "Ceilings": ceilings, "Growth": growths}
    return "\n\n".join(text for title, texts in parts.items() if texts for text in [f"## {title}", *texts])


def ceilings_of(path: Path) -> str:
    """What benchmarks.roofline found on a machine."""
    plot = path.with_suffix(".svg").relative_to(DETAILS.parent)
    return f"{roofline.table(row_files.read(path))}\n\n![GFLOP per second of every shape under the roof]({plot})"


def growth_of(path: Path) -> str:
    """What benchmarks.scaling found on a machine."""
    rows = row_files.read(path)
    plots = path.with_suffix("").relative_to(DETAILS.parent)
    about = f"Around abaw, {rows[0]['dtype']}: {_where(rows)}. Exponents are slopes in these plots."
    images = [f"![{text} along B, L, width and T]({plots}/{name}.svg)" for name, text in PLOTS.items()]
    return "\n\n".join([about, *images, scaling.exponents_table(rows).strip(), scaling.capacity_table(rows).strip()])


PLOTS = {"scaling": "Time of a call", "memory": "Memory saved for the backward"}


def _files(folder: Path) -> list[list[Row]]:
    return [row_files.read(path) for path in sorted(folder.glob("*.json"))]


def _where(rows: list[Row]) -> str:
    first = rows[0]
    return f"{first['device']}, {first['threads']} threads, torch {first['torch']}, {whole_step.commits(rows)}"


def times(rows: list[Row]) -> str:
    """With what the fused block gains over the released formulation and over the best of the others."""
    columns = [name for name in COLUMNS if any(row["implementation"] == name for row in rows)]
    lines = [
        f"| shape | dtype | pass | {' | '.join(COLUMNS[name] for name in columns)} | against eager | against the best "
        "other |",
        "|---|---|---|" + "--:|" * (len(columns) + 2),
    ]
    for place, cell in _places(rows).items():
        ms = {name: cell[name]["ms"] if name in cell else None for name in columns}
        others = [value for name, value in ms.items() if name != "fused" and value is not None]
        ratios = [_ratio(base, ms.get("fused")) for base in (ms.get("eager"), min(others, default=None))]
        cells = [_number(value) + STRONG * _compiled_strong(cell.get(name)) for name, value in ms.items()]
        lines.append(_line([*place, *cells, *ratios]))
    if any(map(_compiled_strong, rows)):
        lines += ["", f"{STRONG}: of the strong formulation, which was the faster one to compile there."]
    return "\n".join(lines)


STRONG = "\\*"


def _compiled_strong(row: Row | None) -> bool:
    return row is not None and row.get("formulation") == "strong"


WEIGHED = {"saved_bytes": "saved for the backward", "peak_bytes": "peak of the call"}


def memory(rows: list[Row]) -> str:
    """What autograd keeps until the backward, and by how much a call lifts the peak of the resident set."""
    known = {(key, row["implementation"]) for key in WEIGHED for row in rows if row.get(key) is not None}
    columns = [(key, name) for key in WEIGHED for name in COLUMNS if (key, name) in known]
    heads = [f"{WEIGHED[key]}: {COLUMNS[name]}" for key, name in columns]
    lines = [f"| shape | dtype | pass | {' | '.join(heads)} |", "|---|---|---|" + "--:|" * len(columns)]
    for place, cell in _places(row for row in rows if any(row.get(key) for key in WEIGHED)).items():
        values = [cell[name].get(key) if name in cell else None for key, name in columns]
        lines.append(_line([*place, *(_number(value and value / 1e6) for value in values)]))
    return "\n".join(lines)


def _places(rows: Iterable[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """Shape, dtype and pass as a table shows them, with the row of each implementation."""
    places: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        place = f"{row['shape']}, B = {row['batch']}", row["dtype"], row["pass"]
        places.setdefault(place, {})[row["implementation"]] = row
    return places


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
