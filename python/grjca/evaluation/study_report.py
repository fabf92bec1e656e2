"""Report of a study: means with 95 % intervals over seeds, a table and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from grjca import files
from grjca.config import GATING, STUDIED, Fusion
from grjca.modalities import MODALITIES

KINDS = ("noisy", "contradicting", "misaligned", "absent")
OKABE_ITO = "#7f7f7f", "#0072b2", "#56b4e9", "#d55e00", "#009e73", "#cc79a7"
COLOURS = dict(zip(STUDIED, OKABE_ITO, strict=True))
MARKERS = dict(zip(STUDIED, "so^Dvp", strict=True))


class Estimate(NamedTuple):
    """A mean over seeds, and half the width of its 95 % interval (Student's t)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Estimate from one value per seed; the interval of a single value is infinite, and the mean of none is NaN."""
        n = len(values)
        if n < 2:
            return cls(values[0] if n else math.nan, math.inf)
        return cls(float(np.mean(values)), float(stats.t.ppf(0.975, n - 1) * stats.sem(values)))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}"

    @property
    def signed(self) -> str:
        """Format the mean with its sign, and with * if the interval excludes 0."""
        return f"{self.mean:+.3f} ± {self.half:.3f}{' *' if abs(self.mean) > self.half else ''}"


class Cells:
    """All lines of results.jsonl except the first."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = {(row["fusion"], row["level"], row["seed"]): row for row in rows}
        self.levels = sorted({row["level"] for row in rows})
        self.seeds = sorted({row["seed"] for row in rows})
        self.fusions = [fusion for fusion in STUDIED if any(row["fusion"] == fusion for row in rows)]

    @property
    def gated(self) -> list[Fusion]:
        """Fusions that have gates."""
        return [fusion for fusion in self.fusions if GATING.get(fusion, "none") != "none"]

    def ccc(self, fusion: str, level: float) -> Estimate:
        """CCC of a fusion on the held-out videos."""
        return Estimate.of([self.rows[fusion, level, seed]["ccc"] for seed in self.seeds])

    def gain(self, fusion: str, over: str, level: float) -> Estimate:
        """Gain in CCC of ``fusion`` over another, paired by data."""
        pairs = [(self.rows[fusion, level, seed]["ccc"], self.rows[over, level, seed]["ccc"]) for seed in self.seeds]
        return Estimate.of([a - b for a, b in pairs])

    def turn(self, fusion: str, modality: str, condition: str, level: float) -> Estimate:
        """How much more weight a modality's gates give attention where ``condition`` holds than in clean frames."""
        shares = [self.rows[fusion, level, seed]["attention"][modality] for seed in self.seeds]
        return Estimate.of([share[condition] - share["clean"] for share in shares if condition in share])


def write(out: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Write table.md and the plots from the lines of results.jsonl; return the table."""
    cells = Cells(rows)
    text = table(about, cells)
    files.write_text(out / "table.md", text)
    files.write(out / "ccc.svg", lambda file: draw_ccc(cells).savefig(file, format="svg"))
    files.write(out / "gates.svg", lambda file: draw_gates(cells).savefig(file, format="svg"))
    return text


def table(about: dict[str, Any], cells: Cells) -> str:
    """Format the study in Markdown."""
    levels = [f"{level:.0%} weak" for level in cells.levels]
    seeds = len(cells.seeds)
    where = f"{about['processor']}, torch {about['torch']}, commit {about['commit']}"
    lines = [
        f"`grjca study --preset {about['preset']}`: CCC of valence on held-out synthetic videos, mean over {seeds} "
        f"seeds ± 95 % interval (Student's t); * where it leaves out 0, "
        f"not corrected for the number of rows. {where}.",
        "",
        *_rows("CCC", levels, ((f, [str(cells.ccc(f, level)) for level in cells.levels]) for f in cells.fusions)),
        "",
        *_rows(
            "gain in CCC, same data",
            levels,
            (
                (f"{f} over {base}", [cells.gain(f, base, level).signed for level in cells.levels])
                for base in ("rjca", "concat")
                for f in cells.fusions[cells.fusions.index(base) + 1 :]
            ),
        ),
        "",
        *_rows(
            "more weight on attention than in clean frames",
            levels[1:],
            (
                (
                    f"{f}, {m} gate, {condition}",
                    [cells.turn(f, m, condition, level).signed for level in cells.levels[1:]],
                )
                for f in cells.gated
                for m in MODALITIES
                for condition in ("visual weak", "audio weak")
            ),
        ),
    ]
    return "\n".join(lines) + "\n"


def _rows(title: str, columns: list[str], rows: Any) -> list[str]:
    head = [f"| {' | '.join([title, *columns])} |", f"|---|{'--:|' * len(columns)}"]
    return head + [f"| {' | '.join([name, *values])} |" for name, values in rows]


def draw_ccc(cells: Cells) -> Any:
    """Plot the CCC by share of weak frames (left) and the gain over rjca with 95 % intervals (right)."""
    figure, (left, right) = _figure(2)
    shift = np.linspace(-0.012, 0.012, len(cells.fusions))  # so that intervals do not overlap
    for fusion, by in zip(cells.fusions, shift, strict=True):
        style = {"color": COLOURS[fusion], "marker": MARKERS[fusion], "label": fusion, "capsize": 2}
        at = np.array(cells.levels) + by
        ccc = [cells.ccc(fusion, level) for level in cells.levels]
        left.errorbar(at, [e.mean for e in ccc], [e.half for e in ccc], **style)
        if fusion != "rjca":
            gain = [cells.gain(fusion, "rjca", level) for level in cells.levels]
            right.errorbar(at, [e.mean for e in gain], [e.half for e in gain], **style)
    right.axhline(0, color=COLOURS["rjca"], linewidth=1)
    left.set_ylabel("CCC on held-out videos")
    right.set_ylabel("gain over rjca, same data")
    for axes in (left, right):
        axes.set_xlabel("share of frames with one weak modality")
        axes.set_xticks(cells.levels)
    left.legend(frameon=False, ncols=2, fontsize=8)
    return figure


def draw_gates(cells: Cells) -> Any:
    """Plot how far the gates turn to attention (up) or away from it (down), at the highest share of weak frames."""
    figure, grid = _figure(2, rows=2)
    for row, modality in zip(grid, MODALITIES, strict=True):
        for axes, weak in zip(row, MODALITIES, strict=True):
            for i, fusion in enumerate(cells.gated):
                turns = [cells.turn(fusion, modality, f"{weak} {kind}", cells.levels[-1]) for kind in KINDS]
                at = np.arange(len(KINDS)) + 0.2 * (i - 1)
                style = {"color": COLOURS[fusion], "marker": MARKERS[fusion], "label": fusion, "capsize": 2}
                axes.errorbar(at, [e.mean for e in turns], [e.half for e in turns], linestyle="none", **style)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_xticks(range(len(KINDS)), KINDS)
            axes.set_title(f"{modality} gate where {weak} is weak", fontsize=10)
        row[0].set_ylabel("weight on attention,\nweak minus clean frames")
    grid[0][0].legend(frameon=False, fontsize=8)
    return figure


def _figure(panels: int, rows: int = 1) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, panels, sharey="all" if rows > 1 else "none")
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", alpha=0.3)
    return figure, axes
