"""Gradients of the parameters, without atomics.

A task sums a tile of one gradient over one part of the rows (of the samples, for W_k). If there is only one part, and
all samples are processed at once, that sum is the gradient and is stored at the caller's address. Otherwise there are
two stages. The sums of the parts are kept in ``fp32_workspace``, [part, element], by layers with the gates last
(place_of), and those of W_k after all others; they are added to what an earlier chunk, or an iteration that shares the
layer, has stored. At the end reduce adds the parts, four at a time. So every sum has one order, for any grid.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grjca_kernels.triton_kernels.gates import first_way, state_of_gate, ways_of
from grjca_kernels.triton_kernels.gates_backward import d_logits_of
from grjca_kernels.triton_kernels.iteration import KEY, OUTPUT, VALUE, linear_parameter
from grjca_kernels.triton_kernels.iteration_backward import d_update
from grjca_kernels.triton_kernels.primitives import (
    dot,
    entry,
    gate_parameter,
    layer_of,
    length_of,
    modality_blocks,
    modality_task,
    offset_of,
    parameter,
    product,
    slot,
    state,
    store_tile,
    sum_rows,
    zeros,
)

QUERY: tl.constexpr = tl.constexpr(3)
GATES: tl.constexpr = tl.constexpr(4)
REDUCED: tl.constexpr = tl.constexpr(512)
"""The elements that a program reduces at once."""
PARTS: tl.constexpr = tl.constexpr(4)
"""The parts that it loads at once."""

# ---- places of gradients


@triton.jit
def linear_size(rows, columns, C: tl.constexpr):
    """Return the elements of a linear map [rows, columns] with its bias, rounded up so that the next one is aligned."""
    return tl.cdiv(tl.cast(rows, tl.int64) * columns + (rows if C.released else 0), 16) * 16


@triton.jit
def place_of(a, layer, m, KIND: tl.constexpr, C: tl.constexpr):
    """Return where W of a layer, or of the gates of modality m, begins among the sums of a part."""
    width, length = a.shape.width, length_of(a, C)
    LAYERS: tl.constexpr = C.layers
    MODALITIES: tl.constexpr = C.modalities
    query = linear_size(width, width, C) if C.projected else tl.zeros((), tl.int64)
    values, outputs, values_before, outputs_before = query * 0, query * 0, query * 0, query * 0
    gates_before = query * 0
    for n in tl.static_range(MODALITIES):
        d_m = a.shape.widths[n]
        before = tl.where(m > n, 1, 0)
        values += linear_size(d_m, d_m, C)
        outputs += linear_size(d_m, width, C)
        values_before += before * linear_size(d_m, d_m, C)
        outputs_before += before * linear_size(d_m, width, C)
        gates_before += before * C.gates * linear_size(C.block_ways, d_m, C)
    of_layer = query + values + outputs
    if KIND == KEY:
        return (layer * MODALITIES + m) * linear_size(length, length, C)
    elif KIND == VALUE:
        return layer * of_layer + query + values_before
    elif KIND == OUTPUT:
        return layer * of_layer + query + values + outputs_before
    elif KIND == QUERY:
        return layer * of_layer
    else:
        return LAYERS * of_layer + gates_before


@triton.jit
def parts_unspecialized(a, KIND: tl.constexpr):
    """Return the encoded number of parts of the samples (W_k) or of the rows (others); see arguments.Shape."""
    if KIND == KEY:
        return a.shape.key_parts_odd
    else:
        return a.shape.parts_unspecialized


@triton.jit
def parts_of(a, KIND: tl.constexpr):
    """Return the number of parts with separate sums."""
    return tl.maximum(parts_unspecialized(a, KIND) // 2 - 1, 1)


@triton.jit
def single_part(a, KIND: tl.constexpr):
    """Return whether the sum over one part is the whole gradient of a parameter."""
    return parts_unspecialized(a, KIND) // 2 == 1


@triton.jit
def part_of(a, part, KIND: tl.constexpr):
    """Return the pointer to the sums of a part."""
    p = a.fp32_workspace + a.shape.gate_values
    if KIND == KEY:
        p += tl.cast(a.shape.parts_unspecialized // 2 - 1, tl.int64) * a.shape.gradients
        p += tl.cast(part, tl.int64) * a.shape.key_gradients
    else:
        p += tl.cast(part, tl.int64) * a.shape.gradients
    return p


@triton.jit
def keep(a, p_gradient, place, part, at, tile, s_row, rows, columns, fresh, KIND: tl.constexpr):
    """Store a tile that begins at element ``at`` of a gradient: in the gradient itself, or among the sums of its part.

    A sum is added to the stored one, unless it is ``fresh``.
    """
    if single_part(a, KIND):
        store_tile(p_gradient + at, s_row, tile, rows, columns)
    else:
        o_r, o_c = tl.arange(0, tile.shape[0]), tl.arange(0, tile.shape[1])
        p = part_of(a, part, KIND) + place + at + o_r[:, None] * s_row + o_c[None, :]
        m_columns, stale_rows = (o_c < columns)[None, :], tl.where(fresh, 0, rows)
        tile += tl.load(p, mask=(o_r < stale_rows)[:, None] & m_columns, other=0)
        tl.store(p, tile, mask=(o_r < rows)[:, None] & m_columns)


@triton.jit
def keep_vector(a, p_gradient, place, part, at, vector, n, fresh, KIND: tl.constexpr):
    """Store a part of a bias's gradient, as :func:`keep` does."""
    o = tl.arange(0, vector.shape[0])
    if single_part(a, KIND):
        tl.store(p_gradient + at + o, vector.to(p_gradient.dtype.element_ty), mask=o < n)
    else:
        p = part_of(a, part, KIND) + place + at + o
        tl.store(p, vector + tl.load(p, mask=o < tl.where(fresh, 0, n), other=0), mask=o < n)


@triton.jit
def is_fresh(t, first, C: tl.constexpr):
    """Return whether this iteration of this chunk is the first to reach its layer."""
    return (first == 0) & ((C.layers > 1) | (t == C.iterations - 1))


@triton.jit
def rows_of_part(part, parts, rows, BLOCK: tl.constexpr):
    """Return the first row (or sample) of a part, and how many it has."""
    size = tl.cdiv(tl.cdiv(rows, parts), BLOCK) * BLOCK
    begin = tl.minimum(part * size, rows)
    return begin, tl.minimum(size, rows - begin)


# ---- W_h; W_q and W_v


@triton.jit
def linear_tiles(rows, columns, C: tl.constexpr):
    """Return the number of tiles of a gradient."""
    return tl.cdiv(rows, C.block_w) * tl.cdiv(columns, C.block_w)


@triton.jit
def linear_tile(
    a, p_weight, p_bias, place, p_dy, s_dy, p_x, s_x, outputs, inputs, i, part, t, first, count, C: tl.constexpr
):
    """Compute tile i of d W = d y^T x over the rows of a part, and with the first column of tiles a part of d b."""
    r, c = i // tl.cdiv(inputs, C.block_w) * C.block_w, i % tl.cdiv(inputs, C.block_w) * C.block_w
    begin, rows = rows_of_part(part, parts_of(a, VALUE), count * length_of(a, C), C.block_k)
    p_dy += tl.cast(begin, tl.int64) * s_dy + r
    p_x += tl.cast(begin, tl.int64) * s_x + c
    acc = zeros(C.block_w, C.block_w)
    acc = product(acc, p_dy, 1, s_dy, p_x, s_x, 1, outputs - r, inputs - c, rows, C.block_k, C)
    fresh, at = is_fresh(t, first, C), tl.cast(r, tl.int64) * inputs + c
    keep(a, p_weight, place, part, at, acc, inputs, outputs - r, inputs - c, fresh, VALUE)
    if C.released:
        if c == 0:
            total = sum_rows(p_dy, s_dy, rows, outputs - r, C.block_k, C.block_w)
            place += tl.cast(outputs, tl.int64) * inputs
            keep_vector(a, p_bias, place, part, r, total, outputs - r, fresh, VALUE)


@triton.jit
def output_weights_tasks(a, C: tl.constexpr):
    """Return the number of tasks of output_weights_task."""
    return parts_of(a, OUTPUT) * modality_blocks(a.shape.widths, C.block_w) * tl.cdiv(a.shape.width, C.block_w)


@triton.jit
def output_weights_task(a, to, t, first, count, i, C: tl.constexpr):
    """Compute a part of a tile of d W_h,m = d_update_m^T H_m (task i)."""
    width, modalities, layer = a.shape.width, len(a.shape.widths), layer_of(t, C)
    n_columns = tl.cdiv(width, C.block_w)
    m, offset, r, place = modality_task(a.shape.widths, i, parts_of(a, OUTPUT) * n_columns, C.block_w)
    tile = r // C.block_w * n_columns + place % n_columns
    p_weight = linear_parameter(to, layer, m, OUTPUT, 0, C)
    p_bias = linear_parameter(to, layer, m, OUTPUT, 1, C) if C.released else p_weight
    linear_tile(
        a, p_weight, p_bias, place_of(a, layer, m, OUTPUT, C), d_update(a, t, C) + offset, width,
        slot(a, C.slot_hidden) + m * width, modalities * width, entry(a.shape.widths, m), width, tile,
        place // n_columns, t, first, count, C,
    )  # fmt: skip


@triton.jit
def linear_weights_tasks(a, C: tl.constexpr):
    """Return the number of tasks of linear_weights_task."""
    tiles = linear_tiles(a.shape.width, a.shape.width, C) if C.projected else a.shape.width * 0
    for n in tl.static_range(len(a.shape.widths)):
        tiles += linear_tiles(a.shape.widths[n], a.shape.widths[n], C)
    return parts_of(a, VALUE) * tiles


@triton.jit
def linear_weights_task(a, to, t, first, count, i, C: tl.constexpr):
    """Compute a part of a tile of d W_q = d J^T X, or of d W_v,m = d V_m^T X_m (task i)."""
    width, layer, parts = a.shape.width, layer_of(t, C), parts_of(a, VALUE)
    MODALITIES: tl.constexpr = C.modalities
    of_query = linear_tiles(width, width, C) if C.projected else 0
    tile, m = i // parts - of_query, i * 0
    for n in tl.static_range(MODALITIES - 1):
        beyond = (m == n) & (tile >= linear_tiles(a.shape.widths[n], a.shape.widths[n], C))
        tile -= tl.where(beyond, linear_tiles(a.shape.widths[n], a.shape.widths[n], C), 0)
        m += tl.where(beyond, 1, 0)
    size, offset, place = entry(a.shape.widths, m), offset_of(a.shape.widths, m), place_of(a, layer, m, VALUE, C)
    p_weight, i_slot = linear_parameter(to, layer, m, VALUE, 0, C), C.slot_d_value
    p_bias = linear_parameter(to, layer, m, VALUE, 1, C) if C.released else p_weight
    if C.projected:
        query = i < parts * of_query
        tile = tl.where(query, i // parts, tile)
        size, offset = tl.where(query, width, size), tl.where(query, 0, offset)
        place = tl.where(query, place_of(a, layer, 0, QUERY, C), place)
        i_slot = tl.where(query, C.slot_d_joint, C.slot_d_value)
        p_weight = tl.where(query, parameter(to.parameters, layer, 0, 0, 0, C), p_weight)
        p_bias = tl.where(query, parameter(to.parameters, layer, 0, 1, 0, C), p_bias)
    p_x = state(a, t, first, C) + offset
    linear_tile(
        a, p_weight, p_bias, place, slot(a, i_slot) + offset, width, p_x, width, size, size, tile, i % parts, t, first,
        count, C,
    )  # fmt: skip


# ---- W_k


@triton.jit
def key_weights_tasks(a, C: tl.constexpr):
    """Return the number of tasks of key_weights_task."""
    blocks = tl.cdiv(length_of(a, C), C.block_l if C.stream else C.block_w)
    return parts_of(a, KEY) * len(a.shape.widths) * blocks * blocks


@triton.jit
def key_weights_task(a, to, t, first, count, i, C: tl.constexpr):
    """Compute a part of a tile of d W_k,m, the sum of d K_m^T X_m^T over samples, and with the first column d b_k (task
    i).

    One loop covers the columns of all samples, because a loop per sample would drain its pipeline each time.
    """
    BLOCK: tl.constexpr = C.block_l if C.stream else C.block_w  # L fits in block_l if C is streamed
    STEP: tl.constexpr = C.block_k
    length, width, layer = length_of(a, C), a.shape.width, layer_of(t, C)
    part, i = i % parts_of(a, KEY), i // parts_of(a, KEY)
    n_columns = tl.cdiv(length, BLOCK)
    tiles = n_columns * n_columns
    m, l, c = i // tiles, i % tiles // n_columns * BLOCK, i % n_columns * BLOCK
    d_m, offset = entry(a.shape.widths, m), offset_of(a.shape.widths, m)
    begin, samples = rows_of_part(part, parts_of(a, KEY), count, 1)
    o_l, o_k, steps = tl.arange(0, BLOCK), tl.arange(0, STEP), tl.cdiv(d_m, STEP)
    place = tl.cast(begin, tl.int64) * length * width + offset
    p_dk = slot(a, C.slot_d_key) + place + (l + o_l[:, None]) * width + o_k[None, :]
    p_x = state(a, t, first, C) + place + (c + o_l[None, :]) * width + o_k[:, None]
    m_l, m_c = (o_l < length - l)[:, None], (o_l < length - c)[None, :]
    acc, total = zeros(BLOCK, BLOCK), zeros(BLOCK, STEP)
    for step in tl.range(0, samples * steps, disable_licm=True):
        k = step % steps * STEP
        at, m_k = tl.cast(step // steps, tl.int64) * length * width + k, o_k < d_m - k
        b_dk = tl.load(p_dk + at, mask=m_l & m_k[None, :], other=0)
        b_x = tl.load(p_x + at, mask=m_k[:, None] & m_c, other=0)
        acc = dot(b_dk, b_x, acc, C)
        if C.released:
            total += b_dk.to(tl.float32)
    place, fresh = place_of(a, layer, m, KEY, C), is_fresh(t, first, C)
    p_weight, at = linear_parameter(to, layer, m, KEY, 0, C), tl.cast(l, tl.int64) * length + c
    keep(a, p_weight, place, part, at, acc, length, length - l, length - c, fresh, KEY)
    if C.released:
        if c == 0:
            place += tl.cast(length, tl.int64) * length
            p_bias = linear_parameter(to, layer, m, KEY, 1, C)
            keep_vector(a, p_bias, place, part, l, tl.sum(total, axis=1), length - l, fresh, KEY)


# ---- gates


@triton.jit
def gate_weights_tasks(a, C: tl.constexpr):
    """Return the number of tasks of gate_weights_task."""
    return parts_of(a, GATES) * C.gates * modality_blocks(a.shape.widths, C.block_w)


@triton.jit
def gate_weights_task(a, to, t, first, count, i, C: tl.constexpr):
    """Compute columns of d W_g = d_logits^T x for one gate and a part of the rows (task i)."""
    width, parts = a.shape.width, parts_of(a, GATES)
    m, offset, c, place = modality_task(a.shape.widths, i, parts * C.gates, C.block_w)
    g, part, d_m = place // parts, place % parts, entry(a.shape.widths, m)
    ways = ways_of(g, C)
    begin, rows = rows_of_part(part, parts, count * length_of(a, C), C.block_k)
    p_d = d_logits_of(a, tl.cast(begin, tl.int64), m, first_way(g), C)
    p_x = state(a, state_of_gate(g, C), first, C) + tl.cast(begin, tl.int64) * width + offset + c
    acc = zeros(C.block_ways, C.block_w)
    acc = product(acc, p_d, 1, C.ways, p_x, width, 1, ways, d_m - c, rows, C.block_k, C)
    place = place_of(a, 0, m, GATES, C) + g * linear_size(C.block_ways, d_m, C)
    keep(a, gate_parameter(to.parameters, m, g, 0, C), place, part, c, acc, d_m, ways, d_m - c, first == 0, GATES)
    if C.released:
        if c == 0:
            total = sum_rows(p_d, C.ways, rows, ways, C.block_k, C.block_ways)
            p_bias = gate_parameter(to.parameters, m, g, 1, C)
            keep_vector(a, p_bias, place + tl.cast(ways, tl.int64) * d_m, part, 0, total, ways, first == 0, GATES)


# ---- the second stage


@triton.jit
def reduce(a, to, t, first, count, C: tl.constexpr):
    """Add the parts, round, and store the gradients where the caller wants them."""
    length, width = length_of(a, C), a.shape.width
    for n in tl.range(C.layers, disable_licm=True):
        if C.projected:
            p_weight, p_bias = (parameter(to.parameters, n, 0, 0, 0, C), parameter(to.parameters, n, 0, 1, 0, C))
            reduce_linear(a, p_weight, p_bias, place_of(a, n, 0, QUERY, C), width, width, 0, QUERY, C)
        for m in tl.range(C.modalities, disable_licm=True):
            d_m = entry(a.shape.widths, m)
            reduce_kind(a, to, n, m, KEY, length, length, C)
            reduce_kind(a, to, n, m, VALUE, d_m, d_m, C)
            reduce_kind(a, to, n, m, OUTPUT, d_m, width, C)
    if C.gates > 0:
        for m in tl.range(C.modalities, disable_licm=True):
            for g in tl.range(C.gates, disable_licm=True):
                reduce_gate(a, to, m, g, C)


@triton.jit
def reduce_gate(a, to, m, g, C: tl.constexpr):
    """Reduce gate g of a modality."""
    d_m = entry(a.shape.widths, m)
    p_weight = gate_parameter(to.parameters, m, g, 0, C)
    p_bias = gate_parameter(to.parameters, m, g, 1, C) if C.released else p_weight
    place = place_of(a, 0, m, GATES, C) + g * linear_size(C.block_ways, d_m, C)
    reduce_linear(a, p_weight, p_bias, place, ways_of(g, C), d_m, m + g, GATES, C)


@triton.jit
def reduce_kind(a, to, n, m, KIND: tl.constexpr, outputs, inputs, C: tl.constexpr):
    """Reduce W_k, W_v or W_h of a layer and modality."""
    p_weight = linear_parameter(to, n, m, KIND, 0, C)
    p_bias = linear_parameter(to, n, m, KIND, 1, C) if C.released else p_weight
    reduce_linear(a, p_weight, p_bias, place_of(a, n, m, KIND, C), outputs, inputs, KIND + m, KIND, C)


@triton.jit
def reduce_linear(a, p_weight, p_bias, place, outputs, inputs, turn, KIND: tl.constexpr, C: tl.constexpr):
    """Reduce W and b of one linear map, unless they are already whole."""
    if not single_part(a, KIND):
        weights = tl.cast(outputs, tl.int64) * inputs
        reduce_elements(a, p_weight, place, weights, turn, KIND)
        if C.released:
            reduce_elements(a, p_bias, place + weights, tl.cast(outputs, tl.int64), turn + 7, KIND)


@triton.jit
def reduce_elements(a, p_to, place, n, turn, KIND: tl.constexpr):
    """Reduce ``n`` elements. ``turn`` starts each parameter at another program, since most are smaller than the
    grid."""
    o, o_part = tl.arange(0, REDUCED), tl.arange(0, PARTS)[:, None]
    p_from = part_of(a, 0, KIND) + place
    size, parts = a.shape.key_gradients if KIND == KEY else a.shape.gradients, parts_of(a, KIND)
    begin = (tl.program_id(0) + turn * 13) % tl.num_programs(0)
    for i in tl.range(begin, tl.cdiv(n, REDUCED), tl.num_programs(0), disable_licm=True):
        at = tl.cast(i, tl.int64) * REDUCED + o
        acc = zeros(PARTS, REDUCED)
        for part in tl.range(0, parts, PARTS, disable_licm=True):
            p = p_from + (part + o_part).to(tl.int64) * size + at[None, :]
            acc += tl.load(p, mask=(part + o_part < parts) & (at < n)[None, :], other=0)
        tl.store(p_to + at, tl.sum(acc, axis=0).to(p_to.dtype.element_ty), mask=at < n)
