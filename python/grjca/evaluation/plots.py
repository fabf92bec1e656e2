"""Plots of an evaluation: functions from arrays to figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from grjca import files

if TYPE_CHECKING:  # matplotlib takes a second to import and is not always needed
    from matplotlib.figure import Figure

WIDTH = 9.0  # inches
DPI = 120
LABEL, PREDICTION, INVALID = "#000000", "#D55E00", "#E8E8E8"  # colour-blind-safe palette of Okabe and Ito
COLOURS = {"valence": "#0072B2", "arousal": "#D55E00"}
INPUT = "#BBBBBB"  # grey for X^0, the input before any attention
FEW_POINTS = 100  # below this, points are marked, so that one between two gaps is visible
MOST_POINTS = 1200  # more points would be finer than a pixel
BINS = 25


def over_time(
    title: str, target: str, prediction: np.ndarray, label: np.ndarray, weights: Mapping[str, np.ndarray]
) -> Figure:
    """Plot the prediction and label of one video, and below them the weights from each modality's gates.

    Args:
        prediction, label: [N]; frames where the label is NaN are left out.
        weights: [N, T + 1] for each modality, the weight of each iterate; may be empty.
    """
    figure, (top, *beneath) = _panels(1 + len(weights), [2.2, *(1.0 for _ in weights)])
    frames = np.arange(1, len(label) + 1)
    invalid = np.isnan(label)
    top.fill_between(frames, 0, 1, where=invalid, step="mid", color=INVALID, lw=0, transform=top.get_xaxis_transform())
    marker = "." if len(label) < FEW_POINTS else None
    top.plot(frames, np.where(invalid, np.nan, prediction), color=PREDICTION, lw=1.2, marker=marker, label="prediction")
    top.plot(frames, label, color=LABEL, lw=1.2, marker=marker, label="label")
    top.set(ylabel=target, ylim=(-1.05, 1.05))
    top.axhline(0, color="#999999", lw=0.6, zorder=0)
    handles, names = top.get_legend_handles_labels()
    if invalid.any():
        handles, names = [*handles, _patch(INVALID)], [*names, "no valid label"]
    used, colours = _iterates(weights)
    for axes, (modality, of) in zip(beneath, weights.items(), strict=True):
        places, means = _thinned(frames, of)
        axes.stackplot(places, means.T, colors=colours, lw=0)
        axes.set(ylabel=f"{modality}\ngate weight", ylim=(0, 1))
    if weights:
        stack = used[::-1]  # from top to bottom, as they are drawn
        handles, names = [*handles, *(_patch(colours[t]) for t in stack)], [*names, *map(iterate_name, stack)]
    figure.legend(handles, names, loc="outside right upper", frameon=False)
    (beneath or [top])[-1].set(xlabel="frame", xlim=(0.5, len(label) + 0.5))
    top.xaxis.get_major_locator().set_params(integer=True)
    top.set_title(_plain(title), loc="left")
    return figure


def curves(title: str, seconds: np.ndarray, values: Mapping[Any, np.ndarray]) -> Figure:
    """Plot valence, arousal or both, [N] each, of one video over time."""
    figure, (axes,) = _panels(1, [2.2])
    marker = "." if len(seconds) < FEW_POINTS else None
    for target, of in values.items():
        axes.plot(seconds, of, color=COLOURS[target], lw=1.2, marker=marker, label=target)
    axes.axhline(0, color="#999999", lw=0.6, zorder=0)
    axes.set(xlabel="seconds", ylabel=" and ".join(values), ylim=(-1.05, 1.05), xmargin=0)
    axes.set_title(_plain(title), loc="left")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def gate_histogram(title: str, weights: Mapping[str, np.ndarray]) -> Figure:
    """Plot a histogram of the weights from the gates, with a row per modality and a column per iterate.

    Args:
        weights: [N, T + 1] for each modality.
    """
    used, colours = _iterates(weights)
    figure, grid = _grid(len(weights), len(used))
    for row, (modality, of) in zip(grid, weights.items(), strict=True):
        for axes, t in zip(row, used, strict=True):
            weight = of[:, t]
            share = np.full(len(weight), 100 / len(weight))
            axes.hist(weight, BINS, range=(0, 1), weights=share, color=colours[t], edgecolor="#555555", lw=0.4)
            axes.axvline(weight.mean(), color=LABEL, lw=1.2, ls="--")
            axes.set(xlim=(0, 1), xticks=(0, 0.5, 1))
            axes.set_title(f"mean {weight.mean():.2f}", fontsize="small")
        row[0].set_ylabel(f"{modality}\n% of frames")
    for axes, t in zip(grid[-1], used, strict=True):
        axes.set_xlabel(f"gate weight of {iterate_name(t)}")
    figure.suptitle(_plain(title), x=0.01, ha="left")
    return figure


def scatter(title: str, target: str, prediction: np.ndarray, label: np.ndarray) -> Figure:
    """Plot prediction against label, [N] each, of all frames together."""
    figure = _figure(5.6, 5.0, "compressed")
    axes = figure.subplots()
    bins = axes.hexbin(label, prediction, gridsize=50, extent=(-1, 1, -1, 1), bins="log", mincnt=1, cmap="viridis_r")
    diagonal = axes.plot([-1, 1], [-1, 1], color=PREDICTION, lw=1.5, ls="--")
    axes.set(xlabel=f"label, {target}", ylabel=f"prediction, {target}", xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
    axes.set(xticks=(-1, -0.5, 0, 0.5, 1), yticks=(-1, -0.5, 0, 0.5, 1))
    figure.colorbar(bins, ax=axes, label="frames", format="%g")
    axes.set_title(_plain(title), loc="left")
    figure.legend(diagonal, ["prediction = label"], loc="outside lower center", frameon=False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Save a figure as PNG."""
    files.write(path, lambda file: figure.savefig(file, format="png", dpi=DPI))


def iterate_name(t: int) -> str:
    """Return the name of iterate t, X^t."""
    return f"$X^{t}$" + (" (input)" if t == 0 else "")


def iterate_colours(count: int) -> list[Any]:
    """Return the colours of X^0, X^1, ...: grey for the input, then from dark to light with each iteration."""
    from matplotlib import colormaps

    return [INPUT, *colormaps["plasma"](np.linspace(0.15, 0.8, count - 1))]


def _iterates(weights: Mapping[str, np.ndarray]) -> tuple[list[int], list[Any]]:
    """Return the iterates with any weight (dca has only the first and the last), and the colours of all."""
    count = max((of.shape[1] for of in weights.values()), default=1)
    return [t for t in range(count) if any(of[:, t].any() for of in weights.values())], iterate_colours(count)


def _thinned(frames: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Thin a curve by averaging as many neighbours as a pixel shows."""
    starts = np.arange(0, len(frames), -(-len(frames) // MOST_POINTS))
    counts = np.diff([*starts, len(frames)])
    return np.add.reduceat(frames, starts) / counts, np.add.reduceat(values, starts) / counts[:, None]


def _panels(rows: int, heights: list[float]) -> tuple[Figure, list[Any]]:
    figure = _figure(WIDTH, 0.7 + 1.15 * sum(heights))
    grid = figure.subplots(rows, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    return figure, list(grid[:, 0])


def _grid(rows: int, columns: int) -> tuple[Figure, Any]:
    figure = _figure(max(WIDTH, 1.8 * columns), 0.6 + 2.0 * rows)
    return figure, figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)


def _figure(width: float, height: float, layout: Literal["constrained", "compressed"] = "constrained") -> Figure:
    from matplotlib.figure import Figure

    return Figure((width, height), layout=layout)


def _patch(colour: Any) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour)


def _plain(text: str) -> str:
    """Escape dollar signs, between which matplotlib expects mathematics."""
    return text.replace("$", r"\$")
