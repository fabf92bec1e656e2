"""Figures to report, over whole arrays in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grjca.losses import concordance


def ccc(prediction: Any, target: Any) -> float:
    """Concordance correlation coefficient of two arrays of one shape (tensors, NumPy arrays or lists), over all values.

    Dividing by N throughout. 0 if both are the same constant; NaN if either holds one.
    """
    x, y = _float64(prediction), _float64(target)
    if x.shape != y.shape or x.numel() == 0:
        raise ValueError(
            f"ccc: expected two arrays of one shape with at least one value, got {list(x.shape)} and {list(y.shape)}."
        )
    return float(concordance(x.reshape(-1), y.reshape(-1)))


def _float64(values: Any) -> Tensor:
    return torch.as_tensor(values).detach().cpu().to(torch.float64)
