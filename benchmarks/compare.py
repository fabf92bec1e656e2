"""Before and after, and whether the difference is one: ``python -m benchmarks.compare BEFORE.json AFTER.json``.

Both files are of ``benchmarks.report``, or of ``pytest --benchmark-json``. Two runs of the same code differ too: by a
machine that is slower today, which strikes all rows alike, and by what strikes each row alone (addresses, neighbours).
Rows of a control that did not change show both. A ratio is taken relative to that of the control in the same shape and
pass, and counts if it is significant and larger than what the controls differ by among themselves.

The exit status is 1 if a row is slower, 2 if the files cannot be compared, and 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from benchmarks import report

PLACE = ("shape", "batch", "pass", "dtype")
KEY = (*PLACE, "implementation")
MACHINE = ("device", "threads", "python", "torch", "numpy", "driver", "triton")
ALPHA = 0.05  # of the whole table, and 1 - ALPHA of an interval
RESAMPLES = 2000
LEAST = 0.02  # a smaller difference is not called one, even where the controls happen to agree
ASSUMED, FEWEST_CONTROLS = 0.2, 3  # noise between runs where the controls are too few to show it

Key = tuple[Any, ...]
Row = dict[str, Any]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Change:
    """Of a row; ratios are after over before, so that more than 1 is slower."""

    key: Key
    before_ms: float
    after_ms: float
    ratio: float
    interval: Interval
    relative: float  # the ratio over the control's
    relative_interval: Interval
    p: float  # Mann-Whitney U, without the control's drift, corrected for the number of rows; NaN for a control
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """All that is printed. ``drift`` is the least and the most that a control changed by, ``noise`` a share."""

    control: str
    drift: Interval
    noise: float
    changes: list[Change]
    warnings: list[str]


def main(argv: list[str] | None = None) -> int:
    """Print the table; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description="Compare two files of times.")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--control", default="eager", help="an implementation that did not change (default: eager)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    try:
        result = compare(load(arguments.before), load(arguments.after), arguments.control)
    except ValueError as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    print(as_json(result) if arguments.json else "\n".join(lines(result)))
    return int(any(change.verdict == "slower" for change in result.changes))


# ---- files


def load(path: Path) -> dict[Key, Row]:
    """Rows by their key, the last of each; ValueError if one has no samples."""
    try:
        found = json.loads(path.read_text())
        rows = report.rows(path) if isinstance(found, dict) else found
        by_key = {tuple(row[name] for name in KEY): row for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a file of benchmarks.report or pytest --benchmark-json, got {type(error).__name__}: "
            f"{error}."
        ) from error
    missing = [key for key, row in by_key.items() if not row.get("samples_ms")]
    if missing:
        raise ValueError(
            f"{path}: expected samples_ms in every row, and {len(missing)} of {len(by_key)} have none, such as "
            f"{named(missing[0])}. Without them nothing can be said about chance: measure again with python -m "
            "benchmarks.report, or give the file of pytest --benchmark-json."
        )
    return by_key


def named(key: Key) -> str:
    shape, batch, what, dtype, implementation = key
    return f"{shape}, B = {batch}, {what}, {dtype}, {implementation}"


def differences(before: Iterable[Row], after: Iterable[Row]) -> list[str]:
    """A sentence for everything about the machine that is not the same in both files."""
    rows = [*before], [*after]
    result = []
    for name in MACHINE:
        was, now = (sorted({str(row[name]) for row in of_file if name in row}) for of_file in rows)
        if was != now:
            result.append(
                f"The files differ in {name}: {' and '.join(was) or 'not said'} before, "
                f"{' and '.join(now) or 'not said'} after. What differs in time may be due to that and not to the code."
            )
    return result


# ---- what is said of them


def compare(before: Mapping[Key, Row], after: Mapping[Key, Row], control: str = "eager") -> Comparison:
    """Every row that both have; ValueError where there is none, or none of the control."""
    common = [key for key in before if key in after]
    samples = {
        key: tuple(numpy.array(rows[key]["samples_ms"], float) for rows in (before, after))  # a pair
        for key in common
    }
    controls = {key[:-1]: pair for key, pair in samples.items() if key[-1] == control}
    if not controls:
        raise ValueError(
            f"expected rows of the control, {control!r}, in both files, got none: a slower machine could not be told "
            f"from slower code. In both are {', '.join(sorted({key[-1] for key in common})) or 'no rows at all'}; "
            "--control names one that did not change."
        )
    drifts = numpy.array([ratio(*pair) for pair in controls.values()])
    typical = float(numpy.exp(numpy.log(drifts).mean()))
    judged = [key for key in common if key[-1] != control]
    noise = between_runs(drifts, len(judged))
    p = dict(
        zip(judged, holm([p_value(*samples[key], drift_of(key, controls, typical)) for key in judged]), strict=True)
    )
    changes = [change(key, samples[key], controls, typical, p.get(key, math.nan), noise) for key in common]
    warnings = differences(before.values(), after.values()) + doubts(before, after, controls, samples, judged, control)
    return Comparison(control, (float(drifts.min()), float(drifts.max())), noise, changes, warnings)


def change(key: Key, pair: Any, controls: Mapping[Key, Any], typical: float, p: float, noise: float) -> Change:
    """One row. Where its place has no control, the typical drift of the others is taken out."""
    plain, interval = ratio(*pair), bootstrap(ratio, pair)
    reference = controls.get(key[:-1])
    if math.isnan(p):
        relative, relative_interval, verdict = 1.0, (1.0, 1.0), "control"
    else:
        relative = plain / drift_of(key, controls, typical)
        if reference is None:
            relative_interval = (interval[0] / typical, interval[1] / typical)
        else:
            relative_interval = bootstrap(relative_ratio, (*pair, *reference))
        verdict = judge(relative, relative_interval, p, noise)
    medians = (float(numpy.median(times)) for times in pair)
    return Change(key, *medians, plain, interval, relative, relative_interval, p, verdict)


def judge(relative: float, interval: Interval, p: float, noise: float) -> str:
    """Significant by rank and by interval, and more than noise."""
    chance = p >= ALPHA or interval[0] <= 1 <= interval[1]
    if chance or abs(math.log(relative)) <= math.log1p(noise):
        return "no difference shown"
    return "slower" if relative > 1 else "faster"


def doubts(
    before: Mapping[Key, Row],
    after: Mapping[Key, Row],
    controls: Mapping[Key, Any],
    samples: Mapping[Key, Any],
    judged: Sequence[Key],
    control: str,
) -> list[str]:
    """Sentences on rows about which less can be said, or nothing."""
    result = [
        f"Only in {where}: {'; '.join(map(named, alone))}."
        for where, alone in (
            ("BEFORE", [key for key in before if key not in after]),
            ("AFTER", [key for key in after if key not in before]),
        )
        if alone
    ]
    if len(controls) < FEWEST_CONTROLS:
        result.append(
            f"{len(controls)} of the rows are of the control, {control}, and from fewer than {FEWEST_CONTROLS} the "
            f"noise between runs cannot be told: {100 * ASSUMED:g} % is assumed, or more if they moved by more."
        )
    apart = [named(key) for key in judged if key[:-1] not in controls]
    if apart:
        result.append(f"No row of {control} in the same place, so the typical drift is taken out: {'; '.join(apart)}.")
    sizes = {key: [len(times) for times in samples[key]] for key in judged}
    few = [named(key) for key, (n, m) in sizes.items() if 2 / math.comb(n + m, n) * len(judged) >= ALPHA]
    if few:
        result.append(f"Too few samples to show any difference among {len(judged)} rows: {'; '.join(few)}.")
    return result


# ---- statistics


def ratio(before: Any, after: Any, axis: int = -1) -> Any:
    """Of the medians."""
    return numpy.median(after, axis=axis) / numpy.median(before, axis=axis)


def relative_ratio(before: Any, after: Any, control_before: Any, control_after: Any, axis: int = -1) -> Any:
    """The ratio over that of the control."""
    return ratio(before, after, axis) / ratio(control_before, control_after, axis)


def drift_of(key: Key, controls: Mapping[Key, Any], typical: float) -> float:
    return float(ratio(*controls[key[:-1]])) if key[:-1] in controls else typical


def between_runs(drifts: Any, rows: int) -> float:
    """The share by which a ratio of medians, over that of a control, may differ from 1 with no change in the code.

    Each of the two moves by itself as much as the controls do about their mean, so their quotient by the square root
    of 2 more. The bound is Student's, for all ``rows`` together. Of too few controls it would be no bound: then it is
    all that they moved by, but no less than is assumed.
    """
    from scipy import stats

    if len(drifts) < FEWEST_CONTROLS:
        moved = numpy.log([1 + ASSUMED, drifts.max() / drifts.min(), drifts.max(), 1 / drifts.min()])
        return float(numpy.expm1(moved.max()))
    spread = math.sqrt(2) * numpy.log(drifts).std(ddof=1)
    return max(LEAST, math.expm1(stats.t.ppf(1 - ALPHA / (2 * max(1, rows)), len(drifts) - 1) * spread))


def bootstrap(statistic: Callable[..., Any], samples: Sequence[Any]) -> Interval:
    """Percentiles of the statistic over samples drawn anew, each file and each implementation apart."""
    from scipy import stats

    drawn = stats.bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=1 - ALPHA,
        method="percentile",
        vectorized=True,
        rng=0,
    )
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def p_value(before: Any, after: Any, drift: float) -> float:
    from scipy import stats

    return float(stats.mannwhitneyu(before, after / drift).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Corrected so that the chance of any false one among all is that of one."""
    values = numpy.array(p, float)
    order = numpy.argsort(values)
    result = numpy.empty_like(values)
    result[order] = numpy.maximum.accumulate(values[order] * numpy.arange(len(values), 0, -1)).clip(max=1)
    return result.tolist()


# ---- what is printed


def lines(result: Comparison) -> list[str]:
    """Warnings first, then the table, then how to read it."""
    head = ["shape", "pass", "dtype", "implementation", "before ms", "after ms", "ratio"]
    table = [[*head, f"against {result.control}", "p", "verdict"], *map(cells, result.changes)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    least, most = result.drift
    return [
        *(f"Warning: {sentence}" for sentence in result.warnings),
        *rows,
        f"The control, {result.control}, took {least:.3f} to {most:.3f} times as long after as before. This is the "
        f"machine, and is taken out of the column 'against {result.control}'.",
        f"Noise between runs: {100 * result.noise:.0f} %; only what differs by more, with p < {ALPHA} over all rows "
        "(Mann-Whitney U, Holm), is called faster or slower. In brackets: 95 % intervals, by bootstrap.",
    ]


def cells(change: Change) -> list[str]:
    shape, batch, *others = change.key
    numbers = [f"{change.before_ms:.4g}", f"{change.after_ms:.4g}", _with_interval(change.ratio, change.interval)]
    if change.verdict == "control":
        numbers += ["", ""]
    else:
        numbers += [_with_interval(change.relative, change.relative_interval), f"{change.p:.2g}"]
    return [f"{shape}, B = {batch}", *others, *numbers, change.verdict]


def as_json(result: Comparison) -> str:
    """The same, without NaN, which JSON does not have."""
    changes = [
        {**dict(zip(KEY, change.key, strict=True)), **asdict(change), "p": None if math.isnan(change.p) else change.p}
        for change in result.changes
    ]
    for row in changes:
        del row["key"]
    return json.dumps({**asdict(result), "changes": changes}, indent=1, allow_nan=False)


def _with_interval(value: float, interval: Interval) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


if __name__ == "__main__":
    sys.exit(main())
