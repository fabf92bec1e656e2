"""The reference against the authors' numbers, the eager module at full size, and a second reading of the contract."""

import math

import torch
from pytest import mark
from torch import Tensor

from cases import CASES, FULL_SIZE, GOLDEN, SEED, Case, Inputs, call, describe, eager_module, golden_results, make
from grjca_kernels import dropout, reference
from tolerances import FULL_SIZE as FULL_SIZE_TOLERANCE
from tolerances import check_close, check_float64


@mark.parametrize("name", GOLDEN)
def test_golden(name):
    check_float64(*golden_results(name, "reference"))


@mark.parametrize("case", FULL_SIZE.values(), ids=str)
def test_the_released_formulas_at_full_size(case):
    leaves = make(case).leaves()
    module, parameters = eager_module(case, leaves)
    eager = module(*leaves.features)
    ours = reference.gated_rjca(leaves.features, leaves.layers, leaves.gates, **case.options)
    incoming = [torch.randn_like(y) for y in eager]
    of_eager = torch.autograd.grad(eager, leaves.features + parameters, incoming)
    of_ours = torch.autograd.grad(ours, leaves.features + leaves.parameters, incoming)
    for i, (y, expected) in enumerate(zip((*ours, *of_ours), (*eager, *of_eager), strict=True)):
        check_close(str(i), y.detach(), expected.detach(), FULL_SIZE_TOLERANCE)


# ---- a second reading of operator.md


@mark.parametrize("case", CASES, ids=str)
def test_a_second_reading(case):
    inputs = make(case)
    values = call(reference.gated_rjca, case, inputs)
    for b in range(case.batch):
        n = case.length if case.lengths is None else case.lengths[b]
        expected = read_again(case, inputs, b, n)
        assert expected.keys() == values.keys()
        for name, value in expected.items():
            of_sample = values[name].select(-3, b)  # [..., L, columns]
            assert not of_sample[..., n:, :].any(), f"{name}: absent frames are not zero"
            check_close(name, of_sample[..., :n, :], value)


def read_again(case: Case, inputs: Inputs, b: int, n: int) -> dict[str, Tensor]:
    """Sample b alone, cut to n frames: outputs, iterates and gate values."""
    released, count, d = case.form == "released", range(len(case.widths)), sum(case.widths)
    history = [[x[b, :n]] for x in inputs.features]
    if case.normalize:
        history = [[x / x.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)] for (x,) in history]
    for t in range(case.iterations):
        query, *groups = inputs.layers[0 if case.shared else t]
        x = [states[t] for states in history]
        joint = torch.cat(x, -1)  # [n, d]
        joint = joint if query is None else times(joint, *query)
        for m in count:
            (w_k, b_k), value, output = (group[m] for group in groups)
            key = times(x[m].T, w_k[:n, :n], None if b_k is None else b_k[:n])  # [d_m, n]
            c = torch.einsum("il,lj->ij", key, joint).div(math.sqrt(d)).tanh() * mask(case, t, m, 0, d)[b]
            h = torch.einsum("li,ij->lj", times(x[m], *value), c)
            h = (h.tanh() if released else h).clamp(min=0)
            u = times(h, *output)
            u = u.clamp(min=0) * mask(case, t, m, 1, d)[b, :n] if released else u
            history[m].append(x[m] + u)
    values = {f"X[{m}]": torch.stack(history[m][1:]) for m in count}
    for m in count:
        y, gates = gated(case, history[m], inputs.gates[m])
        values |= {f"Y[{m}]": y, **{f"G[{m}][{g}]": gate for g, gate in enumerate(gates)}}
    return values


def gated(case: Case, x: list[Tensor], gates) -> tuple[Tensor, list[Tensor]]:
    ways = [times(x[t], *gate).div(case.temperature) for t, gate in zip(roles(case), gates, strict=True)]
    ways = [logits.exp() / logits.exp().sum(-1, keepdim=True) for logits in ways]

    def chosen(g: int, choices: list[Tensor]) -> Tensor:
        return torch.einsum("ln,lnd->ld", ways[g], torch.stack(choices, 1)).clamp(min=0)

    if case.gating == "none":
        return x[-1], []
    if case.gating == "hierarchical":
        return chosen(-1, [chosen(t - 1, x[: t + 1]) for t in range(1, len(x))]), ways
    return chosen(0, x if case.gating == "flat" else [x[0], x[-1]]), ways


def roles(case: Case) -> list[int]:
    """The iterate from which each gate is computed."""
    stages = {"none": [], "hierarchical": [*range(1, case.iterations + 1), -1]}
    return stages.get(case.gating, [-1])


def times(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.einsum("...i,oi->...o", x, weight)
    return y if bias is None else y + bias


def mask(case: Case, t: int, m: int, site: int, d: int) -> Tensor:
    d_m = case.widths[m]
    shape = (case.batch, *((case.length, d_m) if site else (d_m, d)))
    p = case.dropout if case.form == "released" else 0.0
    kept = dropout.keep_mask(torch.tensor(SEED), p, iteration=t, modality=m, site=site, shape=shape)
    return kept.double() / (1 - p)


# ---- dtypes


@mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_frames_normalise_to_zero_in_any_dtype(dtype):
    """1e-12 is no number of float16."""
    case = Case("zeros", normalize=True, lengths=(7, 3))
    inputs = make(case, dtype).leaves()
    with torch.no_grad():
        inputs.features[0][0, 2] = 0
    values = call(reference.gated_rjca, case, inputs)
    for name, value in values.items():
        assert value.isfinite().all(), name
        assert value.dtype == dtype
    gradients = torch.autograd.grad(
        [*values.values()], inputs.parameters, [torch.ones_like(v) for v in values.values()]
    )
    assert all(gradient.isfinite().all() for gradient in gradients)


@mark.parametrize("case", [case for case in CASES if case.batch and case.name != "all-absent"], ids=str)
def test_the_cases_reach_saturation(case):
    """Near zero tanh is linear and hides mistakes."""
    inputs = make(case)
    problem = describe(case, inputs)
    present = reference.presence(problem.length, inputs.lengths)
    x = [reference.initial(problem.normalize, x, present) for x in inputs.features]
    joint = torch.cat(x, -1)
    joint = times(joint, *inputs.layers[0].query) if case.projected else joint
    scores = [
        times(x_m.mT, *key) @ joint / math.sqrt(problem.width) for x_m, key in zip(x, inputs.layers[0].key, strict=True)
    ]
    assert max(float(s.tanh().abs().max()) for s in scores) > 0.95
    assert all(float(s.abs().min()) < 1 for s in scores)
