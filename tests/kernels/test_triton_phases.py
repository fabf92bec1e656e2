"""The Triton kernels from inside, in Triton's interpreter: every phase alone, and what they are made of.

A launch is a row of phases with a barrier between two of them. Here every phase is launched alone, and after it the
workspace is held against the same equation in float64, so that a failure names the phase.
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from types import SimpleNamespace

import pytest
import torch
from pytest import importorskip, mark
from torch import Tensor

importorskip("triton", minversion="3.6")
import triton
import triton.language as tl

import grjca_kernels.triton_kernels
from assertions import assert_same_results
from cases import SEED, Case, Inputs, cotangents, describe, make, run
from grjca_kernels import dropout, gated_rjca, reference
from grjca_kernels.triton_kernels import division, launch_config
from grjca_kernels.triton_kernels.arguments import Arguments, Scalars
from grjca_kernels.triton_kernels.masks import factors_of_correlation, load_factors, store_bits
from grjca_kernels.triton_kernels.primitives import tanh
from tolerances import DRAWS, check_close, check_draws, check_rule, length, perturbed

pytestmark = [
    mark.skipif(not grjca_kernels.triton_kernels.interpreted(), reason="not in Triton's interpreter"),
    mark.usefixtures("interpreter"),
]
NAN, INF = float("nan"), float("inf")

CASES = [
    Case("released", 2, 5, (2, 4), 2, "hierarchical", normalize=True, dropout=0.3, lengths=(5, 3)),
    Case("raw", 2, 3, (2, 3), 2, "flat", joint="raw", dropout=0.3),
    Case("paper", 2, 4, (3, 2), 2, "flat", "paper", lengths=(4, 1)),
]
FRAMES = {"streamed": launch_config.STREAM_FRAMES, "stored": 0}
"""Values of launch_config.STREAM_FRAMES that lead to either dataflow."""
function = partial(gated_rjca, backend="triton")


# ---- every phase alone


@dataclass(frozen=True)
class Step:
    """The results that a launch of one phase left behind."""

    phase: str
    t: int
    launch: launch_config.Launch
    unit: int
    activation_workspace: Tensor
    iterates: Tensor

    def slot(self, name: str, columns: int, i: int = 0) -> Tensor:
        """[rows, columns] of an activation of launch_config.Constants, the i-th after it."""
        constants = self.launch.constants
        begin = (constants.slots if name == "correlation" else getattr(constants, f"slot_{name}") + i) * self.unit
        rows = self.iterates.shape[1] * (columns if name == "correlation" else self.iterates.shape[2])
        return self.activation_workspace[begin : begin + rows * columns].view(rows, columns)


def phases(case: Case, stream: bool, backward: bool) -> list[tuple[str, int]]:
    """(name, t) of every step of a launch that is one chunk."""
    if not backward:
        one = ["project", *(["attend"] if stream else ["correlate", "attend_stored"]), "output"]
        middle = [(name, t) for t in range(case.iterations) for name in one]
        return [("initial", 0), *middle, ("gate", 0)]
    one = ["project_and_states", *(["attend"] if stream else ["correlate", "attend_stored"])]
    one += ["output_backward"] * (case.form == "released") + ["attend_backward"]
    one += ["correlate_backward"] if stream else ["correlate_backward_stored", "key_joint_backward"]
    middle = [(name, t) for t in reversed(range(case.iterations)) for name in (*one, "project_backward")]
    return [("initial", 0), ("gates_backward", 0), *middle, ("initial_backward", 0), ("reduce", 0)]


@lru_cache
def alone(case: Case, dataflow: str):
    """Result of a run in float32 that launches every phase alone, and every step: forward, backward."""
    from grjca_kernels.triton_kernels import launch

    steps = []

    def run_alone(kernel, prepared, arguments, others, batch):
        launched = prepared.launch
        names = phases(case, dataflow == "streamed", backward=bool(steps))
        assert len(names) == launched.steps
        steps.append([])
        for i, (name, t) in enumerate(names):
            counter = torch.zeros(1, dtype=torch.int32)
            kernel[(1,)](arguments, others, batch, i, i + 1, counter, launched.constants, **launch.options(launched))
            assert not counter.any(), "a phase alone waits for nobody"
            left = arguments.activation_workspace.clone(), arguments.iterates.clone()
            steps[-1].append(Step(name, t, launched, arguments.shape.unit, *left))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", run_alone)
        patch.setattr(launch_config, "STREAM_FRAMES", FRAMES[dataflow])
        patch.setattr(division, "chunk_of", lambda problem, *_: problem.batch)
        patch.setattr(division, "parts_of", lambda *_: 2)
        patch.setattr(division, "key_parts_of", lambda *_: 2)
        result = run(function, case, make(case, torch.float32))
    return result, *steps


@mark.parametrize("dataflow", FRAMES)
@mark.parametrize("case", CASES, ids=str)
@mark.sampled(2)
def test_phases_alone_are_the_whole(case, dataflow, monkeypatch):
    """The same bits: the benchmarks time steps alone."""
    monkeypatch.setattr(launch_config, "STREAM_FRAMES", FRAMES[dataflow])
    monkeypatch.setattr(division, "chunk_of", lambda problem, *_: problem.batch)
    monkeypatch.setattr(division, "parts_of", lambda *_: 2)
    monkeypatch.setattr(division, "key_parts_of", lambda *_: 2)
    assert_same_results(alone(case, dataflow)[0], run(function, case, make(case, torch.float32)))


@mark.parametrize("dataflow", FRAMES)
@mark.sampled(1)
def test_masks_stay_in_their_bytes(dataflow, monkeypatch):
    from grjca_kernels.triton_kernels import launch

    mask_bytes, run_launch, guard, launched = launch_config.mask_bytes, launch.run, 64, []

    def guarded(kernel, prepared, arguments, others, batch):
        arguments.bits.fill_(165)
        run_launch(kernel, prepared, arguments, others, batch)
        launched.append(prepared.launch.bits)
        assert (arguments.bits[-guard:] == 165).all() and not (arguments.bits[:-guard] == 165).all()

    monkeypatch.setattr(launch, "run", guarded)
    monkeypatch.setattr(launch_config, "mask_bytes", lambda *of: mask_bytes(*of) + guard)
    monkeypatch.setattr(launch_config, "STREAM_FRAMES", FRAMES[dataflow])
    run(function, CASES[0], make(CASES[0], torch.float32))
    assert len(launched) == 2 and min(launched) > guard


# ---- every phase against the equations


def iteration(
    case: Case, inputs: Inputs, t: int, x: list[Tensor], shown: Tensor, seed: Tensor | None
) -> dict[str, list[Tensor]]:
    """Name -> per modality what an iteration computes; "key" is K^T [B, L, d_m], "next" X^(t+1)."""
    layer, p, d = inputs.layers[0 if case.shared else t], case.dropout, sum(case.widths)
    joint = torch.cat(x, dim=-1)
    joint = joint if layer.query is None else reference.linear(joint, layer.query)
    of: dict[str, list[Tensor]] = {"joint": [joint]}
    for m, x_m in enumerate(x):

        def drop(a: Tensor, site: int, m: int = m) -> Tensor:
            where = {"iteration": t, "modality": m, "site": site}
            return a if seed is None else a * dropout.scaled_mask(seed, p, **where, shape=a.shape, dtype=a.dtype)

        key, value = reference.linear(x_m.mT, layer.key[m]).mT, reference.linear(x_m, layer.value[m])
        correlation = drop(torch.tanh((key * shown).mT @ joint / math.sqrt(d)), dropout.SITE_CORRELATION)
        attended = value @ correlation
        hidden = torch.relu(attended if case.form == "paper" else torch.tanh(attended))
        update = reference.linear(hidden, layer.output[m])
        u = update if case.form == "paper" else drop(torch.relu(update), dropout.SITE_OUTPUT)
        names = ("key", "value", "correlation", "attended", "hidden", "update", "next")
        for name, tensor in zip(
            names, (key, value, correlation, attended, hidden, update, x_m + u * shown), strict=True
        ):
            of.setdefault(name, []).append(tensor)
    return of


def equations(case: Case, inputs: Inputs) -> dict[str, list[Tensor]]:
    """Name -> per iteration [rows, columns] as the workspace holds it; d_<name> is the gradient by it."""
    problem, leaves = describe(case, inputs), inputs.leaves()
    seed = torch.tensor(SEED) if problem.released and case.dropout else None
    present = reference.presence(problem.length, leaves.lengths)
    shown = torch.ones((), dtype=leaves.features[0].dtype) if present is None else present
    states, computed = [[reference.initial(problem.normalize, x, present) for x in leaves.features]], []
    for t in range(case.iterations):
        computed.append(iteration(case, leaves, t, states[t], shown, seed))
        states.append(computed[t].pop("next"))
    found = {"state": [torch.cat(x, dim=-1) for x in states]}
    found["d_state"] = [d * shown for d in gradients(case, leaves, states, states, shown)]
    cut = [[x.detach().requires_grad_() for x in of_modalities] for of_modalities in states]
    found["d_gated"] = [d * shown for d in gradients(case, leaves, cut, cut, shown)]
    for name in computed[0]:
        tensors = [of[name] for of in computed]
        if name != "correlation":
            found[f"d_{name}"] = gradients(case, leaves, states, tensors, shown)
        found[name] = [torch.cat(of, dim=-2 if name == "correlation" else -1) for of in tensors]
    found["key"] = [key * shown / math.sqrt(problem.width) for key in found["key"]]
    return {name: [x.detach().flatten(0, 1) for x in of] for name, of in found.items()}


def gradients(
    case: Case, inputs: Inputs, states: list[list[Tensor]], by: list[list[Tensor]], shown: Tensor
) -> list[Tensor]:
    """By each list of tensors, side by side: of what a run of the case returns, computed from X^0..T."""
    problem, results = describe(case, inputs), []
    gated = [reference.gate(problem, x, inputs.gates[m]) for m, x in enumerate(zip(*states, strict=True))]
    results += [y * shown for y, _ in gated]
    results += [torch.stack(x[1:]) for x in zip(*states, strict=True)]
    results += [
        value * shown for _, of_gates in gated for value in (of_gates if isinstance(of_gates, tuple) else [of_gates])
    ]
    incoming = [gradient.float().to(gradient.dtype) for gradient in cotangents(results)]
    return [torch.cat(torch.autograd.grad(results, x, incoming, retain_graph=True), dim=-1) for x in by]


@lru_cache
def truth_and_draws(case: Case):
    """The equations in float64, and in float32 on inputs perturbed by half an ulp."""
    inputs = make(case, torch.float32)
    draws = [inputs if i == 0 else perturbed(inputs, i) for i in range(DRAWS)]
    return equations(case, inputs.to(torch.float64)), [equations(case, x) for x in draws]


LEAVES = {
    "project": ("joint", "value", "key"),
    "project_and_states": ("joint", "value", "key"),
    "correlate": ("correlation",),
    "attend": ("hidden",),
    "attend_stored": ("hidden",),
    "output_backward": ("d_update",),
    "attend_backward": ("d_attended",),
    "correlate_backward": ("d_value", "d_joint", "d_key"),
    "correlate_backward_stored": ("d_value",),
    "key_joint_backward": ("d_joint", "d_key"),
}
"""Phase -> the activations that it leaves behind."""


def left_by(step: Step, case: Case) -> list[tuple[str, Tensor, int]]:
    """(name in equations(), what the workspace holds, t)."""
    width, last = sum(case.widths), case.iterations
    if step.phase == "initial":
        return [("state", step.slot("initial", width), 0)]
    if step.phase == "output":
        return [("state", step.iterates[step.t].flatten(0, 1), step.t + 1)]
    if step.phase == "gates_backward":
        return [("d_gated", step.slot("d_state", width, last % 2), last)]
    if step.phase == "project_backward":
        return [("d_state", step.slot("d_state", width, step.t % 2), step.t)]
    of_gates = (
        [("d_gated", step.slot("d_state", width, step.t % 2), step.t)] if step.phase == "project_and_states" else []
    )
    names = [name for name in LEAVES[step.phase] if name != "joint" or case.projected]
    wide = ("hidden", "d_attended")
    slots = [(name, step.slot(name, width * len(case.widths) if name in wide else width), step.t) for name in names]
    return of_gates + slots


STEPS = {
    f"{case}-{dataflow}-{'backward' if backward else 'forward'}-{i}-{name}": (case, dataflow, backward, i)
    for case in CASES
    for dataflow in FRAMES
    for backward in (False, True)
    for i, (name, _) in enumerate(phases(case, dataflow == "streamed", backward))
}


@mark.parametrize("case, dataflow, backward, i", STEPS.values(), ids=STEPS)
def test_phase(case, dataflow, backward, i):
    """What a step leaves in the workspace; of the last ones, what the caller is given. Blame the first to fail."""
    result, *steps = alone(case, dataflow)
    step = steps[backward][i]
    if step.phase in ("gate", "initial_backward", "reduce"):
        return check_rule(result, case, torch.float32, gradients=step.phase != "gate")
    truth, draws = truth_and_draws(case)
    for name, ours, t in left_by(step, case):
        check_draws(f"{name} {t}", ours, truth[name][t], [draw[name][t] for draw in draws], length)


def test_the_equations_are_those_of_the_reference():
    for case in CASES:
        expected = run(reference.gated_rjca, case, make(case))
        found = equations(case, make(case))
        iterates = torch.cat([expected.values[f"X[{m}]"] for m in range(len(case.widths))], dim=-1)
        for x, y in zip(found["state"][1:], iterates.flatten(1, 2), strict=True):
            check_close("X", x, y)


# ---- what the phases are made of


@triton.jit
def tanh_kernel(p_x, p_y, n, BLOCK: tl.constexpr, C: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tanh(tl.load(p_x + o, mask=o < n), C), mask=o < n)


def test_tanh():
    """To 3 ulp, and what is special stays so: zero, numbers below the normal ones, infinities, NaN."""
    exponents = torch.logspace(-45, 4, 20001, dtype=torch.float64).float()
    positive = torch.cat([exponents, torch.linspace(0, 12, 20001), torch.tensor([0.0, 0.625, 1e38, INF])])
    x = torch.cat([positive, -positive, torch.tensor([NAN])])
    y = torch.empty_like(x)
    block = 1 << (x.numel() - 1).bit_length()
    tanh_kernel[(1,)](x, y, x.numel(), block, SimpleNamespace(approximate_tanh=False))
    truth = torch.tanh(x.double())
    assert y[-1].isnan() and not y[:-1].isnan().any() and (y[:-1].abs() <= 1).all()
    assert torch.equal(y[:-1].sign(), x[:-1].sign())
    _, exponent = torch.frexp(truth[:-1].float())
    ulp = 2.0 ** (exponent - 24).clamp_min(-149).double()
    assert ((y.double() - truth)[:-1].abs() / ulp).max() <= 3


@triton.jit
def correlation_factors_kernel(a, p_to, sample, t, m, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    o_r, o_c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    factors = factors_of_correlation(a, sample, t, m, row, column, ROWS, COLUMNS)
    tl.store(p_to + o_c[:, None] * ROWS + o_r[None, :], factors)


@triton.jit
def bits_kernel(a, p_bits, p_to, sample, t, m, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of U_m, by way of the bytes: [2, ROWS, COLUMNS] for two samples."""
    o_g, o_r, o_c = tl.arange(0, ROWS // 4)[:, None], tl.arange(0, 2 * ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    samples, groups = sample + o_g // (ROWS // 8), row // 8 + o_g % (ROWS // 8)
    store_bits(p_bits + o_g * COLUMNS + o_c, a, column + o_c, groups, samples, t, m, 1, (o_g >= 0) & (o_c >= 0))
    tl.debug_barrier()
    factors = load_factors(p_bits + o_r // 8 * COLUMNS + o_c, a, row + o_r, (o_r >= 0) & (o_c >= 0))
    tl.store(p_to + o_r * COLUMNS + o_c, factors)


@mark.parametrize("p", [0.6, 0.00001, 0.99999])
@mark.parametrize("sample, t, m, row, column", [(0, 0, 0, 0, 0), (3, 7, 3, 8, 1), (2, 1, 1, 40, 37)])
@mark.parametrize("seed", [SEED, -1, 5])
def test_the_mask_bit_for_bit(seed, sample, t, m, row, column, p):
    """A tile at any place of C_m, transposed; and of U_m, over two samples."""
    a = Arguments(**dict.fromkeys(Arguments._fields, 0))._replace(
        seed=torch.tensor(seed), scalars=Scalars(1.0, 1.0, 2 * dropout.threshold(p) + 1, 1 / (1 - p))
    )
    of = {"iteration": t, "modality": m, "shape": (sample + 2, row + 32, column + 16), "dtype": torch.float32}
    factors = torch.empty(16, 32)
    correlation_factors_kernel[(1,)](a, factors, sample, t, m, row, column, 32, 16)
    expected = dropout.scaled_mask(torch.tensor(seed), p, site=dropout.SITE_CORRELATION, **of)
    assert torch.equal(factors.mT > 0, expected[sample, row:, column:] > 0)
    assert torch.allclose(factors[factors > 0], torch.tensor(1 / (1 - p)))
    factors, bits = torch.empty(2, 32, 16), torch.empty(8 * 16, dtype=torch.uint8)
    bits_kernel[(1,)](a, bits, factors, sample, t, m, row, column, 32, 16)
    expected = dropout.scaled_mask(torch.tensor(seed), p, site=dropout.SITE_OUTPUT, **of)
    assert torch.equal(factors > 0, expected[sample:, row:, column:] > 0)
