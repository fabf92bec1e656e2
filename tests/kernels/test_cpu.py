"""The native kernel, on every instruction set of this processor."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from pytest import fixture, mark
from torch import Tensor

from behaviour import check_all_is_written
from cases import (
    BY_NAME,
    CASES,
    EVERYTHING,
    FULL_SIZE,
    GOLDEN,
    HALVES,
    SEED,
    STATISTICAL,
    Case,
    Result,
    cotangents,
    describe,
    described,
    eager_module,
    golden_results,
    make,
    parameter_names,
    run,
)
from grjca.measure import threads
from grjca_kernels import GatedRJCAFused, cpu, gated_rjca, manual_backward, memory, reference
from grjca_kernels import problem as problems
from grjca_kernels.call import Gradients
from grjca_kernels.native import library, problem_of
from tolerances import (
    FULL_SIZE as FULL_SIZE_TOLERANCE,
)
from tolerances import (
    check_close,
    check_float64,
    check_one_step,
    check_one_step_gradients,
    check_rule,
    exact,
)

pytestmark = mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
CHUNKS = Case("chunks", 4000, 16, (33, 5), 1, dropout=0.2)
"""A batch with more samples than one chunk of the kernels, forward and backward, on any instruction set."""

native = partial(gated_rjca, backend="cpu")


PAIRED = "avx512bf16"
"""The instruction set that rounds the operands of products, and takes bfloat16 alone."""


@fixture(params=[name for name in cpu.instruction_sets() if name != PAIRED])
def instruction_set(request):
    with cpu.instruction_set(request.param):
        yield request.param


def each_way(*dtypes):
    """All dtypes by all instruction sets that take them."""
    ways = [(dtype, name) for dtype in dtypes for name in cpu.instruction_sets()]
    ways = [(dtype, name) for dtype, name in ways if name != PAIRED or dtype == torch.bfloat16]
    return mark.parametrize(("dtype", "instruction_set"), ways, indirect=["instruction_set"], ids=str)


# ---- against the reference


@mark.parametrize("case", CASES, ids=str)
def test_float64(case, instruction_set):
    check_float64(run(native, case, make(case)), exact(case, torch.float64))


@mark.parametrize("case", CASES, ids=str)
def test_float32(case, instruction_set):
    check_rule(run(native, case, make(case, torch.float32)), case, torch.float32)


@each_way(*HALVES)
@mark.parametrize("case", CASES, ids=str)
def test_values_of_sixteen_bits(case, dtype, instruction_set):
    check_rule(run(native, case, make(case, dtype)), case, dtype, gradients=False)


@mark.parametrize("dtype", HALVES, ids=str)
@mark.parametrize("case", STATISTICAL, ids=str)
def test_gradients_of_sixteen_bits(case, dtype):
    """Large enough that many relu change sides by rounding: on a small problem one of them decides."""
    check_rule(run(native, case, make(case, dtype)), case, dtype)


@each_way(torch.float32, torch.bfloat16)
@mark.sampled(3)
def test_chunks(dtype, instruction_set):
    problem = describe(CHUNKS, make(CHUNKS))
    for backward in (False, True):
        once, twice = (
            workspace(replace(problem, batch=n * CHUNKS.batch), dtype, backward, instruction_set) for n in (1, 2)
        )
        assert twice < 1.2 * once, "the batch is one chunk: this case must grow"
    check_rule(run(native, CHUNKS, make(CHUNKS, dtype)), CHUNKS, dtype)


def workspace(problem: problems.Problem, dtype: torch.dtype, backward: bool, instruction_set: str | None) -> int:
    return library.cpu_workspace(problem_of(problem, dtype), backward, 1, instruction_set)


@mark.parametrize("name", GOLDEN)
def test_golden(name, instruction_set):
    check_float64(*golden_results(name, "cpu"))


@mark.parametrize("case", FULL_SIZE.values(), ids=str)
@mark.sampled(2)
def test_the_released_formulas_at_full_size(case):
    leaves = make(case).leaves()
    module, parameters = eager_module(case, leaves)
    eager = module(*leaves.features)
    ours = native(leaves.features, leaves.layers, leaves.gates, **case.options)
    incoming = [torch.randn_like(y) for y in eager]
    of_eager = torch.autograd.grad(eager, leaves.features + parameters, incoming)
    of_ours = torch.autograd.grad(ours, leaves.features + leaves.parameters, incoming)
    for i, (y, expected) in enumerate(zip((*ours, *of_ours), (*eager, *of_eager), strict=True)):
        check_close(str(i), y.detach(), expected.detach(), FULL_SIZE_TOLERANCE)


@mark.parametrize("case", FULL_SIZE.values(), ids=str)
@mark.sampled(2)
def test_the_rule_at_full_size(case):
    check_rule(run(native, case, make(case, torch.float32)), case, torch.float32)


# ---- against the manual backward, step by step


@mark.parametrize("dtype", HALVES, ids=str)
@mark.parametrize("case", [case for case in CASES if case.batch], ids=str)
def test_every_step_of_sixteen_bits(case, dtype, instruction_set):
    """From the iterates it stored, the kernel goes on as float64 does, up to one rounding: errors cannot grow. Where
    operands of products are rounded too, there is the rule, and no more.
    """
    inputs, seed = make(case, dtype), torch.tensor(SEED) if case.dropout and case.form == "released" else None
    ours = run(native, case, inputs)
    wide, problem = inputs.to(torch.float64), describe(case, inputs)
    present = reference.presence(problem.length, wide.lengths)
    modalities = range(len(case.widths))
    initial = [reference.initial(problem.normalize, x, present) for x in wide.features]
    iterates = [ours.values[f"X[{m}]"].double() for m in modalities]
    for t in range(case.iterations):
        before = [initial[m] if t == 0 else iterates[m][t - 1] for m in modalities]
        after = reference.iterate(problem, before, wide.layers[0 if case.shared else t], t, present, seed)
        for m in modalities:
            check_one_step(f"X[{m}]^{t + 1}", ours.values[f"X[{m}]"][t], after[m], dtype)
    for m in modalities:
        y, gates = reference.gate(problem, [initial[m], *iterates[m]], wide.gates[m])
        shown = 1 if present is None else present
        check_one_step(f"Y[{m}]", ours.values[f"Y[{m}]"], y * shown, dtype)
        for g, gate in enumerate(() if gates is None else gates if isinstance(gates, tuple) else (gates,)):
            check_one_step(f"G[{m}][{g}]", ours.values[f"G[{m}][{g}]"], gate * shown, dtype)
    check_one_step_gradients(ours.gradients, derived(case, wide, torch.cat(iterates, dim=-1), ours), dtype)


def derived(case: Case, inputs, iterates: Tensor, ours: Result) -> dict[str, Tensor]:
    """manual_backward.backward from iterates that are given."""
    count, called = len(case.widths), described(case, inputs, iterates=iterates)
    incoming = [gradient.double() for gradient in cotangents(list(ours.values.values()))]
    of_gates, ways = incoming[2 * count :], len(called.problem.gate_ways)
    gates = [torch.cat(of_gates[m * ways : (m + 1) * ways], dim=-1) if ways else None for m in range(count)]
    computed = [torch.empty_like(x) for x in (*inputs.features, *inputs.parameters)]
    of_states = incoming[count : 2 * count]
    manual_backward.backward(called, Gradients(incoming[:count], of_states, gates, computed[:count], computed[count:]))
    names = [f"d features[{m}]" for m in range(count)] + [f"d {name}" for name in parameter_names(case)]
    return dict(zip(names, computed, strict=True))


# ---- memory


@fixture
def poisoned(monkeypatch):
    """New memory holds NaN: 0xFF in every byte is NaN in every dtype. All of it is new, and none used again."""
    monkeypatch.setattr(memory, "SMALLEST", math.inf)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(8, dtype=torch.uint8).eq(0xFF).all() and torch.empty(3).new_empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@each_way(*problems.DTYPES)
@mark.parametrize("case", [EVERYTHING, BY_NAME["one-block-and-more"], BY_NAME["lengths-paper"]], ids=str)
@mark.parametrize("keep", ["least", "most"])
def test_uninitialised_memory_is_not_read(keep, case, dtype, instruction_set, request):
    inputs = make(case, dtype)
    clean = run(native, case, inputs)
    request.getfixturevalue("poisoned")
    dirty = run(native, case, inputs, keep=keep)
    for of_clean, of_dirty in ((clean.values, dirty.values), (clean.gradients, dirty.gradients)):
        for name, value in of_clean.items():
            assert value.isfinite().all(), name
            assert torch.equal(value, of_dirty[name]), name


@each_way(*problems.DTYPES)
@mark.parametrize("case", [EVERYTHING, BY_NAME["one-block-and-more"], BY_NAME["shared-paper"]], ids=str)
@mark.parametrize("keeps", [False, True], ids=["least", "most"])
def test_all_is_written_and_nothing_else(keeps, case, dtype, instruction_set, monkeypatch):
    workspaces = []

    def take(size):
        around = torch.zeros(size + 2 * 4096, dtype=torch.uint8)
        workspaces.append(around)
        return around[4096:-4096].fill_(0xFF)

    monkeypatch.setattr(memory, "take", take)
    check_all_is_written(cpu.forward, cpu.backward, case, dtype, held=cpu.held(dtype) if keeps else 0)
    assert len(workspaces) == 2
    for around in workspaces:
        assert not around[:4096].any() and not around[-4096:].any(), "the workspace is overrun"


def test_instruction_sets_end_with_the_baseline():
    assert cpu.instruction_sets()[-1] == "baseline"


def test_an_unknown_instruction_set_is_refused():
    with cpu.instruction_set("mmx"), pytest.raises(ValueError, match=r"instruction_set: .*mmx"):
        run(native, EVERYTHING, make(EVERYTHING))


@each_way(*problems.DTYPES)
@mark.parametrize("length", [64, 128])
def test_threads_that_prepare_rows_of_whole_lines_do_not_meet(length, dtype, instruction_set):
    """Rows of W_k then stand without a gap, and two threads write neighbouring ones at the same time."""
    draw = torch.Generator().manual_seed(0)
    block = GatedRJCAFused(24, 16, length, dropout=0.0, dtype=dtype, backend="cpu")
    features = [torch.randn(1, length, d, generator=draw).to(dtype) for d in (24, 16)]
    with torch.no_grad():
        expected = block(*features)
        with threads(2):
            for _ in range(20):
                assert all(map(torch.equal, block(*features), expected))


def test_small_calls_wake_no_further_thread(monkeypatch):
    """The second thread comes with so many multiply-adds as it is worth, the third with twice as many."""
    monkeypatch.setattr(cpu, "FOR_A_THREAD", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    small = problems.Problem(1, 2, (3, 2), 1, "none", "released", 0.0, 1.0, False, False)  # 1 * 2 * 5 * (5 + 2) = 70
    assert [cpu._threads(replace(small, batch=batch)) for batch in (1, 14, 15, 28, 29, 1000)] == [1, 1, 2, 2, 3, 3]
