"""The phases of one iteration, forward; the backward also runs them, to recompute.

Every phase is a loop over tasks, one tile each, which the programs of the grid share. ``first`` and ``count`` are the
samples of the chunk. Its activations are stored in the workspace as [rows, d], the modalities side by side, K_m
transposed and divided by sqrt(d). t counts from 0.

There are two dataflows (config.Constants.stream). For few frames C_m is streamed, tile by tile, and never stored. For
many frames it is stored in the workspace, [chunk, d, d] with dropout applied, because every block of frames needs it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grjca_kernels.triton_kernels.masks import (
    correlation_bits,
    draw,
    drawing_tasks,
    factors_of_correlation,
    load_factors,
    output_bits,
)
from grjca_kernels.triton_kernels.primitives import (
    add_row,
    dot,
    entry,
    frames,
    layer_of,
    length_of,
    load_tile,
    modality_blocks,
    modality_task,
    offset_of,
    parameter,
    product,
    relu,
    run_task,
    slot,
    state,
    store_tile,
    tanh,
    task_of,
    turns,
    view_of,
    zero_vector,
    zeros,
)

KEY: tl.constexpr = tl.constexpr(0)
VALUE: tl.constexpr = tl.constexpr(1)
OUTPUT: tl.constexpr = tl.constexpr(2)


@triton.jit
def linear_parameter(a, layer, m, KIND: tl.constexpr, BIAS: tl.constexpr, C: tl.constexpr):
    """Return the pointer to W_k, W_v or W_h of modality m, or to its bias."""
    STEP: tl.constexpr = 2 if C.released else 1
    FIRST: tl.constexpr = (2 if C.projected else 0) + KIND * C.modalities * STEP + BIAS
    return parameter(a.parameters, layer, m, FIRST, STEP, C)


# ---- X^0


@triton.jit
def initial(a, to, t, first, count, C: tl.constexpr):
    """Compute X^0: clear absent frames, and divide every frame by max(|x|, 1e-12) if requested."""
    length, width = length_of(a, C), a.shape.width
    blocks, modalities = tl.cdiv(length, C.block_frames), len(a.shape.widths)
    o_c = tl.arange(0, C.block_columns)
    for i in tl.range(tl.program_id(0), count * blocks * modalities, tl.num_programs(0), disable_licm=True):
        m, sample, r = i % modalities, i // modalities // blocks, i // modalities % blocks * C.block_frames
        d_m, offset = entry(a.shape.widths, m), offset_of(a.shape.widths, m)
        p_x, s_column, m_x = feature_rows(a, first + sample, r, m, C)
        norm = norm_of_rows(p_x, s_column, m_x, d_m, C)
        p_to = slot(a, C.slot_initial) + (tl.cast(sample, tl.int64) * length + r) * width + offset
        for c in range(0, d_m, C.block_columns):
            mask = m_x[:, None] & (c + o_c < d_m)[None, :]
            b_x = tl.load(p_x[:, None] + (c + o_c).to(tl.int64)[None, :] * s_column, mask=mask, other=0)
            store_tile(p_to + c, width, b_x.to(tl.float32) / norm[:, None], length - r, d_m - c)


@triton.jit
def feature_rows(a, sample, r, m, C: tl.constexpr):
    """Return pointers to rows r, r + 1, ... of a feature, the column stride, and which rows are present."""
    o_r = tl.arange(0, C.block_frames)
    data, s_sample, s_frame, s_column, _ = view_of(a.features, m)
    p_x = data + tl.cast(sample, tl.int64) * s_sample + (r + o_r).to(tl.int64) * s_frame
    return p_x, s_column, r + o_r < frames(a, sample, C)


@triton.jit
def norm_of_rows(p_x, s_column, m_x, d_m, C: tl.constexpr):
    """Return max(|x|, 1e-12) of rows, or 1 unless normalising."""
    o_c = tl.arange(0, C.block_columns)
    norm = zero_vector(C.block_frames) + 1
    if C.normalize:
        squares = zeros(C.block_frames, C.block_columns)
        for c in range(0, d_m, C.block_columns):
            mask = m_x[:, None] & (c + o_c < d_m)[None, :]
            b_x = tl.load(p_x[:, None] + (c + o_c).to(tl.int64)[None, :] * s_column, mask=mask, other=0).to(tl.float32)
            squares += b_x * b_x
        norm = tl.sqrt(tl.sum(squares, axis=1))
        norm = tl.where(norm < 1e-12, 1e-12, norm)
    return norm


# ---- J, V, K


@triton.jit
def project(a, to, t, first, count, C: tl.constexpr):
    """Compute everything that needs only X^t: J = X W_q^T + b_q, K_m (key_task), V_m = X_m W_v^T + b_v, dropout masks.

    They run in this order because the sums of J are the longest and drawing is the cheapest.
    """
    of_joint, of_linear = joint_tasks(a, count, C), linear_tasks(a, count, C)
    of_key, of_bits = key_tasks(a, count, C), drawing_tasks(a, count, C)
    for turn in tl.range(0, turns(of_linear + of_key + of_bits), disable_licm=True):
        i = task_of(turn)
        if (i >= of_joint) & (i < of_joint + of_key):
            run_task(key_task, a, to, t, first, count, i - of_joint, of_key, C)
        elif i < of_linear + of_key:
            run_task(linear_task, a, to, t, first, count, tl.where(i < of_joint, i, i - of_key), of_linear, C)
        elif C.dropout:
            run_task(draw, a, to, t, first, count, i - of_linear - of_key, of_bits, C)


@triton.jit
def joint_tasks(a, count, C: tl.constexpr):
    """Return how many tasks of linear_task make J; they come first."""
    n_rows = tl.cdiv(count * length_of(a, C), C.block_m)
    return n_rows * tl.cdiv(a.shape.width, C.block_n) if C.projected else n_rows * 0


@triton.jit
def linear_tasks(a, count, C: tl.constexpr):
    """Return the number of tasks of linear_task."""
    n_rows = tl.cdiv(count * length_of(a, C), C.block_m)
    return joint_tasks(a, count, C) + n_rows * modality_blocks(a.shape.widths, C.block_n)


@triton.jit
def linear_task(a, to, t, first, count, i, C: tl.constexpr):
    """Compute tile i of J or V."""
    of_joint = joint_tasks(a, count, C)
    width, layer, all_rows = a.shape.width, layer_of(t, C), count * length_of(a, C)
    m, offset, c, i_row = modality_task(a.shape.widths, i - of_joint, tl.cdiv(all_rows, C.block_m), C.block_n)
    outputs = entry(a.shape.widths, m)
    p_weight = linear_parameter(a, layer, m, VALUE, 0, C)
    i_slot = C.slot_value
    p_bias = linear_parameter(a, layer, m, VALUE, 1, C) if C.released else p_weight
    if C.projected:
        of_query, n_joint = i < of_joint, tl.cdiv(width, C.block_n)
        i_row = tl.where(of_query, i // n_joint, i_row)
        c = tl.where(of_query, i % n_joint * C.block_n, c)
        offset = tl.where(of_query, 0, offset)
        outputs = tl.where(of_query, width, outputs)
        p_weight = tl.where(of_query, parameter(a.parameters, layer, 0, 0, 0, C), p_weight)
        p_bias = tl.where(of_query, parameter(a.parameters, layer, 0, 1, 0, C), p_bias)
        i_slot = tl.where(of_query, C.slot_joint, C.slot_value)
    r = i_row * C.block_m
    rows, columns = all_rows - r, outputs - c
    p_x = state(a, t, first, C) + tl.cast(r, tl.int64) * width + offset
    p_w = p_weight + tl.cast(c, tl.int64) * outputs
    acc = zeros(C.block_m, C.block_n)
    acc = product(acc, p_x, width, 1, p_w, 1, outputs, rows, columns, outputs, C.block_k, C)
    if C.released:
        acc = add_row(acc, p_bias + c, columns)
    store_tile(slot(a, i_slot) + tl.cast(r, tl.int64) * width + offset + c, width, acc, rows, columns)


@triton.jit
def key_tasks(a, count, C: tl.constexpr):
    """Return the number of tasks of key_task."""
    return count * tl.cdiv(length_of(a, C), C.block_l) * modality_blocks(a.shape.widths, C.block_key)


@triton.jit
def key_task(a, to, t, first, count, i, C: tl.constexpr):
    """Compute tile i of K_m^T = (W_k X_m + b_k) / sqrt(d), [L, d_m]; absent rows are 0."""
    length, width, layer = length_of(a, C), a.shape.width, layer_of(t, C)
    n_l = tl.cdiv(length, C.block_l)
    m, offset, c, place = modality_task(a.shape.widths, i, count * n_l, C.block_key)
    sample, l = place // n_l, place % n_l * C.block_l
    present, rows, columns = frames(a, first + sample, C), length - l, entry(a.shape.widths, m) - c
    o_l = tl.arange(0, C.block_l)
    p_x = state(a, t, first, C) + tl.cast(sample, tl.int64) * length * width + offset + c
    p_w = linear_parameter(a, layer, m, KEY, 0, C) + tl.cast(l, tl.int64) * length
    acc = zeros(C.block_l, C.block_key)
    acc = product(acc, p_w, length, 1, p_x, width, 1, rows, columns, present, C.block_time, C)
    if C.released:
        p_bias = linear_parameter(a, layer, m, KEY, 1, C)
        acc += tl.load(p_bias + l + o_l, mask=o_l < rows, other=0).to(tl.float32)[:, None]
    acc = tl.where((l + o_l < present)[:, None], acc * a.scalars.key_scale, 0.0)
    p_to = slot(a, C.slot_key) + (tl.cast(sample, tl.int64) * length + l) * width + offset + c
    store_tile(p_to, width, acc, rows, columns)


@triton.jit
def joint(a, t, first, C: tl.constexpr):
    """Return the pointer to J of the chunk, which is X^t where J is raw."""
    return slot(a, C.slot_joint) if C.projected else state(a, t, first, C)


# ---- C and H, streamed


@triton.jit
def attend(a, to, t, first, count, C: tl.constexpr):
    """Compute H_m = relu(tanh(V_m C_m)) without storing C_m: transposed, [columns j, frames], like attention of width
    L."""
    length, width = length_of(a, C), a.shape.width
    blocks, modalities = tl.cdiv(width, C.block_m), len(a.shape.widths)
    for i in tl.range(tl.program_id(0), count * modalities * blocks, tl.num_programs(0), disable_licm=True):
        sample, m, j = i // blocks // modalities, i // blocks % modalities, i % blocks * C.block_m
        d_m, place = entry(a.shape.widths, m), tl.cast(sample, tl.int64) * length * width
        p_key = slot(a, C.slot_key) + place + offset_of(a.shape.widths, m)
        p_value = slot(a, C.slot_value) + place + offset_of(a.shape.widths, m)
        b_joint = load_tile(
            joint(a, t, first, C) + place + j, 1, width, width - j, length, C.block_m, C.block_l
        )  # J^T [j, l]
        acc = zeros(C.block_m, C.block_l)
        tl.assume(d_m > 0)
        for c in range(0, d_m, C.block_c):
            b_key = load_tile(p_key + c, width, 1, length, d_m - c, C.block_l, C.block_c)
            b_value = load_tile(p_value + c, 1, width, d_m - c, length, C.block_c, C.block_l)
            b_c = tanh(dot(b_joint, b_key, None, C), C)
            if C.dropout:
                b_c *= factors_of_correlation(a, first + sample, t, m, c, j, C.block_c, C.block_m)
            acc = dot(b_c.to(b_value.dtype), b_value, acc, C)
        p_to = slot(a, C.slot_hidden) + place * modalities + m * width + j
        store_tile(p_to, modalities * width, tl.trans(hidden(acc, C)), length, width - j)


@triton.jit
def hidden(attended, C: tl.constexpr):
    """Return H from V C."""
    return relu(tanh(attended, C)) if C.released else relu(attended)


# ---- C and H, stored


@triton.jit
def correlate(a, to, t, first, count, C: tl.constexpr):
    """Store C_m = drop(tanh(K_m J / sqrt(d))) in the workspace."""
    length, width = length_of(a, C), a.shape.width
    n_j = tl.cdiv(width, C.block_n)
    tasks = count * n_j * modality_blocks(a.shape.widths, C.block_m)
    for i in tl.range(tl.program_id(0), tasks, tl.num_programs(0), disable_licm=True):
        m, offset, c, of_modality = modality_task(a.shape.widths, i, count * n_j, C.block_m)
        sample, j = of_modality // n_j, of_modality % n_j * C.block_n
        place, rows = tl.cast(sample, tl.int64) * length * width, entry(a.shape.widths, m) - c
        p_key = slot(a, C.slot_key) + place + offset + c
        p_joint = joint(a, t, first, C) + place + j
        acc = zeros(C.block_m, C.block_n)
        acc = product(
            acc, p_key, 1, width, p_joint, width, 1, rows, width - j, frames(a, first + sample, C), C.block_k, C
        )
        b_c = tanh(acc, C)
        if C.dropout:
            b_c *= correlation_factors(a, sample, m, c, j, rows, C)
        store_tile(correlation(a, sample, offset + c, C) + j, width, b_c, rows, width - j)


@triton.jit
def correlation_factors(a, sample, m, c, j, rows, C: tl.constexpr):
    """Load 0 or 1 / (1 - p) for a tile of C_m from row c and column j."""
    o_c, o_j = tl.arange(0, C.block_m)[:, None], tl.arange(0, C.block_n)[None, :]
    p = correlation_bits(a, sample, m, c + o_c, C) + j + o_j
    return load_factors(p, a, c + o_c, (o_c < rows) & (o_j < a.shape.width - j))


@triton.jit
def correlation(a, sample, row, C: tl.constexpr):
    """Return the pointer to a row of a sample's stored C, [d, d], with the rows of all modalities in sequence."""
    return slot(a, C.slots) + (tl.cast(sample, tl.int64) * a.shape.width + row) * a.shape.width


@triton.jit
def attend_stored(a, to, t, first, count, C: tl.constexpr):
    """Compute H_m = relu(tanh(V_m C_m)) from the stored C_m."""
    length, width = length_of(a, C), a.shape.width
    n_l, n_j, modalities = tl.cdiv(length, C.block_l), tl.cdiv(width, C.block_n), len(a.shape.widths)
    of_modality = count * n_l * n_j
    for i in tl.range(tl.program_id(0), modalities * of_modality, tl.num_programs(0), disable_licm=True):
        m, sample = i // of_modality, i % of_modality // n_j // n_l
        l, j = i % of_modality // n_j % n_l * C.block_l, i % of_modality % n_j * C.block_n
        offset, row = offset_of(a.shape.widths, m), tl.cast(sample, tl.int64) * length + l
        p_value = slot(a, C.slot_value) + row * width + offset
        p_c = correlation(a, sample, offset, C) + j
        acc = zeros(C.block_l, C.block_n)
        acc = product(
            acc, p_value, width, 1, p_c, width, 1, length - l, width - j, entry(a.shape.widths, m), C.block_k, C
        )
        p_to = slot(a, C.slot_hidden) + row * modalities * width + m * width + j
        store_tile(p_to, modalities * width, hidden(acc, C), length - l, width - j)


# ---- U


@triton.jit
def project_output(a, t, r, m, c, rows, columns, C: tl.constexpr):
    """Compute a tile of H_m W_h^T + b_h, before relu and dropout."""
    width, hidden_width = a.shape.width, len(a.shape.widths) * a.shape.width
    p_h = slot(a, C.slot_hidden) + tl.cast(r, tl.int64) * hidden_width + m * width
    p_w = linear_parameter(a, layer_of(t, C), m, OUTPUT, 0, C) + tl.cast(c, tl.int64) * width
    acc = zeros(C.block_m, C.block_n)
    acc = product(acc, p_h, hidden_width, 1, p_w, 1, width, rows, columns, width, C.block_k, C)
    if C.released:
        acc = add_row(acc, linear_parameter(a, layer_of(t, C), m, OUTPUT, 1, C) + c, columns)
    return acc


@triton.jit
def output_factors(a, first, count, r, m, offset, c, C: tl.constexpr):
    """Return the factors of a tile of U_m from row r and column c: dropout, and 0 or 1 by presence ([rows, 1])."""
    length = length_of(a, C)
    o_r, o_c = r + tl.arange(0, C.block_m), c + tl.arange(0, C.block_n)
    sample, o_l = o_r // length, o_r % length
    factors = zeros(C.block_m, C.block_n) + 1
    if C.dropout:
        p = output_bits(a, sample[:, None], o_l[:, None], C) + (offset + o_c)[None, :]
        mask = (sample < count)[:, None] & (o_c < entry(a.shape.widths, m))[None, :]
        factors = load_factors(p, a, o_l[:, None], mask)
    present = o_l < length
    if C.lengths:
        present = o_l < frames(a, first + tl.minimum(sample, count - 1), C)
    return factors, present[:, None]


@triton.jit
def output_tile(a, t, first, count, i, n_rows, C: tl.constexpr):
    """Compute tile ``i`` of H_m W_h^T + b_h; return also its dropout factors, present frames, place and extent."""
    m, offset, c, i_row = modality_task(a.shape.widths, i, n_rows, C.block_n)
    r = i_row * C.block_m
    rows, columns = count * length_of(a, C) - r, entry(a.shape.widths, m) - c
    update = project_output(a, t, r, m, c, rows, columns, C)
    factors, present = output_factors(a, first, count, r, m, offset, c, C)
    return update, factors, present, tl.cast(r, tl.int64) * a.shape.width + offset + c, rows, columns


@triton.jit
def output(a, to, t, first, count, C: tl.constexpr):
    """Compute X_m^(t+1) = X_m^t + drop(relu(H_m W_h^T + b_h)); absent rows stay 0."""
    width, all_rows = a.shape.width, count * length_of(a, C)
    n_rows = tl.cdiv(all_rows, C.block_m)
    tasks = n_rows * modality_blocks(a.shape.widths, C.block_n)
    for i in tl.range(tl.program_id(0), tasks, tl.num_programs(0), disable_licm=True):
        update, factors, present, place, rows, columns = output_tile(a, t, first, count, i, n_rows, C)
        if C.released:
            update = relu(update) * factors
        b_x = load_tile(state(a, t, first, C) + place, width, 1, rows, columns, C.block_m, C.block_n)
        b_x = b_x.to(tl.float32) + tl.where(present, update, 0.0)
        store_tile(state(a, t + 1, first, C) + place, width, b_x, rows, columns)
