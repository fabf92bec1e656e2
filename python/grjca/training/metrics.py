"""Metrics to report, over whole arrays in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grjca.config import TARGETS, Target
from grjca.data.videos import Video
from grjca.errors import UserError
from grjca.training.losses import concordance


def ccc(prediction: Any, target: Any) -> float:
    """Concordance correlation coefficient of two arrays of one shape (tensors, NumPy arrays or lists), over all values.

    Variances and covariance divide by N. The CCC is 0 if both are the same constant, and NaN if either holds NaN.
    """
    x, y = _pair("ccc", prediction, target)
    return float(concordance(x, y))


def rmse(prediction: Any, target: Any) -> float:
    """Root mean squared error; arguments as in :func:`ccc`."""
    x, y = _pair("rmse", prediction, target)
    return float((x - y).square().mean().sqrt())


def pearson(prediction: Any, target: Any) -> float:
    """Pearson correlation coefficient, NaN if either side is constant; arguments as in :func:`ccc`."""
    x, y = _pair("pearson", prediction, target)
    if any(_constant(z) for z in (x, y)):
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x.norm() * y.norm()))


def _constant(values: Tensor) -> bool:
    return bool((values == values[0]).all())


@dataclass(frozen=True)
class Scores:
    """Metrics of a prediction."""

    frames: int
    """Number of valid frames."""
    ccc: float
    rmse: float
    pearson: float

    @classmethod
    def of(cls, prediction: np.ndarray, label: np.ndarray) -> Scores:
        """Compute the scores of two arrays [N] of valid frames."""
        return cls(len(label), ccc(prediction, label), rmse(prediction, label), pearson(prediction, label))

    def as_json(self) -> dict[str, float | int | None]:
        """Return the scores with None in place of NaN, which JSON does not have."""
        return {name: None if math.isnan(value) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class SplitScores:
    """Scores of the videos of a split."""

    together: Scores
    """Scores over all valid frames of all videos, the ones to report."""
    videos: Mapping[str, Scores]
    """Scores of each video that has valid frames."""


def split_scores(predictions: Sequence[np.ndarray], videos: Sequence[Video], target: Target) -> SplitScores:
    """Compare ``predictions`` [N] with the labels of ``videos``; frames without a valid label do not count.

    Raises:
        UserError: if no frame is valid.
    """
    column = TARGETS.index(target)
    pairs = {
        video.name: (prediction[video.valid], video.labels[video.valid, column])
        for video, prediction in zip(videos, predictions, strict=True)
        if video.labels is not None and video.valid.any()
    }
    if not pairs:
        raise UserError(f"{len(videos)} videos: expected at least one frame with a valid {target}, got none.")
    x, y = (np.concatenate(side) for side in zip(*pairs.values(), strict=True))
    return SplitScores(Scores.of(x, y), {name: Scores.of(*pair) for name, pair in pairs.items()})


def _pair(name: str, prediction: Any, target: Any) -> tuple[Tensor, Tensor]:
    x, y = (torch.as_tensor(values).detach().cpu().to(torch.float64) for values in (prediction, target))
    if x.shape != y.shape or x.numel() == 0:
        raise ValueError(
            f"{name}: expected two arrays of one shape with at least one value, "
            f"got {list(x.shape)} and {list(y.shape)}."
        )
    return x.reshape(-1), y.reshape(-1)
