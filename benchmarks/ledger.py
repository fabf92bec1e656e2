"""The rows of a GPU: a line of JSON each, added as soon as it is known; and what the goals make of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TIMED = ("grjca_kernels/**/*.py", "python/grjca/eager.py", "python/grjca/measure.py", "benchmarks/*.py")
"""What a time depends on. A lent machine has no git, and a dirty tree no commit of its own: sources are compared."""

Row = dict[str, Any]


def source(root: Path = ROOT) -> str:
    """A short name for the state of the sources."""
    digest = hashlib.sha256()
    for glob in TIMED:
        for path in sorted(root.glob(glob)):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def append(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """Every whole row; a last line that a killed process left half written is passed over."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def done(rows: Iterable[Row], of_source: str) -> set[str]:
    """Names of the rows that need not be measured again; what has failed is tried again."""
    return {row["row"] for row in rows if row.get("source") == of_source and "error" not in row}


def current(rows: list[Row]) -> list[Row]:
    """The rows of the sources that were measured last, the last of every name, without those that failed."""
    last = rows[-1].get("source") if rows else None
    by_name = {row["row"]: row for row in rows if row.get("source") == last and "error" not in row}
    return list(by_name.values())


# ---- the goals


@dataclass(frozen=True)
class Goal:
    """``factor`` is how many times faster, or smaller, than the baseline."""

    shape: str
    batch: int
    what: str  # "forward", "training", or "memory" of a training step
    baseline: str
    factor: float

    def __str__(self) -> str:
        kind = "smaller" if self.what == "memory" else "faster"
        return f"{self.shape} B={self.batch} {self.what}: {self.factor:g}x {kind} than {self.baseline}"


GOALS = (
    Goal("abaw", 12, "forward", "eager", 6),
    Goal("abaw", 12, "forward", "compiled", 1.5),
    Goal("abaw", 12, "training", "eager", 4),
    Goal("abaw", 12, "training", "compiled", 1.3),
    Goal("clip", 64, "forward", "eager", 5),
    Goal("clip", 64, "forward", "compiled", 2),
    Goal("clip", 64, "training", "eager", 4),
    Goal("clip", 64, "training", "compiled", 1.5),
    *(Goal("light", batch, "forward", *goal) for batch in (1, 8) for goal in (("eager", 5), ("compiled", 1.5))),
    Goal("long", 8, "forward", "compiled", 1),
    Goal("long", 8, "training", "compiled", 1),
    Goal("abaw", 12, "memory", "eager", 6),
    Goal("clip", 64, "memory", "eager", 20),
)
"""In bfloat16. Against eager both are launched plainly, against torch.compile with CUDA graphs both are graphs."""


def verdicts(rows: list[Row]) -> list[Row]:
    """Each goal, what was got, and by how much it was missed; None where either side was not measured."""
    table = []
    for goal in GOALS:
        ours = "fused-graph" if goal.baseline == "compiled" and goal.what != "memory" else "fused"
        sizes = [_size(rows, goal, implementation) for implementation in (goal.baseline, ours)]
        got = sizes[0] / sizes[1] if all(sizes) else None
        table.append({"goal": str(goal), "wanted": goal.factor, "got": got, "verdict": _verdict(goal.factor, got)})
    return table


def _size(rows: list[Row], goal: Goal, implementation: str) -> float | None:
    wanted = {"kind": "memory" if goal.what == "memory" else "time", "shape": goal.shape, "batch": goal.batch}
    wanted |= {"dtype": "bfloat16", "implementation": implementation}
    if goal.what != "memory":
        wanted["pass"] = goal.what
    found = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    return (found[-1]["bytes"] if goal.what == "memory" else found[-1]["device_ms"]) if found else None


def _verdict(wanted: float, got: float | None) -> str:
    if got is None:
        return "not measured"
    return "met" if got >= wanted else f"missed by {100 * (1 - got / wanted):.2g} %"


def lines(table: list[Row]) -> list[str]:
    """The goals in Markdown."""
    rows = [
        f"| {row['goal']} | {'' if row['got'] is None else format(row['got'], '.2f') + 'x'} | {row['verdict']} |"
        for row in table
    ]
    return ["| goal | got | |", "|---|--:|---|", *rows]
