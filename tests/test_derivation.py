"""The hand-written backward is that of autograd."""

import torch
from pytest import mark

from cases import CASES, EVERYTHING, SEED, Case, Inputs, Result, call, cotangents, describe, make, parameter_names, run
from grjca_kernels import derivation, reference
from tolerances import check_float64


def seed_of(case: Case) -> torch.Tensor | None:
    return torch.tensor(SEED) if case.dropout and case.form == "released" else None


def split(case: Case, tensors: list) -> tuple[list, list, list]:
    """Outputs, iterates and gate values per modality from the flat list that cases.call names."""
    count = len(case.widths)
    ways, values = len(describe(case, make(case)).gate_ways), tensors[2 * count :]
    groups = [tuple(values[m * ways : (m + 1) * ways]) for m in range(count)]
    if case.gating != "hierarchical":
        groups = [group[0] if group else None for group in groups]
    return tensors[:count], tensors[count : 2 * count], groups


def derive(case: Case, inputs: Inputs) -> Result:
    problem, seed = describe(case, inputs), seed_of(case)
    arguments = (problem, inputs.features, inputs.layers, inputs.gates, inputs.lengths, seed)
    values = call(reference.gated_rjca, case, inputs)
    outputs, iterates, _ = derivation.forward(*arguments)
    torch.testing.assert_close(outputs, list(values.values())[: len(outputs)], rtol=0, atol=0)
    incoming = split(case, cotangents(list(values.values())))
    d_features, d_parameters = derivation.backward(*arguments, iterates, *incoming)
    names = [f"d features[{m}]" for m in range(len(d_features))] + [f"d {name}" for name in parameter_names(case)]
    return Result(values, dict(zip(names, d_features + d_parameters, strict=True)))


@mark.parametrize("case", CASES, ids=str)
def test_equals_autograd(case):
    inputs = make(case)
    check_float64(derive(case, inputs), run(reference.gated_rjca, case, inputs))


@mark.parametrize("absent", ["outputs", "iterates", "gates"])
def test_a_gradient_that_does_not_arrive_is_zero(absent):
    inputs = make(EVERYTHING)
    problem = describe(EVERYTHING, inputs)
    arguments = (problem, inputs.features, inputs.layers, inputs.gates, inputs.lengths, seed_of(EVERYTHING))
    values = list(call(reference.gated_rjca, EVERYTHING, inputs).values())
    incoming = dict(zip(("outputs", "iterates", "gates"), split(EVERYTHING, cotangents(values)), strict=True))
    zeros = dict(zip(incoming, split(EVERYTHING, [torch.zeros_like(value) for value in values]), strict=True))
    iterates = derivation.forward(*arguments)[1]
    left_out = derivation.backward(*arguments, iterates, *{**incoming, absent: [None, None]}.values())
    zero = derivation.backward(*arguments, iterates, *{**incoming, absent: zeros[absent]}.values())
    torch.testing.assert_close(left_out, zero, rtol=0, atol=0)


class Derived(torch.autograd.Function):
    """derivation.py as PyTorch sees a kernel."""

    @staticmethod
    def forward(ctx, case, inputs, *tensors):
        remaining = iter(tensors)
        ctx.case, ctx.inputs = case, inputs.map(lambda _: next(remaining))
        problem = describe(case, ctx.inputs)
        outputs, ctx.iterates, gates = derivation.forward(
            problem, ctx.inputs.features, ctx.inputs.layers, ctx.inputs.gates, inputs.lengths, seed_of(case)
        )
        return (*outputs, *ctx.iterates, *(value for of_modality in gates for value in of_modality))

    @staticmethod
    def backward(ctx, *grads):
        case, inputs = ctx.case, ctx.inputs
        d_features, d_parameters = derivation.backward(
            describe(case, inputs),
            inputs.features,
            inputs.layers,
            inputs.gates,
            inputs.lengths,
            seed_of(case),
            ctx.iterates,
            *split(case, list(grads)),
        )
        return (None, None, *d_features, *d_parameters)


def test_gradcheck():
    case = Case("gradcheck", 2, 3, (2, 1), 2, "hierarchical", normalize=True, dropout=0.3, lengths=(3, 2))
    inputs = make(case).leaves()
    tensors = (*inputs.features, *inputs.parameters)
    assert torch.autograd.gradcheck(lambda *x: Derived.apply(case, inputs, *x), tensors)
