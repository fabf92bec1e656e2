"""The concordance correlation coefficient (Lin, 1989) and the loss built on it."""

from __future__ import annotations

import torch
from torch import Tensor

CONVENTIONS = ("population", "released")


def ccc_loss(
    prediction: Tensor, target: Tensor, mask: Tensor | None = None, *, convention: str = "population"
) -> Tensor:
    """Compute 1 - CCC over time, averaged over windows.

    Args:
        prediction, target: [B, L] each.
        mask: [B, L], true where valid. Other frames have no influence, and windows without a valid frame do not count.
        convention: "population" divides by N throughout; "released" divides the covariance by N and the variances by
            N - 1, as the authors' code does.

    Returns:
        A scalar in float32, or in float64 if either argument is. Value and gradient are finite for constant input too.
    """
    values = concordance(prediction, target, mask, convention=convention)
    if mask is None:
        return (1 - values).sum() / max(values.numel(), 1)
    counted = mask.any(dim=-1)
    return torch.where(counted, 1 - values, 0).sum() / counted.sum().clamp(min=1)


def concordance(
    prediction: Tensor, target: Tensor, mask: Tensor | None = None, *, convention: str = "population"
) -> Tensor:
    """Compute the CCC over the last dimension; arguments as in :func:`ccc_loss`. It is 0 if both sides are the same
    constant."""
    _check(prediction, target, mask, convention)
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    if mask is None:
        mask = torch.ones_like(target, dtype=torch.bool)
    x, y = (torch.where(mask, z, 0).to(dtype) for z in (prediction, target))
    count = mask.sum(dim=-1).clamp(min=1)
    mean_x, mean_y = x.sum(dim=-1) / count, y.sum(dim=-1) / count
    dx, dy = (torch.where(mask, z - mean[..., None], 0) for z, mean in ((x, mean_x), (y, mean_y)))
    covariance = (dx * dy).sum(dim=-1) / count
    divisor = count if convention == "population" else (count - 1).clamp(min=1)
    spread = (dx.square() + dy.square()).sum(dim=-1) / divisor + (mean_x - mean_y).square()

    # The mean of a constant is rounded, so that its computed variance is of this order instead of 0.
    scale = torch.maximum(x.detach().abs().amax(dim=-1), y.detach().abs().amax(dim=-1))
    undefined = spread <= (16 * torch.finfo(dtype).eps * scale).square()
    return torch.where(undefined, 0, 2 * covariance / torch.where(undefined, 1, spread))


def _check(prediction: Tensor, target: Tensor, mask: Tensor | None, convention: str) -> None:
    if convention not in CONVENTIONS:
        raise ValueError(f"convention: expected one of {', '.join(map(repr, CONVENTIONS))}, got {convention!r}.")
    if prediction.dim() < 1 or prediction.shape[-1] < 1:
        raise ValueError(f"prediction: expected [..., L] with L >= 1, got shape {list(prediction.shape)}.")
    for name, tensor in (("target", target), ("mask", mask)):
        if tensor is not None and tensor.shape != prediction.shape:
            raise ValueError(
                f"{name}: expected shape {list(prediction.shape)}, as prediction has, got {list(tensor.shape)}."
            )
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool, true where valid, got {mask.dtype}.")
