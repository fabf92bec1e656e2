"""The hand-written backward is that of autograd. It is put in the place of a backend, as whose it is asked for."""

from functools import partial

import torch
from pytest import fixture, mark

from cases import CASES, EVERYTHING, Case, call, cotangents, make, run
from grjca_kernels import gated_rjca, manual_backward, reference
from grjca_kernels.backends import TABLE, Backend
from tolerances import check_float64

function = partial(gated_rjca, backend="cpu")


@fixture(autouse=True)
def derived(monkeypatch):
    row = Backend("cpu", lambda: None, lambda device, dtype: None, manual_backward.forward, manual_backward.backward)
    monkeypatch.setitem(TABLE, "cpu", row)


@mark.parametrize("case", CASES, ids=str)
def test_equals_autograd(case):
    inputs = make(case)
    check_float64(run(function, case, inputs), run(reference.gated_rjca, case, inputs))


@mark.parametrize("absent", ["Y", "X", "G"])
def test_a_gradient_that_does_not_arrive_is_zero(absent):
    leaves = make(EVERYTHING).leaves()
    values = call(function, EVERYTHING, leaves)
    incoming = dict(zip(values, cotangents([*values.values()]), strict=True))
    there = [name for name in values if not name.startswith(absent)]
    zeroed = [torch.zeros_like(d) if name not in there else d for name, d in incoming.items()]

    def gradients(outputs, incoming):
        return torch.autograd.grad(outputs, leaves.features + leaves.parameters, incoming, retain_graph=True)

    left_out = gradients([values[name] for name in there], [incoming[name] for name in there])
    torch.testing.assert_close(left_out, gradients([*values.values()], zeroed), rtol=0, atol=0)


def test_gradcheck():
    case = Case("gradcheck", 2, 3, (2, 1), 2, "hierarchical", normalize=True, dropout=0.3, lengths=(3, 2))
    inputs = make(case).leaves()

    def values(*tensors):
        remaining = iter(tensors)
        return tuple(call(function, case, inputs.map(lambda _: next(remaining))).values())

    assert torch.autograd.gradcheck(values, (*inputs.features, *inputs.parameters))
