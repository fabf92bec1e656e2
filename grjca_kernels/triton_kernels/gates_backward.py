"""The backward of the gates: the gradients from Y_m, the gate values and the iterates to X^0..X^T.

Gradients of the logits, before the division by tau, are kept in the workspace, [modality, row, way], for the gates'
weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grjca_kernels.triton_kernels.gates import (
    UNROLLED,
    choice,
    first_way,
    frame_block,
    frame_blocks,
    gate_values,
    mixture,
    stage,
    state_of_gate,
    states,
    value,
    values_of,
    ways_of,
)
from grjca_kernels.triton_kernels.iteration_backward import d_state
from grjca_kernels.triton_kernels.primitives import (
    chunk_of,
    entry,
    frames,
    gate_parameter,
    last_program,
    length_of,
    load_tile,
    offset_of,
    product,
    slot,
    store_tile,
    view_of,
    where_positive,
    zeros,
)


@triton.jit
def d_logits_of(a, row, m, way, C: tl.constexpr):
    """Return the pointer to the gradient of the logit of a row and way."""
    rows, width = chunk_of(a) * length_of(a, C), a.shape.width
    place = slot(a, C.slots) + C.correlations * tl.cast(chunk_of(a), tl.int64) * width * width
    return place + (tl.cast(m, tl.int64) * rows + row) * C.ways + way


@triton.jit
def incoming(views, step, sample, r, m, c, present, d_m, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load a tile of a gradient from the caller in float32; zeros for absent frames, or if none was passed."""
    data, s_sample, s_frame, s_column, given = view_of(views, m)
    o_r, o_c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    p = data + tl.cast(sample, tl.int64) * s_sample + step
    p += (r + o_r).to(tl.int64)[:, None] * s_frame + (c + o_c).to(tl.int64)[None, :] * s_column
    mask = present & (c + o_c < tl.where(given == 0, 0, d_m))[None, :]
    return tl.load(p, mask=mask, other=0).to(tl.float32)


@triton.jit
def gates_backward(a, to, t, first, count, C: tl.constexpr):
    """Recompute the gate values, and compute the gradients of their logits."""
    length, o_r = length_of(a, C), tl.arange(0, C.block_frames)
    for i in tl.range(last_program(), frame_blocks(a, count, C), tl.num_programs(0), disable_licm=True):
        sample, r, m = frame_block(a, i, C)
        row, rows = tl.cast(sample, tl.int64) * length + r, length - r
        present = (r + o_r < frames(a, first + sample, C))[:, None]
        gate_values(a, first, row, m, rows, C)
        for g in tl.range(C.gates, disable_licm=True):
            logits(a, to, first, sample, r, row, m, g, rows, present, C)


@triton.jit
def states_backward(a, to, t, first, count, C: tl.constexpr):
    """Compute d X^t without the iterations' part. Every program has the same frames as in gates_backward."""
    for i in tl.range(last_program(), frame_blocks(a, count, C), tl.num_programs(0), disable_licm=True):
        sample, r, m = frame_block(a, i, C)
        state_backward(a, to, first, sample, r, m, t, C)


@triton.jit
def d_mixture(a, to, first, sample, r, row, m, c, rows, present, C: tl.constexpr):
    """Return d Y_m through its relu."""
    d_m = entry(a.shape.widths, m)
    d = incoming(to.outputs, 0, first + sample, r, m, c, present, d_m, C.block_frames, C.block_columns)
    if C.gates > 0:
        d = where_positive(mixture(a, first, row, m, c, rows, C), d)
    return d


@triton.jit
def d_stage(a, first, row, m, t, c, rows, d, C: tl.constexpr):
    """Return Z^t before its relu and the gradient there ("hierarchical" only); d is the gradient of the sum before Y's
    relu."""
    z = stage(a, first, row, m, t, c, rows, C)
    last = tl.zeros((), tl.int32) + C.iterations
    return where_positive(z, value(a, row, m, first_way(last) + t - 1, rows, C) * d)


@triton.jit
def add_way(d_values, way, d, choices):
    """Add the row sums of d * choices to one way of d_values."""
    o_w = tl.arange(0, d_values.shape[1])
    return d_values + tl.where((o_w == way)[None, :], tl.sum(d * choices, axis=1)[:, None], 0.0)


@triton.jit
def logits(a, to, first, sample, r, row, m, g, rows, present, C: tl.constexpr):
    """Compute the gradients of the logits through the softmax of gate g."""
    d_m, ways = entry(a.shape.widths, m), ways_of(g, C)
    d_values = incoming(
        to.gates, 0, first + sample, r, m, first_way(g), present, first_way(g) + ways, C.block_frames, C.block_ways
    )
    for c in tl.range(0, d_m, C.block_columns, disable_licm=True):
        d = d_mixture(a, to, first, sample, r, row, m, c, rows, present, C)
        if C.gating == "hierarchical":
            if g < C.iterations:
                d = d_stage(a, first, row, m, g + 1, c, rows, d, C)
                for s in tl.range(0, ways, disable_licm=True):
                    d_values = add_way(d_values, s, d, states(a, s, first, row, m, c, rows, C))
            else:
                for s in tl.range(0, ways, disable_licm=True):
                    d_values = add_way(d_values, s, d, choice(a, first, row, m, s, c, rows, C))
        elif C.ways > UNROLLED:
            for s in tl.range(0, ways, disable_licm=True):
                d_values = add_way(d_values, s, d, choice(a, first, row, m, s, c, rows, C))
        else:
            LAST: tl.constexpr = C.ways
            for s in tl.static_range(LAST):  # all loads at once
                d_values = add_way(d_values, s, d, choice(a, first, row, m, s, c, rows, C))
    p_values = values_of(a, row, m, first_way(g), C)
    b_g = load_tile(p_values, C.ways, 1, rows, ways, C.block_frames, C.block_ways)
    d_logits = b_g * (d_values - tl.sum(b_g * d_values, axis=1)[:, None]) / a.scalars.temperature
    store_tile(d_logits_of(a, row, m, first_way(g), C), C.ways, tl.where(present, d_logits, 0.0), rows, ways)


@triton.jit
def state_backward(a, to, first, sample, r, m, t, C: tl.constexpr):
    """Compute a block of frames of d X_m^t."""
    length = length_of(a, C)
    row, rows = tl.cast(sample, tl.int64) * length + r, length - r
    present = (r + tl.arange(0, C.block_frames) < frames(a, first + sample, C))[:, None]
    for c in tl.range(0, entry(a.shape.widths, m), C.block_columns, disable_licm=True):
        state_gradient(a, to, first, sample, r, row, m, t, c, rows, present, C)


@triton.jit
def state_gradient(a, to, first, sample, r, row, m, t, c, rows, present, C: tl.constexpr):
    """Compute a tile of d X_m^t."""
    width, offset, d_m = a.shape.width, offset_of(a.shape.widths, m), entry(a.shape.widths, m)
    d_y = d_mixture(a, to, first, sample, r, row, m, c, rows, present, C)
    d = zeros(C.block_frames, C.block_columns)
    if C.gating == "none":
        d = tl.where(t == C.iterations, d_y, d)
    elif C.gating == "flat":
        d = value(a, row, m, t, rows, C) * d_y
    elif C.gating == "dynamic":
        d = tl.where(t == C.iterations, value(a, row, m, 1, rows, C) * d_y, d)
        d = tl.where(t == 0, value(a, row, m, 0, rows, C) * d_y, d)
    else:
        for u in tl.range(tl.maximum(t, 1), C.iterations + 1, disable_licm=True):
            d_z = d_stage(a, first, row, m, u, c, rows, d_y, C)
            d += value(a, row, m, first_way(u - 1) + t, rows, C) * d_z
    if C.gates > 0:
        for g in tl.range(C.gates, disable_licm=True):
            if state_of_gate(g, C) == t:
                p_d = d_logits_of(a, row, m, first_way(g), C)
                p_w = gate_parameter(a.parameters, m, g, 0, C) + c
                d = product(d, p_d, C.ways, 1, p_w, d_m, 1, rows, d_m - c, ways_of(g, C), C.block_ways, C)
    if C.d_iterates:
        if t > 0:
            step = tl.cast(t - 1, tl.int64) * entry(to.iterates_steps, m)
            d += incoming(to.iterates, step, first + sample, r, m, c, present, d_m, C.block_frames, C.block_columns)
    place = row * width + offset + c
    store_tile(d_state(a, t, C) + place, width, tl.where(present, d, 0.0), rows, d_m - c)
