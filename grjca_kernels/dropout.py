"""The dropout mask of operator.md: a pure function of (seed, iteration, modality, site, sample, row, column).

One Philox4x32 call decides eight rows of a column. It uses seven rounds, the fewest that pass BigCrush (Salmon et al.,
SC 2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

SITE_CORRELATION, SITE_OUTPUT = 0, 1
ROUNDS = 7
GROUP = 8  # rows decided by one call

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def threshold(p: float) -> int:
    """Return the 16-bit value below which a draw drops its element: p in steps of 2^-16, and never 1."""
    return min(65535, int(p * 65536 + 0.5))


def scaled_mask(
    seed: Tensor, p: float, *, iteration: int, modality: int, site: int, shape: tuple[int, int, int], dtype: torch.dtype
) -> Tensor:
    """Return the factors by which the block multiplies C or U while training, for code that must agree with it.

    Public as ``grjca_kernels.dropout_mask``; "Dropout" in ``operator.md`` defines every bit.

    Args:
        seed: one int64, on the device of the mask. Without a ``seed`` the block draws, once per call,
            ``torch.randint(2**63 - 1, (), dtype=torch.int64, device=...)``.
        p: the probability of dropping an element, 0 <= p < 1.
        iteration, modality: t and m, both from 0.
        site: 0 for C_m [B, d_m, d], 1 for U_m [B, L, d_m].
        shape: the shape of C_m or U_m: (samples, rows, columns).
        dtype: the dtype of the result.

    Returns:
        A tensor of ``shape`` and ``dtype``: 0 where an element is dropped, 1 / (1 - p) where it is kept.
    """
    return keep_mask(seed, p, iteration=iteration, modality=modality, site=site, shape=shape).to(dtype) / (1 - p)


def drop(a: Tensor, seed: Tensor | None, p: float, iteration: int, modality: int, site: int) -> Tensor:
    """Multiply ``a`` by its mask, or return it unchanged without a seed. Gradients take the same mask."""
    if seed is None:
        return a
    place = {"iteration": iteration, "modality": modality, "site": site, "shape": (a.shape[0], a.shape[1], a.shape[2])}
    return a * scaled_mask(seed, p, **place, dtype=a.dtype)  # type: ignore[arg-type]


def keep_mask(
    seed: Tensor, p: float, *, iteration: int, modality: int, site: int, shape: tuple[int, int, int]
) -> Tensor:
    """Return the mask of :func:`scaled_mask` as booleans, true where an element is kept."""
    samples, rows, columns = shape
    groups = (rows + GROUP - 1) // GROUP

    def counter(size: int, dim: int) -> Tensor:
        return torch.arange(size, device=seed.device).reshape([size if i == dim else 1 for i in range(3)])

    words = philox(
        (
            counter(columns, 2).expand(samples, groups, columns),
            counter(groups, 1),
            counter(samples, 0),
            torch.full((), iteration | modality << 8 | site << 16, device=seed.device),
        ),
        seed.reshape(()),
    )
    draws = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=2)
    return draws.reshape(samples, groups * GROUP, columns)[:, :rows] >= threshold(p)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox4x32 on int64 tensors of 32-bit words; the key is the low and the high word of ``seed``."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # mod 2^64, which keeps both words exact
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3
