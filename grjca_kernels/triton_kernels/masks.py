"""The dropout masks of operator.md.

The masks of U, and of a stored C, are drawn once per iteration into the workspace. A byte holds one bit for each of
eight rows of a column, set where the element is kept, and takes one Philox call. The masks of U come first, [sample, L
/ 8, d] with the modalities side by side, then those of C, [sample, modality, d_m / 8, d]. The mask of a streamed C is
drawn where it is used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grjca_kernels.triton_kernels.primitives import chunk_of, entry, length_of, modality_blocks, modality_task

GROUPS: tl.constexpr = tl.constexpr(8)
COLUMNS: tl.constexpr = tl.constexpr(128)
"""The bytes along a row that a task draws."""


@triton.jit
def threshold(a):
    """Return the 16-bit value below which a draw drops its element."""
    return tl.cast(a.scalars.threshold_unspecialized // 2, tl.uint32)


@triton.jit
def philox(c0, c1, c2, c3, p_seed):
    """Compute Philox4x32 with seven rounds on uint32 tensors; the key is the low and the high word of the seed."""
    seed = tl.load(p_seed)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(7):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def factors_of_correlation(a, sample, t, m, row, column, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return 0 or 1 / (1 - p) for C_m[row:, column:] of a sample, transposed, [WIDTH, ROWS]; ``row`` is a multiple of
    8.

    One Philox call decides eight rows of a column, which are neighbours here.
    """
    zero = tl.zeros((WIDTH, ROWS // 8), tl.uint32)
    c0 = zero + (column + tl.arange(0, WIDTH)).to(tl.uint32)[:, None]
    c1 = zero + (row // 8 + tl.arange(0, ROWS // 8)).to(tl.uint32)[None, :]
    c2 = zero + tl.cast(sample, tl.uint32)
    c3 = zero + tl.cast(t | m << 8, tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, a.seed)
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    draws = tl.reshape(tl.join(low, high), (WIDTH, ROWS))
    return tl.where(draws < threshold(a), 0.0, a.scalars.kept)


@triton.jit
def kept_bits(word, least):
    """Return bits 0 and 1 for the two draws in a word, set where they keep their elements."""
    return ((word & 0xFFFF) >= least).to(tl.uint32) | ((word >> 16) >= least).to(tl.uint32) << 1


@triton.jit
def store_bits(p, a, columns, groups, samples, t, m, SITE: tl.constexpr, mask):
    """Store a byte for every eight rows of a column, with set bits for kept rows; ``groups`` are the rows divided by 8.

    All are index tensors that broadcast to the shape of ``p``.
    """
    zero = (samples + groups + columns) * 0
    c0, c1, c2 = (zero + columns).to(tl.uint32), (zero + groups).to(tl.uint32), (zero + samples).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, (zero + (t | m << 8 | SITE << 16)).to(tl.uint32), a.seed)
    least = threshold(a)
    bits = kept_bits(w0, least) | kept_bits(w1, least) << 2 | kept_bits(w2, least) << 4 | kept_bits(w3, least) << 6
    tl.store(p, bits.to(tl.uint8), mask=mask)


@triton.jit
def load_factors(p, a, rows, mask):
    """Return 0 or 1 / (1 - p) from the bytes of store_bits; ``rows`` selects the bit."""
    bits = tl.load(p, mask=mask, other=0).to(tl.int32)
    return tl.where((bits >> rows % 8) & 1 != 0, a.scalars.kept, 0.0)


# ---- places of the masks


@triton.jit
def output_bits(a, sample, row, C: tl.constexpr):
    """Return the pointer to the bits of U of a sample, at a row of [L, d]."""
    groups = tl.cdiv(length_of(a, C), 8)
    return a.bits + (tl.cast(sample, tl.int64) * groups + row // 8) * a.shape.width


@triton.jit
def correlation_bits(a, sample, m, row, C: tl.constexpr):
    """Return the pointer to the bits of C_m of a sample, at a row of [d_m, d]."""
    before, groups = m * 0, m * 0
    for n in tl.static_range(len(a.shape.widths)):
        groups += tl.cdiv(a.shape.widths[n], 8)
        before += tl.where(m > n, tl.cdiv(a.shape.widths[n], 8), 0)
    first = tl.cast(chunk_of(a), tl.int64) * tl.cdiv(length_of(a, C), 8)
    return a.bits + (first + tl.cast(sample, tl.int64) * groups + before + row // 8) * a.shape.width


# ---- drawing


@triton.jit
def output_blocks(a, count, C: tl.constexpr):
    """Return the number of blocks into which the row groups of all samples are divided."""
    return tl.cdiv(count * tl.cdiv(length_of(a, C), 8), GROUPS)


@triton.jit
def drawing_tasks(a, count, C: tl.constexpr):
    """Return the number of tasks of draw, 0 without dropout."""
    tasks = count * 0
    if C.dropout:
        tasks += output_blocks(a, count, C) * modality_blocks(a.shape.widths, COLUMNS)
        if not C.stream:
            tasks += count * tl.cdiv(a.shape.width, COLUMNS) * modality_blocks(a.shape.widths, 8 * GROUPS)
    return tasks


@triton.jit
def draw(a, to, t, first, count, i, C: tl.constexpr):
    """Draw the bytes of task i of iteration t."""
    of_outputs = output_blocks(a, count, C) * modality_blocks(a.shape.widths, COLUMNS)
    if i < of_outputs:
        draw_output(a, t, first, count, i, C)
    elif not C.stream:
        draw_correlation(a, t, first, count, i - of_outputs, C)


@triton.jit
def draw_output(a, t, first, count, i, C: tl.constexpr):
    """Draw for U, with the groups of all samples in sequence."""
    m, offset, c, block = modality_task(a.shape.widths, i, output_blocks(a, count, C), COLUMNS)
    of_sample = tl.cdiv(length_of(a, C), 8)
    group = (block * GROUPS + tl.arange(0, GROUPS))[:, None]
    column = (c + tl.arange(0, COLUMNS))[None, :]
    mask = (group < count * of_sample) & (column < entry(a.shape.widths, m))
    p = output_bits(a, group // of_sample, group % of_sample * 8, C) + offset + column
    store_bits(p, a, column, group % of_sample, first + group // of_sample, t, m, 1, mask)


@triton.jit
def draw_correlation(a, t, first, count, i, C: tl.constexpr):
    """Draw for C: the rows of one modality and the columns of all."""
    width = a.shape.width
    blocks = tl.cdiv(width, COLUMNS)
    m, _, row, place = modality_task(a.shape.widths, i, count * blocks, 8 * GROUPS)
    sample = place // blocks
    group = (row // 8 + tl.arange(0, GROUPS))[:, None]
    column = (place % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = (group * 8 < entry(a.shape.widths, m)) & (column < width)
    p = correlation_bits(a, sample, m, group * 8, C) + column
    store_bits(p, a, column, group, first + sample, t, m, 0, mask)
