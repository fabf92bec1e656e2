"""The self-check: what it runs, and what it finds."""

import hashlib
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from pytest import mark
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

import grjca_kernels
from grjca_kernels import cuda, manual_backward, native, triton_kernels, verification
from grjca_kernels.backends import TABLE
from grjca_kernels.problem import Problem, expected_tensors
from grjca_kernels.triton_kernels import launch_config
from grjca_kernels.verification import Case

CPU, ROW = torch.device("cpu"), TABLE["cpu"]
PRECISIONS = [*((dtype, False) for dtype in verification.DTYPES), (torch.float32, True)]
MULTIPROCESSORS = 132
WIDE = [  # those of a GPU with real widths, and fewer samples; with many frames one width is enough
    replace(case, batch=batch, widths=(512, 128) if case.length == 256 else case.widths)
    for case, batch in zip(verification.cases_of_gpu(MULTIPROCESSORS)[2:], (3, 1, 2, 1), strict=True)
]
pytestmark = mark.skipif(ROW.why_not() is not None, reason=str(ROW.why_not()))


@pytest.fixture(autouse=True, scope="module")
def derived_once():
    """Many tests compare the same numbers: the manual backward of them is computed once."""
    found = {}

    def once(computed):
        def compute(function, case, inputs):
            if function not in (manual_backward.forward, manual_backward.backward):
                return computed(function, case, inputs)
            key = function, case, type(_get_current_dispatch_mode()), digest(inputs)
            if key not in found:
                found[key] = computed(function, case, inputs)
            return found[key]

        return compute

    with pytest.MonkeyPatch.context() as patch:
        for name in ("computed_forward", "computed_backward"):
            patch.setattr(verification, name, once(getattr(verification, name)))
        patch.setattr(verification, "make", cache(verification.make))
        yield


def digest(inputs: verification.Inputs) -> bytes:
    hashed = hashlib.sha1(str(inputs.iterates.dtype).encode())
    inputs.map(lambda x: hashed.update(x.contiguous().view(torch.uint8).numpy()) or x)
    return hashed.digest()


def checked(row, dtype=torch.float32) -> str:
    return verification.check(row, CPU, dtype).reason or ""


# ---- what is run

MODELS = [  # "clip", "abaw", "light" and "long": operator.md
    Problem(batch, length, widths, iterations, "flat", "released", 0.3, 0.1, True, False)
    for length, widths, iterations, *batches in (
        (16, (512, 512), 2, 64),
        (300, (256, 128), 2, 1, 12, 64),
        (300, (128, 64), 3, 32),
        (1024, (512, 512), 2, 8),
    )
    for batch in batches
]
DEVICES = [
    launch_config.Device("cuda", 80, 108, 163 * launch_config.KIB),
    launch_config.Device("cuda", 90, 132, 227 * launch_config.KIB),
    launch_config.Device("cuda", 100, 148, 227 * launch_config.KIB),
]


def kinds_of_triton(problems, device, dtype, tf32) -> set[tuple]:
    """Tiles, and all that decides how they are loaded."""
    names = ("stream", "called", "length_step", "block_m", "block_n", "block_k", "block_c", "block_w", "block_l")
    kinds = set()
    for problem in problems:
        for direction in ({"backward": False}, {"backward": True, "weights": True}):
            launch = launch_config.launch(problem, dtype, device, tf32=tf32, lengths=True, **direction)
            of = [getattr(launch.constants, name) for name in names]
            of[2] = of[2] * torch.finfo(dtype).bits % 128 == 0  # whether rows of W_k begin at multiples of 16 bytes
            kinds.add((*direction, *of, launch.tiles.warps, launch.tiles.stages))
    return kinds


@mark.parametrize("device", DEVICES, ids=lambda device: f"sm_{device.capability}")
@mark.parametrize("dtype, tf32", PRECISIONS)
def test_the_tiles_that_models_get_of_triton_are_checked(device, dtype, tf32):
    checked = [case.problem for case in verification.cases_of_gpu(device.multiprocessors)]
    of_models = kinds_of_triton(MODELS, device, dtype, tf32)
    assert len(of_models) >= 4  # both directions and dataflows
    assert of_models <= kinds_of_triton(checked, device, dtype, tf32)


def kinds_of_cuda(problems, dtype, tf32) -> set[tuple]:
    kinds = set()
    for problem in problems:
        for backward in (False, True):
            plan = cuda.plan(problem, dtype, 2 * MULTIPROCESSORS, tf32=tf32, backward=backward, weights=backward).plan()
            of = tuple(plan.get(name) for name in ("streamed", "tile_columns", "tile_weights"))
            kinds.add((backward, *of, plan["frames"] > problem.length))
    return kinds


@mark.skipif(not hasattr(native.library, "CudaLaunch"), reason="built without nvcc")
@mark.parametrize("dtype, tf32", PRECISIONS)
def test_the_tiles_that_models_get_of_cuda_are_checked(dtype, tf32):
    checked = [case.problem for case in verification.cases_of_gpu(MULTIPROCESSORS)]
    of_models = kinds_of_cuda(MODELS, dtype, tf32)
    assert {streamed for _, streamed, *_ in of_models} == {0, 1}
    assert of_models <= kinds_of_cuda(checked, dtype, tf32)


def test_odd_widths_and_chunks_are_checked_too():
    problems = [case.problem for case in verification.cases_of_gpu(MULTIPROCESSORS)]
    odd = [problem for problem in problems if not launch_config.aligned(problem)]
    assert {launch_config.streams(problem) for problem in odd} == {False, True}
    for backward in (False, True):
        launches = [
            launch_config.launch(problem, torch.bfloat16, DEVICES[1], tf32=False, lengths=True, backward=backward)
            for problem in problems
        ]
        assert any(launch.chunk < problem.batch for launch, problem in zip(launches, problems, strict=True))


# ---- what is found


@mark.parametrize("dtype", verification.DTYPES, ids=str)
def test_right_kernels_pass_whatever_the_numbers(dtype):
    """Right kernels use at most half of what is allowed, so rounding raises no false alarm."""
    wider = Case(4, 20, (24, 16), "hierarchical", True)
    for seed in range(3):
        for case in (*verification.cases(CPU), wider):
            for finding in verification.compare(ROW, case, CPU, dtype, seed):
                assert finding.error <= finding.bound / 2 + (finding.bound == 0), finding


@mark.parametrize("dtype", verification.DTYPES, ids=str)
@mark.parametrize("case", WIDE, ids=lambda case: f"L{case.length}-B{case.batch}")
@mark.sampled(4)
def test_right_kernels_pass_at_real_widths(case, dtype):
    for finding in verification.compare(ROW, case, CPU, dtype):
        assert finding.error <= finding.bound / 2 + (finding.bound == 0), finding


@mark.parametrize("dtype, reduced", PRECISIONS)
@mark.sampled(2)
def test_what_is_allowed_is_small(dtype, reduced):
    """At the sizes of a GPU no gradient of half the scale would pass, and no value off by a tenth of the largest."""
    for case in (Case(12, 20, (72, 40), "hierarchical", True), Case(4, 35, (72, 40), "flat", False), WIDE[0], WIDE[2]):
        case = replace(case, reduced=reduced)
        inputs = verification.make(case, dtype, seed=0)
        forward = verification.computed_forward(manual_backward.forward, case, inputs)
        backward = verification.computed_backward(manual_backward.backward, case, inputs)
        for finding in verification.compare(ROW, case, CPU, dtype):
            if finding.tensor in forward:
                assert finding.bound < 0.1 * float(forward[finding.tensor].abs().max()), finding
            elif finding.tensor in backward:
                assert finding.bound < 0.5 * float(backward[finding.tensor].norm()), finding


@mark.exhaustive
def test_the_interpreter_passes(capsys):
    if not triton_kernels.interpreted():
        pytest.skip("kernels run on the GPU here: test_gpu.py")
    pytest.importorskip("triton", minversion="3.6")
    from interpreter import speed_up

    assert triton_kernels.why_not() is None
    speed_up()
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
        (backward_with(lambda features, parameters: parameters[0].neg_()), "d query[0]"),
        (backward_with(lambda features, parameters: parameters[6].neg_()), "d value[0]"),
        (backward_with(lambda features, parameters: parameters[10].mul_(2)), "d output[0]"),
        (backward_with(lambda features, parameters: parameters[-1].fill_(torch.inf)), "d gates"),
        (replace(ROW, forward=lambda *arguments: None), "Y[0]"),
        (replace(ROW, backward=lambda *arguments: None), "d features"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_named(row, tensor, dtype):
    assert f", {tensor}: error" in checked(row, dtype)


def with_parameters(change):
    """The row, given parameters of which ``change(problem, parameters by name)`` has changed some."""

    def changed(call):
        names = [name for name, _ in expected_tensors(call.problem)]
        named = dict(zip(names, map(torch.clone, call.parameters), strict=True))
        change(call.problem, named)
        return call._replace(parameters=[*named.values()])

    return replace(
        ROW,
        forward=lambda call: ROW.forward(changed(call)),
        backward=lambda call, gradients: ROW.backward(changed(call), gradients),
    )


def without_a_step(name):
    """One step of 64 along the sum of a product is missing."""
    return with_parameters(lambda problem, named: named[f"layers[0].{name}.weight"][:, 64:128].zero_())


def with_another_scale(problem, named):
    """1 / sqrt(d_a) in place of 1 / sqrt(d)."""
    for part in ("weight", "bias"):
        named[f"layers[0].key[1].{part}"].mul_(math.sqrt(problem.width / problem.widths[1]))


@mark.parametrize("dtype", verification.DTYPES, ids=str)
@mark.parametrize("case", [WIDE[0], WIDE[2]], ids=lambda case: f"L{case.length}")
@mark.parametrize(
    "row",
    [
        without_a_step("query"),
        without_a_step("output[0]"),
        with_parameters(with_another_scale),
        backward_with(lambda features, parameters: parameters[0][128:, :128].zero_()),
    ],
    ids=["J", "U", "scale", "tile of d W_q"],
)
def test_a_tile_that_is_missing_at_real_widths_is_found(row, case, dtype):
    assert not all(finding.passes for finding in verification.compare(row, case, CPU, dtype))


@mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@mark.parametrize("name", ["key[0]", "value[0]"])
def test_a_step_that_hides_in_bfloat16_is_found(name, dtype):
    """K and V are summed over once more, in which an error of one step nearly vanishes."""
    findings = verification.compare(without_a_step(name), WIDE[0], CPU, dtype)
    assert not all(finding.passes for finding in findings)


# ---- TF32


class Rounded(verification.CutOperands):
    """As the CUDA C++ kernels do it."""

    def cut(self, x):
        return super().cut((x.view(torch.int32) + 0x1000).view(torch.float32))


class Off(verification.CutOperands):
    """As Triton does it, and wrong by 2^-8."""

    def cut(self, x):
        return super().cut(x) * (1 + 2**-8)


def emulated(mode):
    """Kernels whose products have operands as ``mode`` makes them."""

    def within(function):
        def run(*arguments):
            with mode():
                function(*arguments)

        return run

    return replace(ROW, forward=within(manual_backward.forward), backward=within(manual_backward.backward))


@mark.parametrize(
    "case", [Case(12, 20, (72, 40), "hierarchical", True), *WIDE[1:3]], ids=lambda case: f"L{case.length}"
)
@mark.parametrize("allowed", ["by the settings", "by autocast"])
@mark.sampled(2)
def test_tf32_may_be_cut_or_rounded_and_no_worse(case, allowed, monkeypatch):
    if allowed == "by autocast":
        case = replace(case, reduced=True)
    else:
        monkeypatch.setattr(verification, "allows_tf32", lambda: True)
    for mode in (verification.CutOperands, Rounded):
        findings = [*verification.compare(emulated(mode), case, CPU, torch.float32)]
        assert "TF32" in findings[0].where
        assert [str(finding) for finding in findings if not finding.passes] == []
    findings = [*verification.compare(emulated(Off), case, CPU, torch.float32)]
    assert sum(not finding.passes for finding in findings) > 1


def test_every_product_is_cut():
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(function._schema.name)
            return function(*args, **(kwargs or {}))

    names = set()
    for case in verification.cases(CPU):
        inputs = verification.make(case, torch.float32, 0).to(CPU, torch.float32)
        with Names():
            verification.computed_forward(manual_backward.forward, case, inputs)
            verification.computed_backward(manual_backward.backward, case, inputs)
    products = {name for name in names if name.endswith(("mm", "mv", "mv_", "dot", "linear", "einsum", "matmul"))}
    assert products and products <= {*verification.CutOperands.PRODUCTS}


# ---- what is said


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
