"""Building blocks of all phases: tiles of products, tanh, lookups, the division of tasks, and the grid barrier.

Prefixes: i_ task indices, o_ offsets within a tile, m_ masks, p_ pointers, b_ loaded tiles. ``a`` is Arguments, and
``C`` the launch configuration (config.Constants). The code uses only features of Triton 3.6.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---- products


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return a float32 tile of zeros. (In Triton 3.6 an attribute of ``C`` is a number only when passed to a
    function.)"""
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def zero_vector(SIZE: tl.constexpr):
    """Return a float32 vector of zeros."""
    return tl.zeros((SIZE,), tl.float32)


@triton.jit
def dot(b_a, b_b, acc, C: tl.constexpr):
    """Return acc + A B, or A B. Triton before 3.7 has no fence between cp.async and wgmma (its issue 9610), so it is
    here."""
    if C.fence:
        tl.inline_asm_elementwise(
            "fence.proxy.async.shared::cta; mov.b32 $0, $1;", "=r,r", [tl.arange(0, 32)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip
    return tl.dot(b_a, b_b, acc, input_precision=C.precision)


@triton.jit
def product(acc, p_a, s_am, s_ak, p_b, s_bk, s_bn, rows, columns, terms, TERMS: tl.constexpr, C: tl.constexpr):
    """Return acc + A B for a tile of A [rows, terms] and B [terms, columns], at most as large as ``acc``, in steps of
    TERMS."""
    o_m, o_n, o_k = tl.arange(0, acc.shape[0]), tl.arange(0, acc.shape[1]), tl.arange(0, TERMS)
    m_a, m_b = (o_m < rows)[:, None], (o_n < columns)[None, :]
    p_a += o_m[:, None] * s_am + o_k[None, :] * s_ak
    p_b += o_k[:, None] * s_bk + o_n[None, :] * s_bn
    for k in range(0, terms, TERMS):
        m_k = o_k < terms - k
        b_a = tl.load(p_a, mask=m_a & m_k[None, :], other=0)
        b_b = tl.load(p_b, mask=m_k[:, None] & m_b, other=0)
        acc = dot(b_a, b_b, acc, C)
        p_a += TERMS * s_ak
        p_b += TERMS * s_bk
    return acc


@triton.jit
def sum_rows(p, s_row, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the sums over the rows of a matrix [rows, columns] with unit column stride: [COLUMNS]."""
    o_r, o_c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    acc = zeros(ROWS, COLUMNS)
    p += o_r[:, None] * s_row + o_c[None, :]
    for r in range(0, rows, ROWS):
        acc += tl.load(p, mask=(o_r < rows - r)[:, None] & (o_c < columns)[None, :], other=0).to(tl.float32)
        p += ROWS * s_row
    return tl.sum(acc, axis=0)


@triton.jit
def store_tile(p, s_row, tile, rows, columns):
    """Round a tile to the pointer's type and store its valid part; the column stride is 1."""
    o_r, o_c = tl.arange(0, tile.shape[0]), tl.arange(0, tile.shape[1])
    mask = (o_r < rows)[:, None] & (o_c < columns)[None, :]
    tl.store(p + o_r[:, None] * s_row + o_c[None, :], tile.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_tile(p, s_row, s_column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Load [ROWS, COLUMNS], with zeros beyond [rows, columns]."""
    o_r, o_c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (o_r < rows)[:, None] & (o_c < columns)[None, :]
    return tl.load(p + o_r[:, None] * s_row + o_c[None, :] * s_column, mask=mask, other=0)


@triton.jit
def add_row(tile, p, columns):
    """Return tile + a row vector of ``columns`` elements, the bias of a linear map."""
    o_c = tl.arange(0, tile.shape[1])
    return tile + tl.load(p + o_c, mask=o_c < columns, other=0).to(tl.float32)[None, :]


# ---- functions


@triton.jit
def tanh(x, C: tl.constexpr):
    """Return tanh of float32, NaN for NaN: for 16-bit types the processor's, accurate to 2^-11, else to about 2 ulp.

    Near zero it is x + x z P(z), z = x^2, with the coefficients of csrc/cpu/fit_tanh.py; elsewhere it uses exp.
    """
    if C.approximate_tanh:
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        magnitude = tl.abs(x)
        z = x * x
        p = -0.0057049864 * z + 0.0206390861
        p = p * z - 0.0537397154
        p = p * z + 0.133314416
        p = p * z - 0.333332807
        large = 1 - 2 / (tl.exp(2 * magnitude) + 1)
        y = tl.where(magnitude >= 0.625, tl.where(x < 0, -large, large), x + x * z * p)
    return y


@triton.jit
def relu(x):
    """Return max(x, 0), NaN for NaN."""
    return tl.where(x < 0, 0.0, x)


@triton.jit
def where_positive(x, d):
    """Return d through a relu whose argument or value is x; a NaN in x passes d on, as in autograd."""
    return tl.where(x <= 0, 0.0, d)


# ---- lookups


@triton.jit
def chunk_of(a):
    """Return how many samples pass through the workspace together."""
    return a.shape.chunk_unspecialized // 2


@triton.jit
def length_of(a, C: tl.constexpr):
    """Return L."""
    return a.shape.length_parts * C.length_step


@triton.jit
def frames(a, sample, C: tl.constexpr):
    """Return the present frames of a sample, or of a tensor of samples. Lengths outside 0..L count as the nearer of
    both."""
    length = length_of(a, C)
    if C.lengths:
        given = tl.load(a.lengths + sample)
        return tl.minimum(tl.maximum(given.to(tl.int64), 0), length).to(tl.int32)
    else:
        return length


@triton.jit
def entry(numbers, m):
    """Return numbers[m] for m known only at run time."""
    value = numbers[0]
    for n in tl.static_range(1, len(numbers)):
        value = tl.where(m == n, numbers[n], value)
    return value


@triton.jit
def offset_of(widths, m):
    """Return the first column of modality m among all columns."""
    offset = m * 0
    for n in tl.static_range(len(widths) - 1):
        offset += tl.where(m > n, widths[n], 0)
    return offset


@triton.jit
def view_of(views, m):
    """Return views[m] for m known only at run time: pointer, the three strides, and whether it was given."""
    data, sample, frame = views[0].data, views[0].sample, views[0].frame
    column, given = views[0].column, views[0].given
    for n in tl.static_range(1, len(views)):
        data = tl.where(m == n, views[n].data, data)
        sample, frame = tl.where(m == n, views[n].sample, sample), tl.where(m == n, views[n].frame, frame)
        column, given = tl.where(m == n, views[n].column, column), tl.where(m == n, views[n].given, given)
    return data, sample, frame, column, given


@triton.jit
def parameter(parameters, layer, m, FIRST: tl.constexpr, STEP: tl.constexpr, C: tl.constexpr):
    """Return the pointer at FIRST + STEP m in the parameters of a layer; layer and m are known only at run time."""
    LAYERS: tl.constexpr = C.layers
    MODALITIES: tl.constexpr = C.modalities if STEP > 0 else 1
    p = parameters[FIRST]
    for n in tl.static_range(LAYERS):
        for i in tl.static_range(MODALITIES):
            p = tl.where((layer == n) & (m == i), parameters[n * C.layer_parameters + FIRST + i * STEP], p)
    return p


@triton.jit
def gate_parameter(parameters, m, g, BIAS: tl.constexpr, C: tl.constexpr):
    """Return W_g or b_g of gate g of modality m."""
    STEP: tl.constexpr = 2 if C.released else 1
    MODALITIES: tl.constexpr = C.modalities
    GATES: tl.constexpr = C.gates
    FIRST: tl.constexpr = C.layers * C.layer_parameters + BIAS
    p = parameters[FIRST]
    for i in tl.static_range(MODALITIES):
        for n in tl.static_range(GATES):
            p = tl.where((m == i) & (g == n), parameters[FIRST + (i * GATES + n) * STEP], p)
    return p


@triton.jit
def layer_of(t, C: tl.constexpr):
    """Return which layer iteration t uses."""
    return t if C.layers > 1 else t * 0


@triton.jit
def slot(a, i):
    """Return the pointer to the i-th activation [chunk, L, d] of the workspace."""
    return a.activation_workspace + tl.cast(a.shape.unit, tl.int64) * i


@triton.jit
def state(a, t, first, C: tl.constexpr):
    """Return the pointer to X^t of a chunk, [rows, d], whose first sample is ``first``.

    X^0 is in the workspace, and the others are among the iterates.
    """
    place = (tl.cast(t - 1, tl.int64) * (a.batch_unspecialized // 2) + first) * length_of(a, C) * a.shape.width
    place = tl.where(t == 0, tl.cast(a.shape.unit, tl.int64) * C.slot_initial, place)
    # Two selections, because for AMD Triton 3.6 fails on a single one.
    return tl.where(t == 0, a.activation_workspace, a.iterates) + place


@triton.jit
def modality_blocks(widths, BLOCK: tl.constexpr):
    """Return the number of column blocks of all modalities, each of which is divided separately."""
    total = tl.cdiv(widths[0], BLOCK)
    for n in tl.static_range(1, len(widths)):
        total += tl.cdiv(widths[n], BLOCK)
    return total


@triton.jit
def modality_task(widths, i, groups, BLOCK: tl.constexpr):
    """Locate task i of groups x column blocks: modality after modality, with the blocks of a group side by side.

    Return its modality, the modality's first column among all, the block's first column within it, and its group.
    """
    m, offset = i * 0, i * 0
    for n in tl.static_range(len(widths) - 1):
        tasks = groups * tl.cdiv(widths[n], BLOCK)
        beyond = (m == n) & (i >= tasks)
        offset = tl.where(beyond, offset + widths[n], offset)
        i = tl.where(beyond, i - tasks, i)
        m = tl.where(beyond, m + 1, m)
    blocks = tl.cdiv(entry(widths, m), BLOCK)
    return m, offset, i % blocks * BLOCK, i // blocks


# ---- division of tasks


@triton.jit
def turns(tasks):
    """Return how many turns the programs take until all tasks are done."""
    return tl.cdiv(tasks, tl.num_programs(0))


@triton.jit
def task_of(turn):
    """Return this program's task in a turn; the order alternates, so programs with the first, longest tasks get the
    last."""
    i, n = tl.program_id(0), tl.num_programs(0)
    return turn * n + tl.where(turn % 2 == 0, i, n - 1 - i)


@triton.jit
def last_program():
    """Number the programs from the last, which begins because the first ones have more other work."""
    return tl.num_programs(0) - 1 - tl.program_id(0)


# ---- phases


@triton.jit
def run(PHASE: tl.constexpr, a, to, t, first, count, C: tl.constexpr):
    """Run a phase of iteration t for a chunk, by a call if ``C.called``. All phases take these arguments, used or not.

    If phases were inlined, the compiler would compute their common values ahead of all and keep them, for which there
    are not enough registers. Nothing in shared memory may live across a call, or be on its way there: older versions of
    Triton handle neither (its issues 11267 and 11326).
    """
    tl.debug_barrier()
    if C.called:
        call(PHASE, a, to, t, first, count, C)
    else:
        PHASE(a, to, t, first, count, C)
    tl.debug_barrier()


@triton.jit(noinline=True)
def call(PHASE: tl.constexpr, a, to, t, first, count, C: tl.constexpr):
    """Call one function per phase."""
    PHASE(a, to, t, first, count, C)


@triton.jit
def run_task(TASK: tl.constexpr, a, to, t, first, count, i, tasks, C: tl.constexpr):
    """Run task i of a phase with several kinds of tasks, as :func:`run` does, if there are that many of this kind."""
    tl.debug_barrier()
    if C.called:
        call_task(TASK, a, to, t, first, count, i, tasks, C)
    elif i < tasks:
        TASK(a, to, t, first, count, i, C)
    tl.debug_barrier()


@triton.jit(noinline=True)
def call_task(TASK: tl.constexpr, a, to, t, first, count, i, tasks, C: tl.constexpr):
    """Call one function per kind. Without a condition Triton 3.9 would move its arguments to memory."""
    if i < tasks:
        TASK(a, to, t, first, count, i, C)


# ---- the grid


@triton.jit
def wait_for_stores():
    """Wait for this wave's own stores on an AMD GPU: otherwise only the wave that runs the atomic would wait for its
    own."""
    lanes = tl.arange(0, 64)
    tl.inline_asm_elementwise(
        "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1", "=v,v,~{memory}", [lanes], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def grid_barrier(p_counter, C: tl.constexpr):
    """Wait until all programs of a cooperative launch have arrived, and make their writes visible.

    The first program adds 2^31 - (n - 1), and every other one adds 1: the highest bit flips when the last arrives, and
    the lower bits are then 0 again.
    """
    if C.hip:
        wait_for_stores()
    tl.debug_barrier()
    ahead = tl.num_programs(0) - 1
    old = tl.atomic_add(p_counter, tl.where(tl.program_id(0) == 0, -2147483648 - ahead, 1), sem="acq_rel", scope="gpu")
    while (old ^ tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu")) >= 0:
        pass
    tl.debug_barrier()
