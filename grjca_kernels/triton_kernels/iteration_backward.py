"""The backward phases of one iteration; d_x is the gradient of the loss with respect to x.

The gradients of X^t and X^(t+1) are in the workspace (``d_state``), beside the activations that iteration.py
recomputes. d K_m is stored as K_m is, transposed, with the division by sqrt(d) still to be undone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grjca_kernels.triton_kernels.iteration import (
    KEY,
    OUTPUT,
    VALUE,
    correlation,
    correlation_factors,
    feature_rows,
    joint,
    linear_parameter,
    norm_of_rows,
    output_tile,
)
from grjca_kernels.triton_kernels.masks import factors_of_correlation
from grjca_kernels.triton_kernels.primitives import (
    chunk_of,
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
    run_task,
    slot,
    store_tile,
    tanh,
    view_of,
    where_positive,
    zero_vector,
    zeros,
)


@triton.jit
def d_state(a, t, C: tl.constexpr):
    """Return the pointer to d X^t of the chunk, [rows, d]."""
    return slot(a, C.slot_d_state + t % 2)


@triton.jit
def d_update(a, t, C: tl.constexpr):
    """Return the pointer to the gradient of H_m W_h^T + b_h, which is d X^(t+1) itself in the paper form."""
    return slot(a, C.slot_d_update) if C.released else d_state(a, t + 1, C)


# ---- U and H


@triton.jit
def output_backward(a, to, t, first, count, C: tl.constexpr):
    """Compute d (H_m W_h^T + b_h) from d X^(t+1), through dropout and relu. Released form only."""
    width, all_rows = a.shape.width, count * length_of(a, C)
    n_rows = tl.cdiv(all_rows, C.block_m)
    tasks = n_rows * modality_blocks(a.shape.widths, C.block_n)
    for i in tl.range(tl.program_id(0), tasks, tl.num_programs(0), disable_licm=True):
        update, factors, present, place, rows, columns = output_tile(a, t, first, count, i, n_rows, C)
        d = load_tile(d_state(a, t + 1, C) + place, width, 1, rows, columns, C.block_m, C.block_n)
        d = tl.where(present, where_positive(update, d.to(tl.float32) * factors), 0.0)
        store_tile(slot(a, C.slot_d_update) + place, width, d, rows, columns)


@triton.jit
def attended_tasks(a, count, C: tl.constexpr):
    """Return the number of tasks of attended_task."""
    return tl.cdiv(count * length_of(a, C), C.block_m) * len(a.shape.widths) * tl.cdiv(a.shape.width, C.block_n)


@triton.jit
def attended_task(a, to, t, first, count, i, C: tl.constexpr):
    """Compute tile i of d (V_m C_m) = (d_update W_h) times the slope of relu(tanh(.)), which follows from H_m."""
    width, modalities, all_rows = a.shape.width, len(a.shape.widths), count * length_of(a, C)
    n_j = tl.cdiv(width, C.block_n)
    of_modality = tl.cdiv(all_rows, C.block_m) * n_j
    m, r, j = i // of_modality, i % of_modality // n_j * C.block_m, i % of_modality % n_j * C.block_n
    rows, columns = all_rows - r, width - j
    p_d = d_update(a, t, C) + tl.cast(r, tl.int64) * width + offset_of(a.shape.widths, m)
    p_w = linear_parameter(a, layer_of(t, C), m, OUTPUT, 0, C) + j
    acc = zeros(C.block_m, C.block_n)
    acc = product(acc, p_d, width, 1, p_w, width, 1, rows, columns, entry(a.shape.widths, m), C.block_k, C)
    place = tl.cast(r, tl.int64) * modalities * width + m * width + j
    p_h = slot(a, C.slot_hidden) + place
    b_h = load_tile(p_h, modalities * width, 1, rows, columns, C.block_m, C.block_n).to(tl.float32)
    if C.released:
        acc *= 1 - b_h * b_h
    acc = where_positive(b_h, acc)
    store_tile(slot(a, C.slot_d_attended) + place, modalities * width, acc, rows, columns)


# ---- C, streamed: recomputed twice, by rows and by columns


@triton.jit
def correlate_backward(a, to, t, first, count, C: tl.constexpr):
    """Compute d V_m, d K_m and W_k^T d K_m per block of rows of C_m, and d J per block of columns of all C."""
    of_rows, of_joint = count * modality_blocks(a.shape.widths, C.block_m), count * tl.cdiv(a.shape.width, C.block_m)
    for i in tl.range(tl.program_id(0), of_rows + of_joint, tl.num_programs(0), disable_licm=True):
        if i < of_rows:
            run_task(rows_backward, a, to, t, first, count, i, of_rows, C)
        else:
            run_task(joint_backward, a, to, t, first, count, i - of_rows, of_joint, C)


@triton.jit
def slopes(b_c, b_dc, factors, C: tl.constexpr):
    """Return d (K J) from C before dropout and the gradient of C after it."""
    d = b_dc * (1 - b_c * b_c)
    return d * factors if C.dropout else d


@triton.jit
def rows_backward(a, to, t, first, count, i, C: tl.constexpr):
    """Compute d V_m and d K_m, both [c, l], for rows c of C_m and all columns (task i), and add W_k^T d K_m to d
    X_m."""
    length, width, modalities = length_of(a, C), a.shape.width, len(a.shape.widths)
    m, offset, c, sample = modality_task(a.shape.widths, i, count, C.block_m)
    rows, place = entry(a.shape.widths, m) - c, tl.cast(sample, tl.int64) * length * width
    p_joint = joint(a, t, first, C) + place
    p_da = slot(a, C.slot_d_attended) + place * modalities + m * width
    place += offset + c
    b_key = load_tile(slot(a, C.slot_key) + place, 1, width, rows, length, C.block_m, C.block_l)
    b_value = load_tile(slot(a, C.slot_value) + place, 1, width, rows, length, C.block_m, C.block_l)
    d_value = zeros(C.block_m, C.block_l)
    d_key = zeros(C.block_m, C.block_l)
    for j in tl.range(0, width, C.block_c, num_stages=2):
        b_joint = load_tile(p_joint + j, width, 1, length, width - j, C.block_l, C.block_c)
        b_da = load_tile(p_da + j, modalities * width, 1, length, width - j, C.block_l, C.block_c)
        b_c = tanh(dot(b_key, b_joint, None, C), C)
        b_dc = dot(b_value, b_da, None, C)
        factors = 1.0
        if C.dropout:
            factors = tl.trans(factors_of_correlation(a, first + sample, t, m, c, j, C.block_m, C.block_c))
        b_ds = slopes(b_c, b_dc, factors, C)
        if C.dropout:
            b_c *= factors
        d_value = dot(b_c.to(b_da.dtype), tl.trans(b_da), d_value, C)
        d_key = dot(b_ds.to(b_da.dtype), tl.trans(b_joint), d_key, C)
    store_tile(slot(a, C.slot_d_value) + place, width, tl.trans(d_value), length, rows)
    o_l = tl.arange(0, C.block_l)
    d_key = tl.where((o_l < frames(a, first + sample, C))[None, :], d_key * a.scalars.key_scale, 0.0)
    store_tile(slot(a, C.slot_d_key) + place, width, tl.trans(d_key), length, rows)
    p_w = linear_parameter(a, layer_of(t, C), m, KEY, 0, C)
    b_w = load_tile(p_w, length, 1, length, length, C.block_l, C.block_l)
    d_x = tl.trans(dot(d_key.to(b_w.dtype), b_w, None, C))  # [l, c]
    p_dx = d_state(a, t, C) + place
    d_x += load_tile(p_dx, width, 1, length, rows, C.block_l, C.block_m).to(tl.float32)
    d_x = tl.where((o_l < frames(a, first + sample, C))[:, None], d_x, 0.0)
    store_tile(p_dx, width, d_x, length, rows)


@triton.jit
def joint_backward(a, to, t, first, count, i, C: tl.constexpr):
    """Compute d J, [j, l], for columns j of C_m, all rows and modalities (task i)."""
    length, width, modalities = length_of(a, C), a.shape.width, len(a.shape.widths)
    sample, j = i // tl.cdiv(width, C.block_m), i % tl.cdiv(width, C.block_m) * C.block_m
    place = tl.cast(sample, tl.int64) * length * width
    b_joint = load_tile(joint(a, t, first, C) + place + j, 1, width, width - j, length, C.block_m, C.block_l)
    d_joint = zeros(C.block_m, C.block_l)
    for m in range(modalities):
        d_m, offset = entry(a.shape.widths, m), offset_of(a.shape.widths, m)
        p_da = slot(a, C.slot_d_attended) + place * modalities + m * width + j
        b_da = load_tile(p_da, 1, modalities * width, width - j, length, C.block_m, C.block_l)
        for c in tl.range(0, d_m, C.block_c, num_stages=2, disable_licm=True):
            p_key = slot(a, C.slot_key) + place + offset + c
            b_key = load_tile(p_key, width, 1, length, d_m - c, C.block_l, C.block_c)
            p_value = slot(a, C.slot_value) + place + offset + c
            b_value = load_tile(p_value, width, 1, length, d_m - c, C.block_l, C.block_c)
            b_c = tanh(dot(b_joint, b_key, None, C), C)
            b_dc = dot(b_da, b_value, None, C)
            factors = 1.0
            if C.dropout:
                factors = factors_of_correlation(a, first + sample, t, m, c, j, C.block_c, C.block_m)
            b_ds = slopes(b_c, b_dc, factors, C)
            d_joint = dot(b_ds.to(b_key.dtype), tl.trans(b_key), d_joint, C)
    store_tile(slot(a, C.slot_d_joint) + place + j, width, tl.trans(d_joint), length, width - j)


# ---- C, stored


@triton.jit
def d_score(a, sample, row, C: tl.constexpr):
    """Return the pointer to a row of a sample's d (K J), [d, d], which is stored after the chunk's correlations."""
    return correlation(a, chunk_of(a) + sample, row, C)


@triton.jit
def correlate_backward_stored(a, to, t, first, count, C: tl.constexpr):
    """Compute d V_m = d_attended C_m^T, and d (K J)."""
    of_value = count * tl.cdiv(length_of(a, C), C.block_l) * modality_blocks(a.shape.widths, C.block_n)
    of_score = count * tl.cdiv(a.shape.width, C.block_n) * modality_blocks(a.shape.widths, C.block_m)
    for i in tl.range(tl.program_id(0), of_value + of_score, tl.num_programs(0), disable_licm=True):
        if i < of_value:
            run_task(value_backward, a, to, t, first, count, i, of_value, C)
        else:
            run_task(score_backward, a, to, t, first, count, i - of_value, of_score, C)


@triton.jit
def value_backward(a, to, t, first, count, i, C: tl.constexpr):
    """Compute tile i of d V_m."""
    length, width, modalities = length_of(a, C), a.shape.width, len(a.shape.widths)
    n_l = tl.cdiv(length, C.block_l)
    m, offset, c, place = modality_task(a.shape.widths, i, count * n_l, C.block_n)
    sample, l = place // n_l, place % n_l * C.block_l
    row, columns = tl.cast(sample, tl.int64) * length + l, entry(a.shape.widths, m) - c
    p_da = slot(a, C.slot_d_attended) + row * modalities * width + m * width
    p_c = correlation(a, sample, offset + c, C)
    acc = zeros(C.block_l, C.block_n)
    acc = product(acc, p_da, modalities * width, 1, p_c, 1, width, length - l, columns, width, C.block_k, C)
    store_tile(slot(a, C.slot_d_value) + row * width + offset + c, width, acc, length - l, columns)


@triton.jit
def score_backward(a, to, t, first, count, i, C: tl.constexpr):
    """Compute tile i of d (K J) = drop(V_m^T d_attended) (1 - C^2)."""
    length, width, modalities = length_of(a, C), a.shape.width, len(a.shape.widths)
    n_j = tl.cdiv(width, C.block_n)
    m, offset, c, of_modality = modality_task(a.shape.widths, i, count * n_j, C.block_m)
    sample, j = of_modality // n_j, of_modality % n_j * C.block_n
    place, rows = tl.cast(sample, tl.int64) * length * width, entry(a.shape.widths, m) - c
    p_value = slot(a, C.slot_value) + place + offset + c
    p_da = slot(a, C.slot_d_attended) + place * modalities + m * width + j
    acc = zeros(C.block_m, C.block_n)
    acc = product(acc, p_value, 1, width, p_da, modalities * width, 1, rows, width - j, length, C.block_k, C)
    p_c = correlation(a, sample, offset + c, C) + j
    b_c = load_tile(p_c, width, 1, rows, width - j, C.block_m, C.block_n).to(tl.float32)
    factors = 1.0
    if C.dropout:
        factors = correlation_factors(a, sample, m, c, j, rows, C)
        b_c *= 1 / a.scalars.kept  # C was stored with dropout; where dropout made it 0, it makes the gradient 0 too
    p_ds = d_score(a, sample, offset + c, C) + j
    store_tile(p_ds, width, slopes(b_c, acc, factors, C), rows, width - j)


@triton.jit
def key_joint_backward(a, to, t, first, count, C: tl.constexpr):
    """Compute d J = K^T d(K J) and d K = d(K J) J^T for all modalities at once."""
    length, width = length_of(a, C), a.shape.width
    n_l, n_c = tl.cdiv(length, C.block_l), tl.cdiv(a.shape.width, C.block_n)
    tasks = count * n_l * n_c
    for i in tl.range(tl.program_id(0), 2 * tasks, tl.num_programs(0), disable_licm=True):
        sample, l, c = i % tasks // n_c // n_l, i // n_c % n_l * C.block_l, i % n_c * C.block_n
        row, rows, columns = tl.cast(sample, tl.int64) * length + l, length - l, width - c
        acc = zeros(C.block_l, C.block_n)
        if i < tasks:
            p_ds = d_score(a, sample, 0, C) + c
            p_key = slot(a, C.slot_key) + row * width
            acc = product(acc, p_key, width, 1, p_ds, width, 1, rows, columns, width, C.block_k, C)
            store_tile(slot(a, C.slot_d_joint) + row * width + c, width, acc, rows, columns)
        else:
            p_ds = d_score(a, sample, c, C)
            p_joint = joint(a, t, first, C) + row * width
            acc = product(acc, p_joint, width, 1, p_ds, 1, width, rows, columns, width, C.block_k, C)
            present = l + tl.arange(0, C.block_l) < frames(a, first + sample, C)
            acc = tl.where(present[:, None], acc * a.scalars.key_scale, 0.0)
            store_tile(slot(a, C.slot_d_key) + row * width + c, width, acc, rows, columns)


# ---- X


@triton.jit
def input_row_tiles(a, count, C: tl.constexpr):
    """Return the number of row blocks of input_task, which end with a sample only where W_k needs it."""
    length = length_of(a, C)
    return tl.cdiv(count * length, C.block_m) if C.stream else count * tl.cdiv(length, C.block_m)


@triton.jit
def input_tasks(a, count, C: tl.constexpr):
    """Return the number of tasks of input_task."""
    return input_row_tiles(a, count, C) * modality_blocks(a.shape.widths, C.block_n)


@triton.jit
def input_task(a, to, t, first, count, i, C: tl.constexpr):
    """Add d X^(t+1) + d J W_q + d V_m W_v + W_k^T d K_m to tile i of d X^t; a streamed C has already added the last."""
    length, n_rows = length_of(a, C), input_row_tiles(a, count, C)
    m, offset, c, block = modality_task(a.shape.widths, i, n_rows, C.block_n)
    if C.stream:
        r = block * C.block_m
        input_tile(a, t, first, r * 0, r * 0, r, count * length - r, m, offset, c, C)
    else:
        sample, l = block // tl.cdiv(length, C.block_m), block % tl.cdiv(length, C.block_m) * C.block_m
        input_tile(a, t, first, sample, l, sample * length + l, length - l, m, offset, c, C)


@triton.jit
def input_tile(a, t, first, sample, l, r, rows, m, offset, c, C: tl.constexpr):
    """Compute a tile of d X_m^t; if C is stored, row r of the chunk is frame l of the sample."""
    length, width, layer = length_of(a, C), a.shape.width, layer_of(t, C)
    d_m, place = entry(a.shape.widths, m), tl.cast(r, tl.int64) * width
    columns = d_m - c
    acc = zeros(C.block_m, C.block_n)
    p_w = linear_parameter(a, layer, m, VALUE, 0, C) + c
    p_d = slot(a, C.slot_d_value) + place + offset
    acc = product(acc, p_d, width, 1, p_w, d_m, 1, rows, columns, d_m, C.block_k, C)
    p_d = slot(a, C.slot_d_joint) + place
    if C.projected:
        p_w = parameter(a.parameters, layer, 0, 0, 0, C) + offset + c
        acc = product(acc, p_d, width, 1, p_w, width, 1, rows, columns, width, C.block_k, C)
    else:
        p_d += offset + c
        acc += load_tile(p_d, width, 1, rows, columns, C.block_m, C.block_n).to(tl.float32)
    if not C.stream:
        p_w = linear_parameter(a, layer, m, KEY, 0, C) + l
        p_d = slot(a, C.slot_d_key) + tl.cast(sample, tl.int64) * length * width + offset + c
        present = frames(a, first + sample, C)
        acc = product(acc, p_w, 1, length, p_d, width, 1, rows, columns, present, C.block_k, C)
        acc = tl.where((l + tl.arange(0, C.block_m) < present)[:, None], acc, 0.0)
    place += offset + c
    acc += load_tile(d_state(a, t + 1, C) + place, width, 1, rows, columns, C.block_m, C.block_n).to(tl.float32)
    acc += load_tile(d_state(a, t, C) + place, width, 1, rows, columns, C.block_m, C.block_n).to(tl.float32)
    store_tile(d_state(a, t, C) + place, width, acc, rows, columns)


# ---- X^0


@triton.jit
def initial_backward(a, to, t, first, count, C: tl.constexpr):
    """Compute d x from d X^0."""
    tasks = count * len(a.shape.widths) * tl.cdiv(length_of(a, C), C.block_frames)
    for i in tl.range(tl.program_id(0), tasks, tl.num_programs(0), disable_licm=True):
        initial_block(a, to, first, i, C)


@triton.jit
def initial_block(a, to, first, i, C: tl.constexpr):
    """Compute a block of frames; normalising removes the part along x, except where 1e-12 was the larger."""
    length, width, modalities = length_of(a, C), a.shape.width, len(a.shape.widths)
    blocks = tl.cdiv(length, C.block_frames)
    o_r, o_c = tl.arange(0, C.block_frames), tl.arange(0, C.block_columns)
    m, sample, r = i % modalities, i // modalities // blocks, i // modalities % blocks * C.block_frames
    d_m, rows = entry(a.shape.widths, m), length - r
    place = (tl.cast(sample, tl.int64) * length + r) * width + offset_of(a.shape.widths, m)
    p_d, p_x0 = d_state(a, 0, C) + place, slot(a, C.slot_initial) + place
    p_x, s_x, m_x = feature_rows(a, first + sample, r, m, C)
    norm = norm_of_rows(p_x, s_x, m_x, d_m, C)
    along = zero_vector(C.block_frames)
    if C.normalize:
        for c in tl.range(0, d_m, C.block_columns, disable_licm=True):
            b_d = load_tile(p_d + c, width, 1, rows, d_m - c, C.block_frames, C.block_columns).to(tl.float32)
            b_x = load_tile(p_x0 + c, width, 1, rows, d_m - c, C.block_frames, C.block_columns).to(tl.float32)
            along += tl.sum(b_d * b_x, axis=1)
        along = tl.where(norm <= 1e-12, 0.0, along)
    data, s_sample, s_frame, s_column, _ = view_of(to.features, m)
    p_to = data + tl.cast(first + sample, tl.int64) * s_sample + (r + o_r).to(tl.int64) * s_frame
    for c in tl.range(0, d_m, C.block_columns, disable_licm=True):
        b_d = load_tile(p_d + c, width, 1, rows, d_m - c, C.block_frames, C.block_columns).to(tl.float32)
        if C.normalize:
            b_x = load_tile(p_x0 + c, width, 1, rows, d_m - c, C.block_frames, C.block_columns).to(tl.float32)
            b_d = (b_d - along[:, None] * b_x) / norm[:, None]
        b_d = tl.where(m_x[:, None], b_d, 0.0).to(a.activation_workspace.dtype.element_ty)
        mask = (o_r < rows)[:, None] & (c + o_c < d_m)[None, :]
        tl.store(p_to[:, None] + (c + o_c).to(tl.int64)[None, :] * s_column, b_d, mask=mask)
