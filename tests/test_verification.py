"""The self-check: what it finds."""

from dataclasses import replace

import pytest
import torch
from pytest import mark

import grjca_kernels
from grjca_kernels import derivation, triton, verification
from grjca_kernels.backends import TABLE

CPU, ROW = torch.device("cpu"), TABLE["cpu"]
pytestmark = mark.skipif(ROW.why_not() is not None, reason=str(ROW.why_not()))


def checked(row, dtype=torch.float32) -> str:
    return verification.check(row, CPU, dtype).reason or ""


# ---- what is found


@mark.parametrize("dtype", verification.DTYPES, ids=str)
def test_right_kernels_pass_whatever_the_numbers(dtype):
    """With half of what is allowed to spare: rounding is no false alarm."""
    wider = verification.Case(4, 20, (24, 16), "hierarchical", True)
    for seed in range(3):
        for case in (*verification.cases(CPU), wider):
            for finding in verification.compare(ROW, case, CPU, dtype, seed):
                assert finding.error <= finding.bound / 2 + (finding.bound == 0), finding


@mark.parametrize("dtype, reduced", [*((dtype, False) for dtype in verification.DTYPES), (torch.float32, True)])
def test_what_is_allowed_is_small(dtype, reduced):
    """At the sizes of a GPU no gradient of half the scale would pass, and no value off by a tenth of the largest."""
    for case in (
        verification.Case(12, 20, (72, 40), "hierarchical", True, reduced=reduced),
        verification.Case(4, 70, (72, 40), "flat", False, reduced=reduced),
    ):
        inputs = verification.make(case, dtype, seed=0)
        forward = verification.computed_forward(derivation.forward, case, inputs)
        backward = verification.computed_backward(derivation.backward, case, inputs)
        for finding in verification.compare(ROW, case, CPU, dtype):
            if finding.tensor in forward:
                assert finding.bound < 0.1 * float(forward[finding.tensor].abs().max()), finding
            elif finding.tensor in backward:
                assert finding.bound < 0.5 * float(backward[finding.tensor].norm()), finding


def test_the_interpreter_passes(capsys):
    if not triton.interpreted():
        pytest.skip("kernels run on the GPU here: test_gpu.py")
    pytest.importorskip("triton", minversion="3.6")
    assert triton.why_not() is None
    assert grjca_kernels.self_check("triton", "cpu")
    printed = capsys.readouterr().out
    assert printed.count("d gates") == 4 and "bfloat16: not checked, Triton's interpreter" in printed


def forward_with(change):
    """The row with a forward after which ``change(outputs, iterates, gates)`` runs."""

    def forward(call):
        ROW.forward(call)
        change(call.outputs, call.iterates, call.gates)

    return replace(ROW, forward=forward)


def backward_with(change):
    """The row with a backward after which ``change(features, parameters)`` runs on the gradients."""

    def backward(call, gradients):
        ROW.backward(call, gradients)
        change(gradients.features, gradients.parameters)

    return replace(ROW, backward=backward)


@mark.parametrize("dtype", verification.DTYPES, ids=str)
@mark.parametrize(
    "row, tensor",
    [
        (forward_with(lambda outputs, iterates, gates: outputs[1][0, 0, 0].add_(1)), "Y[1]"),
        (forward_with(lambda outputs, iterates, gates: iterates[0, 0, 1].zero_()), "X"),
        (forward_with(lambda outputs, iterates, gates: [g.mul_(0.9) for g in gates]), "G[0]"),
        (forward_with(lambda outputs, iterates, gates: outputs[0][0, -1].fill_(torch.nan)), "Y[0]"),
        (backward_with(lambda features, parameters: features[1].neg_()), "d features"),
        (backward_with(lambda features, parameters: parameters[0].neg_()), "d query"),
        (backward_with(lambda features, parameters: parameters[6].neg_()), "d value"),
        (backward_with(lambda features, parameters: parameters[10].mul_(2)), "d output"),
        (backward_with(lambda features, parameters: parameters[-1].fill_(torch.inf)), "d gates"),
        (replace(ROW, forward=lambda *arguments: None), "Y[0]"),
        (replace(ROW, backward=lambda *arguments: None), "d features"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_named(row, tensor, dtype):
    assert f", {tensor}: error" in checked(row, dtype)


def test_a_stale_buffer_is_named():
    """What is not written shows, however right it was the last time."""
    calls = []

    def forward(*arguments):
        calls.append(None)
        if len(calls) == 1:
            ROW.forward(*arguments)

    assert "L = 6, float32, changed when repeated: error 5, 0 is allowed" in checked(replace(ROW, forward=forward))


def test_bits_that_change_are_named():
    calls = []

    def jitter(outputs, iterates, gates):
        calls.append(None)
        iterates[0, 0, 0, 0] += torch.finfo(iterates.dtype).eps * (len(calls) % 2) * 4

    assert ", changed when repeated: error 1, 0 is allowed" in checked(forward_with(jitter))


def failing(*arguments):
    raise ValueError("out of resource: shared memory\nRequired: 300000")


def test_an_exception_is_a_reason_that_is_not_kept():
    verdict = verification.check(replace(ROW, forward=failing), CPU, torch.float32)
    assert verdict == verification.Verdict("it raised ValueError: out of resource: shared memory", lasting=False)
