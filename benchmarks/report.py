"""Write the tables of README.md and docs/results.md: ``python -m benchmarks.report``.

They come from what pytest-benchmark has saved as ``results/<machine>.json``, and from ``results/<machine>-full.json``
of a run with ``--full``. ``--check`` only fails where a table is not what these files say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import RESULTS, ROOT
from grjca.measure import SHAPES

README = ROOT / "README.md"
PAGE = ROOT / "docs" / "results.md"
MARKERS = "<!-- results -->", "<!-- /results -->"
COLUMNS = {
    "eager": "eager, released",
    "strong": "eager, strong",
    "compiled": "torch.compile",
    "fused": "fused",
    "triton": "Triton",
    "cuda": "CUDA C++",
    "eager-graph": "eager, graph",
    "triton-graph": "Triton, graph",
    "cuda-graph": "CUDA C++, graph",
    "MultiheadAttention": "MultiheadAttention",
}
OURS = ("fused", "triton", "cuda")
MEMORY = {"saved_bytes": "saved", "peak_bytes": "peak"}
HEADLINE_PASSES = ("forward", "training step")
NOTHING = "Not measured at this commit."
Place = tuple[str, str, str]  # shape, dtype and pass


@dataclass(frozen=True)
class Run:
    """One file: where it was measured, and its rows by place and implementation."""

    where: str
    places: dict[Place, dict[str, dict[str, Any]]]

    @classmethod
    def read(cls, path: Path) -> Run:
        found = json.loads(path.read_text())
        about, commit = found["machine_info"], found["commit_info"]
        dirty = ", with changes" if commit.get("dirty") else ""
        where = (
            f"{about['device']}, {about['threads']} threads, torch {about['torch']}, commit {commit['id'][:7]}{dirty}"
        )
        places: dict[Place, dict[str, dict[str, Any]]] = {}
        for case in found["benchmarks"]:
            row = dict(case["extra_info"])
            if "peak_bytes" not in row:  # such a row has the time of a process
                row["ms"] = row.get("device_ms", 1e3 * case["stats"]["median"])
            here = places.setdefault((row["shape"], row["dtype"], row["pass"]), {})
            here.setdefault(row["implementation"], {}).update(row)
        return cls(where, places)

    def rows(self, shape: str, pass_name: str) -> dict[str, dict[str, Any]]:
        """The rows of one of measure.SHAPES in float32, by implementation."""
        is_one = re.fullmatch(rf"({'|'.join(SHAPES)}), B = \d+", shape)
        return self.places.get((shape, "float32", pass_name), {}) if is_one else {}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Write tables of what is saved.")
    parser.add_argument("--check", action="store_true", help="only compare the tables with the files")
    check = parser.parse_args(argv).check
    try:
        runs = [Run.read(path) for path in sorted(RESULTS.glob("*.json"))]
        return max(publish(path, table, check) for path, table in ((README, headline(runs)), (PAGE, tables(runs))))
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 1


def publish(path: Path, table: str, check: bool) -> int:
    """Bring what stands between the markers of ``path`` up to date, or only say whether it is; 1 where it is not."""
    text, (start, stop) = path.read_text(), MARKERS
    if text.count(start) != 1 or text.count(stop) != 1 or text.index(start) > text.index(stop):
        raise ValueError(f"{path}: expected {start} and {stop} once each, in this order.")
    fresh = f"{text.partition(start)[0]}{start}\n{table}\n{stop}{text.partition(stop)[2]}"
    if fresh != text and check:
        print(f"{path} does not show benchmarks/results; run python -m benchmarks.report", file=sys.stderr)
        return 1
    if fresh != text:
        path.write_text(fresh)
    return 0


def headline(runs: list[Run]) -> str:
    """A row for each shape in float32, on the machine that measured most of them: fused against the better eager."""

    def headlined(run: Run) -> list[str]:
        shapes = dict.fromkeys(shape for shape, _, _ in run.places)
        return [shape for shape in shapes if all("fused" in times(run.rows(shape, what)) for what in HEADLINE_PASSES)]

    run = max(runs, key=lambda run: len(headlined(run)), default=None)
    if run is None or not headlined(run):
        return NOTHING
    lines = [
        f"{run.where}, float32: medians in milliseconds.",
        "",
        "| shape | forward: eager | fused | | training step: eager | fused | |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for shape in headlined(run):
        cells = [shape]
        for what in HEADLINE_PASSES:
            ms = times(run.rows(shape, what))
            eager = min((ms[name] for name in ("eager", "strong") if name in ms), default=None)
            cells += [_number(eager), _number(ms.get("fused")), _ratio(eager, ms.get("fused"))]
        lines.append(_line(cells))
    return "\n".join(lines)


def tables(runs: list[Run]) -> str:
    """Times and memory of every run."""
    if not runs:
        return NOTHING
    return "\n\n".join(
        text for run in runs for text in (f"### {run.where}", time_table(run), memory_table(run)) if text
    )


def time_table(run: Run) -> str:
    """Medians, with what the fused block gains over the released formulation and over the best of the others."""
    places = {place: times(rows) for place, rows in run.places.items() if times(rows)}
    names = [name for name in COLUMNS if any(name in ms for ms in places.values())]
    heads = ["shape", "dtype", "pass", *(COLUMNS[name] for name in names), "against eager", "against the best other"]
    lines = ["Medians in milliseconds:", "", _line(heads), "|---|---|---|" + "--:|" * (len(heads) - 3)]
    for place, ms in places.items():
        ours = min((ms[name] for name in ms if name.partition("-")[0] in OURS), default=None)
        others = [value for name, value in ms.items() if name.partition("-")[0] not in OURS]
        ratios = [_ratio(base, ours) for base in (ms.get("eager"), min(others, default=None))]
        lines.append(_line([*place, *(_number(ms.get(name)) for name in names), *ratios]))
    return "\n".join(lines)


def memory_table(run: Run) -> str:
    """Tabulate the bytes that autograd saves for the backward, and the rise of the peak memory in a call."""
    known = {(key, name) for rows in run.places.values() for name in rows for key in MEMORY if rows[name].get(key)}
    columns = [(key, name) for key in MEMORY for name in COLUMNS if (key, name) in known]
    if not columns:
        return ""
    heads = ["shape", "dtype", "pass", *(f"{MEMORY[key]}: {COLUMNS[name]}" for key, name in columns)]
    lines = ["Memory in MB:", "", _line(heads), "|---|---|---|" + "--:|" * len(columns)]
    for place, rows in run.places.items():
        values = [rows.get(name, {}).get(key) for key, name in columns]
        if any(values):
            lines.append(_line([*place, *(_number(value and value / 1e6) for value in values)]))
    return "\n".join(lines)


def times(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Milliseconds by implementation."""
    return {name: row["ms"] for name, row in rows.items() if "ms" in row}


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.1f}x" if value and base else ""


if __name__ == "__main__":
    sys.exit(main())
