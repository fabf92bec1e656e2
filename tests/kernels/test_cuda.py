"""The CUDA C++ kernels, whose very source runs here on the CPU, lane by lane: emulated_cuda.py.

AddressSanitizer and UBSan watch, shared memory and the workspace hold NaN until they are written, and emulator.h
refuses races in shared memory, barriers that not all threads reach, and copies that nobody waited for.
"""

import subprocess
from dataclasses import replace
from functools import cache, partial
from itertools import product

import pytest
import torch
from pytest import fixture, mark

import emulated_cuda
from assertions import LAYOUTS, assert_same_results
from behaviour import (
    check_absent_frames,
    check_all_is_written,
    check_bad_number,
    check_large_float16,
    check_strides,
    check_subsets_of_gradients,
    check_subsets_of_incoming_gradients,
    check_twice,
)
from cases import CASES, HALVES, SEED, STATISTICAL, Case, Result, call, make, run, spread
from grjca_kernels import gated_rjca, verification
from grjca_kernels import problem as problems
from grjca_kernels.backends import TABLE, Backend
from on_gpu import TF32_ULP, cut_draws
from on_gpu import check as check_draws
from tolerances import check_rule, exact

pytestmark = mark.skipif(
    not emulated_cuda.compiler(), reason="needs g++ or another C++17 compiler with AddressSanitizer"
)
NAN, INF = float("nan"), float("inf")
function = partial(gated_rjca, backend="cuda")

# Whole tiles and parts of them, rows that can be copied 16, 8, 4 and 2 bytes at a time, C streamed and stored.
TILES = [
    Case("aligned", 2, 64, (64, 32), 2, "flat", dropout=0.4),
    Case("aligned-streamed", 5, 32, (64, 136), 1, "dynamic", dropout=0.4, lengths=(32, 17, 16, 1, 0)),
    Case("many-tiles", 2, 150, (140, 40), 1, "flat", dropout=0.3, lengths=(150, 120)),
    Case("many-tiles-streamed", 7, 20, (140, 40), 1, "flat", normalize=True),
    Case("whole-tiles", 1, 128, (128, 128), 1, "none", "paper"),
    Case("three-modalities-of-tiles", 2, 34, (36, 68, 130), 1, "hierarchical"),
    Case("two-bytes", 2, 35, (33, 31), 2, "hierarchical", normalize=True),
]
MOST = Case("most", 3, 35, (5, 9), 2, "hierarchical", normalize=True, dropout=0.3, lengths=(35, 4, 20))
STREAMED = replace(MOST, name="streamed", length=11, lengths=(11, 4, 0))
BOTH = [MOST, STREAMED]
RAW = replace(MOST, name="raw", joint="raw")


@fixture(autouse=True)
def on_the_cpu(monkeypatch):
    row = Backend("cuda", lambda: None, lambda device, dtype: None, emulated_cuda.forward, emulated_cuda.backward)
    monkeypatch.setitem(TABLE, "cuda", row)


def check(case: Case, dtype: torch.dtype = torch.float32, gradients: bool = True) -> None:
    check_rule(run(function, case, make(case, dtype)), case, dtype, gradients=gradients)


# ---- against the reference


@mark.parametrize("case", [*CASES, *TILES], ids=str)
@mark.sampled(14)
def test_float32(case):
    check(case)


@mark.parametrize("case, dtype", spread([*CASES, *TILES], HALVES), ids=str)
@mark.sampled(10)
def test_values_of_sixteen_bits(case, dtype):
    check(case, dtype, gradients=False)


@mark.parametrize("case, dtype", [
    *spread(STATISTICAL, HALVES), *product([replace(STATISTICAL[5], name="streamed", length=24)], HALVES)
], ids=str)  # fmt: skip
@mark.sampled(4)
def test_gradients_of_sixteen_bits(case, dtype):
    """Large enough that many relu change sides by rounding: on a small problem one of them decides."""
    check(case, dtype)


@mark.parametrize(
    "case", [STATISTICAL[1], STATISTICAL[7], replace(STATISTICAL[6], name="streamed", length=24)], ids=str
)
@mark.sampled(2)
def test_tf32(case):
    with emulated_cuda.overrides(tf32=True):
        result = run(function, case, make(case, torch.float32))
    check_draws(result, exact(case, torch.float32), cut_draws(case), TF32_ULP)
    assert not torch.equal(call(function, case, make(case, torch.float32))["Y[0]"], result.values["Y[0]"])


@mark.parametrize("dtype, reduced", [(torch.float32, False), (torch.float32, True), *((x, False) for x in HALVES)])
@mark.sampled(2)
def test_the_self_check(dtype, reduced):
    """Run the self-check of "auto", with smaller problems than on a GPU."""
    device = torch.device("cpu")
    for case in (
        verification.Case(3, 20, (72, 24), "hierarchical", True, reduced=reduced),
        verification.Case(2, 38, (72, 24), "flat", False, reduced=reduced),
    ):
        findings = list(verification.compare(TABLE["cuda"], case, device, dtype))
        assert not [str(finding) for finding in findings if not finding.passes]


def test_the_mask_is_that_of_the_cpu_backend():
    """Both are within the rule of the same numbers, which another mask is far from."""
    for case in (
        Case("dropout", 3, 9, (9, 4), 1, "none", dropout=0.6),
        Case("stored", 2, 34, (9, 4), 1, "none", dropout=0.6),
    ):
        check(case)
        check_rule(run(partial(gated_rjca, backend="cpu"), case, make(case, torch.float32)), case, torch.float32)
        other = run(function, replace(case, name="other"), make(case, torch.float32), seed=SEED + 1)
        with pytest.raises(AssertionError):
            check_rule(other, case, torch.float32)


# ---- launches


WISHES = [
    {"order": 1}, {"order": 2}, {"order": 3}, {"apart": True}, {"resident": 1}, {"resident": 7},
    {"chunk": 2}, {"chunk": 2, "parts": 3}, {"chunk": 3, "parts": 2, "order": 4}, {"tile": 64, "resident": 2},
]  # fmt: skip
SHARED = replace(STREAMED, name="shared", shared=True)
LAUNCHES = [
    *product(BOTH, WISHES),
    *((SHARED, overrides) for overrides in WISHES if {*overrides} - {"order", "resident"}),
]
LAUNCHES += [(SHARED, {"order": 1}), *((RAW, overrides) for overrides in WISHES if "parts" in overrides)]


@cache
def in_order(case):
    return run(function, case, make(case, torch.float32))


@mark.parametrize("case, overrides", LAUNCHES, ids=str)
@mark.sampled(10)
def test_launches(case, overrides):
    """However samples, tiles and blocks are distributed, in whatever order blocks run, and step by step."""
    once = in_order(case)
    with emulated_cuda.overrides(**overrides):
        again = run(function, case, make(case, torch.float32))
    assert_same_results(Result(again.values, {}), Result(once.values, {}))
    if ("order" in overrides and len(overrides) == 1) or "apart" in overrides:
        assert_same_results(again, once)
    check_rule(again, case, torch.float32)


@mark.parametrize("case", [TILES[2], replace(TILES[3], batch=3)], ids=str)
@mark.exhaustive
def test_orders_of_many_tiles(case):
    inputs = make(case, torch.bfloat16)
    with emulated_cuda.overrides(resident=4, chunk=1):
        once = run(function, case, inputs)
        for order in (1, 5):
            with emulated_cuda.overrides(order=order):
                assert_same_results(run(function, case, inputs), once)


# ---- memory


@mark.parametrize("case", BOTH, ids=str)
@mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_all_is_written_and_nothing_else(case, dtype):
    """Beside, in and between the tensors of the caller; AddressSanitizer sees to what is beyond them."""

    def backward(*arguments):
        with emulated_cuda.overrides(chunk=2):
            emulated_cuda.backward(*arguments)

    check_all_is_written(emulated_cuda.forward, backward, case, dtype)


@mark.parametrize("name", ["transposed", "part of a cat", "every second column", "batch last", "one number for all"])
@mark.parametrize("case", BOTH, ids=str)
@mark.sampled(4)
def test_strides(name, case):
    """Features and incoming gradients may have any layout."""
    check_strides(function, case, LAYOUTS[name])


def test_addresses_that_are_not_aligned():
    """Parameters and features that begin at odd elements of their storage."""
    inputs = make(TILES[0], torch.bfloat16)
    unaligned = inputs.map(lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape))
    assert any(x.data_ptr() % 16 for x in unaligned.parameters)
    assert_same_results(run(function, TILES[0], unaligned), run(function, TILES[0], inputs))


# ---- lengths, NaN and Inf


@mark.parametrize("case, garbage", [
    (MOST, NAN), (STREAMED, NAN), (replace(MOST, name="paper", form="paper"), INF),
    (replace(STREAMED, name="streamed-paper", form="paper"), INF),
], ids=str)  # fmt: skip
def test_what_stands_in_absent_rows_reaches_nothing(case, garbage):
    check_absent_frames(function, case, garbage)


@mark.parametrize("length", [5, 34])
@mark.parametrize("form", problems.FORMS)
@mark.parametrize("poison", [NAN, INF])
@mark.sampled(4)
def test_a_bad_number_stays_in_its_sample(length, form, poison):
    case = Case("bad", 2, length, (3, 2), 2, "flat", form, normalize=True, dropout=0.3)
    check_bad_number(function, case, poison)


@mark.parametrize("case", [
    Case("plain", 1, 5, (6, 3), 2, "dynamic"), Case("stored", 1, 33, (6, 3), 2, "flat", normalize=True)
], ids=str)  # fmt: skip
def test_large_features_of_float16(case):
    """Our float16 result is finite wherever PyTorch's is."""
    check_large_float16(function, case)


# ---- which gradients


@mark.parametrize("case", BOTH, ids=str)
def test_any_subset_of_incoming_gradients(case):
    check_subsets_of_incoming_gradients(function, case)


@mark.parametrize("case", [*BOTH, replace(RAW, name="streamed-raw", length=11, lengths=(11, 4, 0))], ids=str)
def test_any_subset_of_gradients(case):
    check_subsets_of_gradients(function, case)


def test_backward_twice_and_inputs_are_not_written():
    check_twice(function, MOST)


# ---- what stands below


@mark.parametrize("name", ["check_emulator", "check_layout"])
def test_below_the_kernels(name):
    """The lanes themselves, with every fault they must find; how operands lie, and who gets which tile."""
    result = subprocess.run([emulated_cuda.build(name)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
