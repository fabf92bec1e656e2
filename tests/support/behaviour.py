"""Requirements on every kernel, as checks of a function like gated_rjca on tensors of the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from assertions import assert_same_results, backward
from cases import Case, Inputs, Result, call, cotangents, described, make, run
from grjca_kernels import gated_rjca, keeping
from grjca_kernels.call import Call, Gradients

Function = Callable[..., Any]


def check_strides(function: Function, case: Case, layout: Callable[[Tensor], Tensor]) -> None:
    """Strides of features and of incoming gradients change nothing."""
    inputs = make(case, torch.float32)
    strided = [layout(x) for x in inputs.features]
    results = []
    for features, bring in ((strided, layout), ([x.contiguous() for x in strided], lambda x: layout(x).contiguous())):
        leaves = replace(inputs, features=[x.detach().requires_grad_() for x in features])  # keeps the strides
        values = call(function, case, leaves)
        incoming = [bring(gradient) for gradient in cotangents([*values.values()])]
        gradients = torch.autograd.grad([*values.values()], leaves.features, incoming)
        assert all(gradient.isfinite().all() for gradient in gradients)
        results.append(Result(values, dict(zip("va", gradients, strict=True))))
    assert_same_results(*results)


def check_absent_frames(function: Function, case: Case, garbage: float) -> None:
    """The content of absent frames, in features and in incoming gradients, changes nothing."""
    clean = make(case, torch.float32)
    dirty = clean.map(torch.clone)
    results = []
    for inputs, fill in ((clean, 0.0), (dirty, garbage)):
        values = call(function, case, (leaves := filled(case, inputs, fill).leaves()))
        incoming = cotangents([*values.values()])
        for gradient in incoming:
            for b, n in enumerate(case.lengths):
                gradient.select(-3, b)[..., n:, :] = fill
        gradients = backward(values, leaves, incoming)
        results.append([*values.values(), *gradients])
    assert all(tensor.isfinite().all() for tensor in results[1])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def filled(case: Case, inputs: Inputs, number: float) -> Inputs:
    """``number`` in all absent frames."""
    for b, n in enumerate(case.lengths or ()):
        for x in inputs.features:
            x[b, n:] = number
    return inputs


def check_bad_number(function: Function, case: Case, poison: float) -> None:
    """A bad number stays in its sample."""
    clean = make(case, torch.float32)
    dirty = clean.map(torch.clone)
    dirty.features[0][0, 2, 0] = poison
    expected, result = run(function, case, clean), run(function, case, dirty)
    theirs = run(partial(gated_rjca, backend="reference"), case, dirty)
    of_features = [f"d features[{m}]" for m in range(len(case.widths))]
    for name in (*result.values, *of_features):
        value, clean_value, same_places = (
            {**of.values, **of.gradients}[name].movedim(-3, 0) for of in (result, expected, theirs)
        )
        assert torch.equal(value[1], clean_value[1]), name
        if poison != poison:  # and it does not vanish there
            assert torch.equal(value.isnan(), same_places.isnan()), name


def check_large_float16(function: Function, case: Case) -> None:
    """Our float16 result is finite wherever PyTorch's is."""
    inputs = make(case, torch.float16)
    for x in inputs.features:
        x.copy_((x.double() / x.double().abs().max() * 1e4).half())
    ours, theirs = run(function, case, inputs), run(partial(gated_rjca, backend="reference"), case, inputs)
    for value, expected in ((ours.values, theirs.values), (ours.gradients, theirs.gradients)):
        for name, tensor in value.items():
            assert not (tensor.isnan() & ~expected[name].isnan()).any(), name
    for name, tensor in ours.values.items():
        assert (tensor.isfinite() | ~theirs.values[name].isfinite()).all(), name


def check_subsets_of_incoming_gradients(function: Function, case: Case) -> None:
    """Absent gradients count as zero."""
    inputs = make(case, torch.float32).leaves()
    values = call(function, case, inputs)
    incoming = dict(zip(values, cotangents([*values.values()]), strict=True))
    tensors = inputs.features + inputs.parameters
    for arriving in ("Y[0]", "X[1]", "G[1][0]"):
        ours = torch.autograd.grad(
            values[arriving], tensors, incoming[arriving], retain_graph=True, materialize_grads=True
        )
        zeros = [incoming[name] if name == arriving else torch.zeros_like(value) for name, value in values.items()]
        torch.testing.assert_close(list(ours), backward(values, inputs, zeros), rtol=0, atol=0)


def check_subsets_of_gradients(function: Function, case: Case) -> None:
    """A gradient that nobody wants is not computed, and changes nothing."""
    inputs = make(case, torch.float32)
    everything = list(run(function, case, inputs).gradients.values())
    count = len(inputs.features)
    for wanted in ([0], [*range(count)], [*range(count, len(everything))], [count], [len(everything) - 1]):
        index = iter(range(len(everything)))
        leaves = inputs.map(lambda x, i=index, w=wanted: x.clone().requires_grad_(next(i) in w))
        values = call(function, case, leaves)
        reached = [pair for pair in zip(values.values(), cotangents([*values.values()]), strict=True)]
        torch.autograd.backward(*zip(*(pair for pair in reached if pair[0].requires_grad), strict=True))
        for i, tensor in enumerate(leaves.features + leaves.parameters):
            assert (tensor.grad is not None) == (i in wanted), i
            assert tensor.grad is None or torch.equal(tensor.grad, everything[i]), i


def check_twice(function: Function, case: Case) -> None:
    """Backward twice gives the same, and inputs are not written to."""
    inputs = make(case, torch.float32)
    leaves = inputs.leaves()
    values = call(function, case, leaves)
    incoming = cotangents([*values.values()])
    torch.testing.assert_close(backward(values, leaves, incoming), backward(values, leaves, incoming), rtol=0, atol=0)
    kept = make(case, torch.float32)
    torch.testing.assert_close(leaves.features + leaves.parameters, kept.features + kept.parameters, rtol=0, atol=0)


class Guarded:
    """A tensor amid NaN: contiguous, or its columns ``step`` apart."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, step: int = 1) -> None:
        if step == 1:
            self.around = torch.full((math.prod(shape) + 32,), torch.nan, dtype=dtype)
            self.inside = self.around[16:-16].view(shape)
        else:
            *outer, columns = shape
            self.around = torch.full((*(n + 2 for n in outer), (columns + 2) * step), torch.nan, dtype=dtype)
            self.inside = self.around[(*(slice(1, -1) for _ in outer), slice(step, -step, step))]

    def check(self) -> None:
        assert not self.inside.isnan().any(), "not written"
        self.inside.fill_(torch.nan)
        assert self.around.isnan().all(), "written outside"


def check_all_is_written(
    forward: Callable[[Call], None],
    backward: Callable[[Call, Gradients], None],
    case: Case,
    dtype: torch.dtype,
    held: int = 0,
) -> None:
    """The backend writes every element it has to fill, and nothing beside or between.

    Where an element of what it keeps takes ``held`` bytes, it keeps all pieces, which the backward leaves as they are.
    """
    inputs, frames = make(case, dtype), (case.batch, case.length)
    ways = sum(described(case, inputs).problem.gate_ways)
    outputs = [Guarded((*frames, d_m), dtype, step=2) for d_m in case.widths]
    gates = [Guarded((*frames, ways), dtype, step=3) for _ in case.widths]
    iterates = Guarded((case.iterations, *frames, sum(case.widths)), dtype)
    d_features = [Guarded(x.shape, dtype, step=2) for x in inputs.features]
    d_parameters = [Guarded(parameter.shape, dtype) for parameter in inputs.parameters]
    of_outputs, of_gates, of_features, of_parameters = (
        [guarded.inside for guarded in several] for several in (outputs, gates, d_features, d_parameters)
    )
    called = described(case, inputs, outputs=of_outputs, iterates=iterates.inside, gates=of_gates)
    around = torch.zeros(0, dtype=torch.uint8)
    if held:
        problem = replace(called.problem, keep=keeping.all_pieces(called.problem))
        around = torch.zeros(keeping.kept_bytes(problem, held) + 2 * 4096, dtype=torch.uint8)
        called = called._replace(problem=problem, kept=around[4096:-4096].fill_(0xFF))
    incoming, none = [torch.randn(y.shape).to(dtype) for y in of_outputs], [None] * len(case.widths)
    forward(called)
    after = around.clone()
    backward(called, Gradients(incoming, none, none, of_features, of_parameters))
    for guarded in (*outputs, *gates, iterates, *d_features, *d_parameters):
        guarded.check()
    assert torch.equal(around, after), "what was kept is written to by the backward"
    assert not around[:4096].any() and not around[-4096:].any(), "what is kept is overrun"
