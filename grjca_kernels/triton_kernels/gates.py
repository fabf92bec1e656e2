"""The gates, and the outputs they mix. A task is a block of frames of one modality; s and t count states X^0..X^T.

The ways of all gates of a modality are stored in sequence, stages first: gate g begins at way g (g + 3) / 2 (only
"hierarchical" has more than one). G is kept in the workspace in float32, [modality, row, way].
"""

from __future__ import annotations

import triton
import triton.language as tl

from grjca_kernels.triton_kernels.primitives import (
    chunk_of,
    entry,
    frames,
    gate_parameter,
    length_of,
    load_tile,
    offset_of,
    product,
    relu,
    state,
    store_tile,
    view_of,
    zeros,
)

UNROLLED: tl.constexpr = tl.constexpr(5)
"""The most ways of "flat" that are loaded at once; there are not enough registers for more."""


@triton.jit
def first_way(g):
    """Return the first way of gate g; the stage of X^t is gate t - 1."""
    return g * (g + 3) // 2


@triton.jit
def ways_of(g, C: tl.constexpr):
    """Return how many ways gate g has."""
    if C.gating == "hierarchical":
        return tl.where(g < C.iterations, g + 2, C.iterations)
    else:
        return g * 0 + C.ways


@triton.jit
def state_of_gate(g, C: tl.constexpr):
    """Return the t of the X^t that gate g is computed from."""
    if C.gating == "hierarchical":
        return tl.minimum(g + 1, C.iterations)
    else:
        return g * 0 + C.iterations


@triton.jit
def frame_block(a, i, C: tl.constexpr):
    """Return for task i its sample within the chunk, first frame and modality."""
    blocks, modalities = tl.cdiv(length_of(a, C), C.block_frames), len(a.shape.widths)
    return i // modalities // blocks, i // modalities % blocks * C.block_frames, i % modalities


@triton.jit
def frame_blocks(a, count, C: tl.constexpr):
    """Return the number of tasks."""
    return count * len(a.shape.widths) * tl.cdiv(length_of(a, C), C.block_frames)


@triton.jit
def states(a, t, first, row, m, c, rows, C: tl.constexpr):
    """Load a tile of X_m^t in float32: block_frames rows from ``row`` of the chunk, block_columns columns from c."""
    offset, d_m = offset_of(a.shape.widths, m), entry(a.shape.widths, m)
    p = state(a, t, first, C) + row * a.shape.width + offset + c
    return load_tile(p, a.shape.width, 1, rows, d_m - c, C.block_frames, C.block_columns).to(tl.float32)


@triton.jit
def values_of(a, row, m, way, C: tl.constexpr):
    """Return the pointer to G of a row and way."""
    rows = chunk_of(a) * length_of(a, C)
    return a.fp32_workspace + (tl.cast(m, tl.int64) * rows + row) * C.ways + way


@triton.jit
def value(a, row, m, way, rows, C: tl.constexpr):
    """Load G of one way, [block_frames, 1]."""
    o_r = tl.arange(0, C.block_frames)
    return tl.load(values_of(a, row, m, way, C) + o_r * C.ways, mask=o_r < rows, other=0)[:, None]


@triton.jit
def gate_values(a, first, row, m, rows, C: tl.constexpr):
    """Store G = softmax((x W_g^T + b_g) / tau) of every gate in the workspace."""
    width, offset, d_m = a.shape.width, offset_of(a.shape.widths, m), entry(a.shape.widths, m)
    o_w = tl.arange(0, C.block_ways)
    for g in tl.range(C.gates, disable_licm=True):
        ways = ways_of(g, C)
        p_x = state(a, state_of_gate(g, C), first, C) + row * width + offset
        p_w = gate_parameter(a.parameters, m, g, 0, C)
        logits = zeros(C.block_frames, C.block_ways)
        logits = product(logits, p_x, width, 1, p_w, 1, d_m, rows, ways, d_m, C.block_k, C)
        if C.released:
            p_bias = gate_parameter(a.parameters, m, g, 1, C)
            logits += tl.load(p_bias + o_w, mask=o_w < ways, other=0).to(tl.float32)[None, :]
        logits = tl.where((o_w < ways)[None, :], logits / a.scalars.temperature, float("-inf"))
        powers = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        store_tile(values_of(a, row, m, first_way(g), C), C.ways, powers / tl.sum(powers, axis=1)[:, None], rows, ways)
    tl.debug_barrier()  # other threads of this program read them


@triton.jit
def stage(a, first, row, m, t, c, rows, C: tl.constexpr):
    """Compute sum_s S^t_s X^s for s = 0..t, whose relu is Z^t ("hierarchical" only)."""
    acc = zeros(C.block_frames, C.block_columns)
    for s in tl.range(0, t + 1, disable_licm=True):
        acc += value(a, row, m, first_way(t - 1) + s, rows, C) * states(a, s, first, row, m, c, rows, C)
    return acc


@triton.jit
def choice(a, first, row, m, i, c, rows, C: tl.constexpr):
    """Return the choice of way i of the last gate."""
    if C.gating == "hierarchical":
        return relu(stage(a, first, row, m, i + 1, c, rows, C))
    elif C.gating == "dynamic":
        return states(a, 0 if i == 0 else C.iterations, first, row, m, c, rows, C)
    else:
        return states(a, i, first, row, m, c, rows, C)


@triton.jit
def mixture(a, first, row, m, c, rows, C: tl.constexpr):
    """Compute sum_i G_i choice_i, whose relu is Y."""
    acc = zeros(C.block_frames, C.block_columns)
    if C.gating == "hierarchical" or C.ways > UNROLLED:
        last = C.gates - 1 + tl.minimum(rows, 0)  # adds 0, unknown to the compiler, so it does not unroll the loop
        for i in tl.range(0, ways_of(last, C), disable_licm=True):
            acc += value(a, row, m, first_way(last) + i, rows, C) * choice(a, first, row, m, i, c, rows, C)
    else:
        LAST: tl.constexpr = C.ways
        for i in tl.static_range(LAST):  # all loads at once
            acc += value(a, row, m, i, rows, C) * choice(a, first, row, m, i, c, rows, C)
    return acc


@triton.jit
def gate(a, to, t, first, count, C: tl.constexpr):
    """Store Y_m, and the gate values if requested."""
    length = length_of(a, C)
    o_r, o_c, o_w = tl.arange(0, C.block_frames), tl.arange(0, C.block_columns), tl.arange(0, C.block_ways)
    for i in tl.range(tl.program_id(0), frame_blocks(a, count, C), tl.num_programs(0), disable_licm=True):
        sample, r, m = frame_block(a, i, C)
        row, rows, d_m = tl.cast(sample, tl.int64) * length + r, length - r, entry(a.shape.widths, m)
        present = (r + o_r < frames(a, first + sample, C))[:, None]
        if C.gates > 0:
            gate_values(a, first, row, m, rows, C)
        p_y, s_column = rows_of(to.outputs, first + sample, r, m, C)
        for c in tl.range(0, d_m, C.block_columns, disable_licm=True):
            if C.gates > 0:
                b_y = relu(mixture(a, first, row, m, c, rows, C))
            else:
                b_y = states(a, C.iterations, first, row, m, c, rows, C)
            mask = (o_r < rows)[:, None] & (c + o_c < d_m)[None, :]
            b_y = tl.where(present, b_y, 0.0).to(a.activation_workspace.dtype.element_ty)
            tl.store(p_y[:, None] + (c + o_c).to(tl.int64)[None, :] * s_column, b_y, mask=mask)
        if C.return_gates:
            p_g, s_way = rows_of(to.gates, first + sample, r, m, C)
            for w in range(0, C.ways, C.block_ways):
                mask = (o_r < rows)[:, None] & (w + o_w < C.ways)[None, :]
                b_g = tl.load(values_of(a, row, m, w, C) + o_r[:, None] * C.ways + o_w[None, :], mask=mask, other=0)
                b_g = tl.where(present, b_g, 0.0).to(a.activation_workspace.dtype.element_ty)
                tl.store(p_g[:, None] + (w + o_w).to(tl.int64)[None, :] * s_way, b_g, mask=mask)


@triton.jit
def rows_of(views, sample, r, m, C: tl.constexpr):
    """Return pointers to rows r, r + 1, ... of a sample in one of the caller's tensors, and its column stride."""
    data, s_sample, s_frame, s_column, _ = view_of(views, m)
    o_r = tl.arange(0, C.block_frames)
    return data + tl.cast(sample, tl.int64) * s_sample + (r + o_r).to(tl.int64) * s_frame, s_column
