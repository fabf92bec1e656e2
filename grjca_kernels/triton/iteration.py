"""The phases of one iteration, forward; the backward runs them too, to recompute.

Every phase is a loop over tasks, one tile each, that the programs of the grid share out. ``first`` and ``count`` are
the samples of the chunk; its activations stand in the workspace as [rows, d], the modalities side by side, K_m
transposed and divided by sqrt(d). t counts from 0.

Two dataflows (config.Constants.stream): for few frames C_m is streamed, tile by tile, and never stored; for many it is
stored in the workspace, [chunk, d, d] with dropout applied, because every block of frames needs it again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grjca_kernels.triton.primitives import (
    add_row,
    entry,
    factors_of_correlation,
    factors_of_output,
    frames,
    layer_of,
    length_of,
    load_tile,
    modality_block,
    modality_blocks,
    offset_of,
    parameter,
    product,
    relu,
    slot,
    state,
    store_tile,
    tanh,
    view_of,
    zero_vector,
    zeros,
)

KEY: tl.constexpr = tl.constexpr(0)
VALUE: tl.constexpr = tl.constexpr(1)
OUTPUT: tl.constexpr = tl.constexpr(2)


@triton.jit
def linear_parameter(a, layer, m, KIND: tl.constexpr, BIAS: tl.constexpr, C: tl.constexpr):
    """Pointer to W_k, W_v or W_h of modality m, or to its bias."""
    STEP: tl.constexpr = 2 if C.released else 1
    FIRST: tl.constexpr = (2 if C.released else 0) + KIND * C.modalities * STEP + BIAS
    return parameter(a.parameters, layer, m, FIRST, STEP, C)


# ---- X^0


@triton.jit
def initial(a, first, count, C: tl.constexpr):
    """X^0: absent frames cleared, every frame divided by max(|x|, 1e-12) if asked for."""
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
    """Pointers to rows r, r + 1, ... of a feature, their step along columns, and which of them are present."""
    o_r = tl.arange(0, C.block_frames)
    data, s_sample, s_frame, s_column, _ = view_of(a.features, m)
    p_x = data + tl.cast(sample, tl.int64) * s_sample + (r + o_r).to(tl.int64) * s_frame
    return p_x, s_column, r + o_r < frames(a, sample, C)


@triton.jit
def norm_of_rows(p_x, s_column, m_x, d_m, C: tl.constexpr):
    """max(|x|, 1e-12) of rows; 1 unless normalising."""
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
def project(a, t, first, count, C: tl.constexpr):
    """J = X W_q^T + b_q, V_m = X_m W_v^T + b_v, and K_m by mix_time: all that needs only X^t."""
    n_rows = tl.cdiv(count * length_of(a, C), C.block_m)
    n_joint = tl.cdiv(a.shape.width, C.block_n) if C.released else 0
    columns = n_joint + modality_blocks(a.shape.widths, C.block_n)
    mixing = count * tl.cdiv(length_of(a, C), C.block_l) * modality_blocks(a.shape.widths, C.block_n)
    for i in tl.range(tl.program_id(0), n_rows * columns + mixing, tl.num_programs(0), disable_licm=True):
        if i < n_rows * columns:
            project_tile(a, t, first, count, i // columns * C.block_m, i % columns, n_joint, C)
        else:
            mix_time(a, t, first, i - n_rows * columns, C)


@triton.jit
def project_tile(a, t, first, count, r, i_column, n_joint, C: tl.constexpr):
    """A tile of J or of V, from row r on."""
    width, layer = a.shape.width, layer_of(t, C)
    m, offset, c = modality_block(a.shape.widths, i_column - n_joint, C.block_n)
    outputs = entry(a.shape.widths, m)
    p_weight = linear_parameter(a, layer, m, VALUE, 0, C)
    p_to = slot(a, C.slot_value)
    p_bias = p_weight
    if C.released:
        p_bias = linear_parameter(a, layer, m, VALUE, 1, C)
        joint = i_column < n_joint
        c = tl.where(joint, i_column * C.block_n, c)
        offset = tl.where(joint, 0, offset)
        outputs = tl.where(joint, width, outputs)
        p_weight = tl.where(joint, parameter(a.parameters, layer, 0, 0, 0, C), p_weight)
        p_bias = tl.where(joint, parameter(a.parameters, layer, 0, 1, 0, C), p_bias)
        p_to = tl.where(joint, slot(a, C.slot_joint), p_to)
    rows, columns = count * length_of(a, C) - r, outputs - c
    p_x = state(a, t, first, C) + tl.cast(r, tl.int64) * width + offset
    p_w = p_weight + tl.cast(c, tl.int64) * outputs
    acc = zeros(C.block_m, C.block_n)
    acc = product(acc, p_x, width, 1, p_w, 1, outputs, rows, columns, outputs, C.block_k, C)
    if C.released:
        acc = add_row(acc, p_bias + c, columns)
    store_tile(p_to + tl.cast(r, tl.int64) * width + offset + c, width, acc, rows, columns)


@triton.jit
def mix_time(a, t, first, i, C: tl.constexpr):
    """A tile of K_m^T = (W_k X_m + b_k) / sqrt(d), [L, d_m]; absent rows are 0."""
    length, width, layer = length_of(a, C), a.shape.width, layer_of(t, C)
    blocks = modality_blocks(a.shape.widths, C.block_n)
    sample, l = i // blocks // tl.cdiv(length, C.block_l), i // blocks % tl.cdiv(length, C.block_l) * C.block_l
    m, offset, c = modality_block(a.shape.widths, i % blocks, C.block_n)
    present, rows, columns = frames(a, first + sample, C), length - l, entry(a.shape.widths, m) - c
    o_l = tl.arange(0, C.block_l)
    p_x = state(a, t, first, C) + tl.cast(sample, tl.int64) * length * width + offset + c
    p_w = linear_parameter(a, layer, m, KEY, 0, C) + tl.cast(l, tl.int64) * length
    acc = zeros(C.block_l, C.block_n)
    acc = product(acc, p_w, length, 1, p_x, width, 1, rows, columns, present, C.block_k, C)
    if C.released:
        p_bias = linear_parameter(a, layer, m, KEY, 1, C)
        acc += tl.load(p_bias + l + o_l, mask=o_l < rows, other=0).to(tl.float32)[:, None]
    acc = tl.where((l + o_l < present)[:, None], acc * a.scalars.key_scale, 0.0)
    p_to = slot(a, C.slot_key) + (tl.cast(sample, tl.int64) * length + l) * width + offset + c
    store_tile(p_to, width, acc, rows, columns)


@triton.jit
def joint_of(a, t, first, C: tl.constexpr):
    """Pointer to J of the chunk; in the paper form it is X^t."""
    return slot(a, C.slot_joint) if C.released else state(a, t, first, C)


# ---- C and H, streamed


@triton.jit
def attend(a, t, first, count, C: tl.constexpr):
    """H_m = relu(tanh(V_m C_m)) without storing C_m; transposed, [columns j, frames], as attention of head width L."""
    length, width = length_of(a, C), a.shape.width
    blocks, modalities = tl.cdiv(width, C.block_m), len(a.shape.widths)
    for i in tl.range(tl.program_id(0), count * modalities * blocks, tl.num_programs(0), disable_licm=True):
        sample, m, j = i // blocks // modalities, i // blocks % modalities, i % blocks * C.block_m
        d_m, place = entry(a.shape.widths, m), tl.cast(sample, tl.int64) * length * width
        p_key = slot(a, C.slot_key) + place + offset_of(a.shape.widths, m)
        p_value = slot(a, C.slot_value) + place + offset_of(a.shape.widths, m)
        b_joint = load_tile(
            joint_of(a, t, first, C) + place + j, 1, width, width - j, length, C.block_m, C.block_l
        )  # J^T [j, l]
        acc = zeros(C.block_m, C.block_l)
        for c in range(0, d_m, C.block_n):
            b_key = load_tile(p_key + c, width, 1, length, d_m - c, C.block_l, C.block_n)
            b_value = load_tile(p_value + c, 1, width, d_m - c, length, C.block_n, C.block_l)
            b_c = tanh(tl.dot(b_joint, b_key, input_precision=C.precision), C)
            if C.dropout:
                b_c *= factors_of_correlation(a, first + sample, t, m, c, j, C.block_n, C.block_m)
            acc = tl.dot(b_c.to(b_value.dtype), b_value, acc, input_precision=C.precision)
        p_to = slot(a, C.slot_hidden) + place * modalities + m * width + j
        store_tile(p_to, modalities * width, tl.trans(hidden(acc, C)), length, width - j)


@triton.jit
def hidden(attended, C: tl.constexpr):
    """H from V C."""
    return relu(tanh(attended, C)) if C.released else relu(attended)


# ---- C and H, stored


@triton.jit
def correlate(a, t, first, count, C: tl.constexpr):
    """C_m = drop(tanh(K_m J / sqrt(d))) into the workspace."""
    length, width = length_of(a, C), a.shape.width
    n_j, n_c = tl.cdiv(width, C.block_n), modality_blocks(a.shape.widths, C.block_m)
    for i in tl.range(tl.program_id(0), count * n_c * n_j, tl.num_programs(0), disable_licm=True):
        sample, j = i // n_j // n_c, i % n_j * C.block_n
        m, offset, c = modality_block(a.shape.widths, i // n_j % n_c, C.block_m)
        place, rows = tl.cast(sample, tl.int64) * length * width, entry(a.shape.widths, m) - c
        p_key = slot(a, C.slot_key) + place + offset + c
        p_joint = joint_of(a, t, first, C) + place + j
        acc = zeros(C.block_m, C.block_n)
        acc = product(
            acc, p_key, 1, width, p_joint, width, 1, rows, width - j, frames(a, first + sample, C), C.block_k, C
        )
        b_c = tanh(acc, C)
        if C.dropout:
            b_c *= tl.trans(factors_of_correlation(a, first + sample, t, m, c, j, C.block_m, C.block_n))
        store_tile(correlation(a, sample, offset + c, C) + j, width, b_c, rows, width - j)


@triton.jit
def correlation(a, sample, row, C: tl.constexpr):
    """Pointer to a row of the stored C of a sample, [d, d], all modalities' rows one after another."""
    return slot(a, C.slots) + (tl.cast(sample, tl.int64) * a.shape.width + row) * a.shape.width


@triton.jit
def attend_stored(a, count, C: tl.constexpr):
    """H_m = relu(tanh(V_m C_m)) from the stored C_m."""
    length, width = length_of(a, C), a.shape.width
    n_l, n_j, modalities = tl.cdiv(length, C.block_l), tl.cdiv(width, C.block_n), len(a.shape.widths)
    for i in tl.range(tl.program_id(0), count * modalities * n_l * n_j, tl.num_programs(0), disable_licm=True):
        l, j = i // n_j % n_l * C.block_l, i % n_j * C.block_n
        m, sample = i // n_j // n_l % modalities, i // n_j // n_l // modalities
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
    """A tile of H_m W_h^T + b_h, before relu and dropout."""
    width, hidden_width = a.shape.width, len(a.shape.widths) * a.shape.width
    p_h = slot(a, C.slot_hidden) + tl.cast(r, tl.int64) * hidden_width + m * width
    p_w = linear_parameter(a, layer_of(t, C), m, OUTPUT, 0, C) + tl.cast(c, tl.int64) * width
    acc = zeros(C.block_m, C.block_n)
    acc = product(acc, p_h, hidden_width, 1, p_w, 1, width, rows, columns, width, C.block_k, C)
    if C.released:
        acc = add_row(acc, linear_parameter(a, layer_of(t, C), m, OUTPUT, 1, C) + c, columns)
    return acc


@triton.jit
def output_factors(a, t, first, count, r, m, c, C: tl.constexpr):
    """What multiplies a tile of U_m from row r and column c on: its dropout, and 0 or 1 by presence ([rows, 1])."""
    length = length_of(a, C)
    o_r, o_c = r + tl.arange(0, C.block_m), c + tl.arange(0, C.block_n)
    samples, o_l = first + o_r // length, o_r % length
    factors = zeros(C.block_m, C.block_n) + 1
    if C.dropout:
        factors = factors_of_output(a, samples[:, None], o_l[:, None], o_c[None, :], t, m)
    present = o_l < length
    if C.lengths:
        present = o_l < frames(a, tl.minimum(samples, first + count - 1), C)
    return factors, present[:, None]


@triton.jit
def output(a, t, first, count, C: tl.constexpr):
    """X_m^(t+1) = X_m^t + drop(relu(H_m W_h^T + b_h)); absent rows stay 0."""
    width, n_c = a.shape.width, modality_blocks(a.shape.widths, C.block_n)
    all_rows = count * length_of(a, C)
    for i in tl.range(tl.program_id(0), tl.cdiv(all_rows, C.block_m) * n_c, tl.num_programs(0), disable_licm=True):
        r = i // n_c * C.block_m
        m, offset, c = modality_block(a.shape.widths, i % n_c, C.block_n)
        rows, columns = all_rows - r, entry(a.shape.widths, m) - c
        update = project_output(a, t, r, m, c, rows, columns, C)
        factors, present = output_factors(a, t, first, count, r, m, c, C)
        if C.released:
            update = relu(update) * factors
        place = tl.cast(r, tl.int64) * width + offset + c
        b_x = load_tile(state(a, t, first, C) + place, width, 1, rows, columns, C.block_m, C.block_n)
        b_x = b_x.to(tl.float32) + tl.where(present, update, 0.0)
        store_tile(state(a, t + 1, first, C) + place, width, b_x, rows, columns)
