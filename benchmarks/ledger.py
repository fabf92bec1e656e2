"""The rows of a GPU: a line of JSON each, added as soon as it is known; and what the goals make of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.row_files import ROOT, Row, state_of

TIMED = (
    *("grjca_kernels/**/*.py", "csrc/*.*", "csrc/cuda/*", "setup.py"),
    *("python/grjca/model/eager.py", "python/grjca/measure.py", "benchmarks/*.py"),
)
"""What a time depends on. A lent machine has no git, and a dirty tree no commit of its own: sources are compared."""

# ---- names


def time_row(shape: str, batch: int, dtype: str, implementation: str, what: str) -> str:
    return f"{shape} B={batch} {dtype} {implementation} {what}"


def memory_row(shape: str, batch: int, implementation: str) -> str:
    return f"{shape} B={batch} memory {implementation}"


def host_row(implementation: str) -> str:
    return f"host time of a call, {implementation}"


# ---- the file


def source(root: Path = ROOT) -> str:
    """The state of what a time depends on."""
    return state_of(TIMED, root)


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
    """``factor`` is how many times faster, or smaller, than the baseline. "fused" are the Triton kernels.

    Against eager both are launched plainly, against torch.compile with CUDA graphs both are graphs.
    """

    shape: str
    batch: int
    what: str  # "forward", "training", or "memory" of a training step
    baseline: str
    factor: float
    ours: str = "fused"

    def __str__(self) -> str:
        subject = "" if self.ours == "fused" else f"{self.ours} "
        kind = "smaller" if self.what == "memory" else "faster"
        return f"{self.shape} B={self.batch} {self.what}: {subject}{self.factor:g}x {kind} than {self.baseline}"

    @property
    def rows(self) -> tuple[str, ...]:
        """What decides it: the baseline's row, and ours."""
        if self.what == "memory":
            return tuple(memory_row(self.shape, self.batch, how) for how in (self.baseline, self.ours))
        ours = f"{self.ours}-graph" if self.baseline == "compiled" else self.ours
        return tuple(time_row(self.shape, self.batch, "bfloat16", how, self.what) for how in (self.baseline, ours))

    def got(self, baseline: Row, ours: Row) -> tuple[float, float, str]:
        """The figure, how far it goes where 1 meets the goal, and the figure in words."""
        unit = "bytes" if self.what == "memory" else "device_ms"
        factor = baseline[unit] / ours[unit]
        apart = baseline.get("process") != ours.get("process")
        return factor, factor / self.factor, f"{factor:.2f}x" + ", from two processes" * apart


@dataclass(frozen=True)
class Share:
    """The forward of ``ours`` runs at a ``share`` of what the GPU was measured to do at best: of one kind of work."""

    shape: str
    batch: int
    ceiling: str  # the name of a row of ceilings.py
    share: float
    ours: str

    def __str__(self) -> str:
        return (
            f"{self.shape} B={self.batch} forward: {self.ours} at {100 * self.share:g} % of the ceiling {self.ceiling}"
        )

    @property
    def rows(self) -> tuple[str, ...]:
        return f"ceiling {self.ceiling}", time_row(self.shape, self.batch, "bfloat16", self.ours, "forward")

    def got(self, ceiling: Row, ours: Row) -> tuple[float, float, str]:
        work = ours["GFLOP"] / ceiling["TFLOP/s"] if "TFLOP/s" in ceiling else 1e3 * ours["Gtanh"] / ceiling["G/s"]
        share = work / ours["device_ms"]
        return share, share / self.share, f"{100 * share:.3g} %"


@dataclass(frozen=True)
class HostTime:
    """A forward returns to the host within ``most`` microseconds, at a size that the device does in no time."""

    most: float
    ours: str

    def __str__(self) -> str:
        return f"host time of a forward: {self.ours} at most {self.most:g} us"

    @property
    def rows(self) -> tuple[str, ...]:
        return (host_row(self.ours),)

    def got(self, host: Row) -> tuple[float, float, str]:
        return host["forward us"], self.most / host["forward us"], f"{host['forward us']:.3g} us"


GOALS: tuple[Goal | Share | HostTime, ...] = (
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
    Goal("abaw", 12, "forward", "fused", 1.5, "cuda"),
    Goal("abaw", 12, "forward", "eager", 8, "cuda"),
    Goal("abaw", 12, "forward", "compiled", 2.5, "cuda"),
    Goal("abaw", 12, "training", "eager", 5, "cuda"),
    Goal("clip", 64, "training", "eager", 5, "cuda"),
    Share("abaw", 64, "matrix bfloat16", 0.4, "cuda"),
    Share("clip", 128, "tanh.approx.f32", 0.5, "cuda"),
    HostTime(15, "cuda"),
)
"""In bfloat16, medians: first those of the Triton kernels, then those of the CUDA C++ kernels."""


def verdicts(rows: list[Row]) -> list[Row]:
    """Each goal, what was got, and by how much it was missed; None where either side was not measured."""
    by_name = {row["row"]: row for row in rows}
    return [{"goal": str(goal), **_verdict(goal, by_name)} for goal in GOALS]


def _verdict(goal: Goal | Share | HostTime, by_name: Mapping[str, Row]) -> Row:
    if not by_name.keys() >= {*goal.rows}:
        return {"got": None, "shown": "", "verdict": "not measured"}
    got, reached, shown = goal.got(*(by_name[name] for name in goal.rows))
    verdict = "met" if reached >= 1 else f"missed by {100 * (1 - reached):.2g} %"
    return {"got": got, "shown": shown, "verdict": verdict}


def lines(table: list[Row]) -> list[str]:
    """The goals in Markdown."""
    rows = [f"| {row['goal']} | {row['shown']} | {row['verdict']} |" for row in table]
    return ["| goal | got | |", "|---|--:|---|", *rows]
