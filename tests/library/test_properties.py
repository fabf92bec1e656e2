"""Random problems against the reference.

``python tests/library/test_properties.py COUNT SEED`` compares that many in float64, and prints what differs in JSON.
"""

import json
import sys
from functools import partial

import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as some
from pytest import mark

from cases import BACKENDS, Case, Inputs, call, cotangents, make, run
from grjca_kernels import cpu, gated_rjca
from grjca_kernels import problem as problems
from tolerances import check_float64, check_rule, exact

pytestmark = mark.skipif("cpu" not in BACKENDS, reason=str(cpu.why_not()))
native = partial(gated_rjca, backend="cpu")
examples = partial(settings, deadline=None, print_blob=True)


@some.composite
def any_case(draw) -> Case:
    batch, length = draw(some.integers(0, 4)), draw(some.integers(1, 20))
    lengths = draw(some.none() | some.lists(some.integers(0, length), min_size=batch, max_size=batch).map(tuple))
    widths = draw(some.lists(some.integers(1, 20) | some.integers(30, 36), min_size=2, max_size=4).map(tuple))
    return Case(
        "random",
        batch,
        length,
        widths,
        draw(some.integers(1, 4)),
        draw(some.sampled_from(problems.GATINGS)),
        draw(some.sampled_from(problems.FORMS)),
        joint=draw(some.sampled_from(problems.JOINTS)),
        normalize=draw(some.booleans())
        and min(widths) > 1,  # the norm of one number has no gradient but rounding errors
        dropout=draw(some.sampled_from([0.0, 0.0, 0.1, 0.5])),
        temperature=draw(some.sampled_from([0.1, 1.0])),
        lengths=lengths,
        shared=draw(some.booleans()),
    )


instruction_sets = some.sampled_from([name for name in cpu.instruction_sets() if name != "avx512bf16"] or ["none"])


@examples(max_examples=150, derandomize=True)  # where a gate is saturated, its gradient can be all rounding error
@given(any_case(), instruction_sets)
def test_float64(case, instruction_set):
    with cpu.instruction_set(instruction_set):
        check_float64(run(native, case, make(case)), exact.__wrapped__(case, torch.float64))


@examples(max_examples=60, derandomize=True)  # the rule compares random errors: in a thousand draws one may exceed it
@given(any_case(), instruction_sets)
def test_float32(case, instruction_set):
    with cpu.instruction_set(instruction_set):
        check_rule(run(native, case, make(case, torch.float32)), case, torch.float32)


@some.composite
def layouts(draw, dimensions: int):
    """Another arrangement of the same numbers: order of the dimensions in memory, gaps between elements, an offset."""
    order = draw(some.permutations(range(dimensions)))
    gaps = draw(some.lists(some.integers(1, 3), min_size=dimensions, max_size=dimensions))
    return order, gaps, draw(some.integers(0, 3))


def arrange(x: torch.Tensor, layout) -> torch.Tensor:
    order, gaps, offset = layout
    order, gaps = [i for i in order if i < x.dim()], gaps[: x.dim()]
    strides, step = [0] * x.dim(), 1
    for i in order:
        strides[i] = step * gaps[i]
        step = strides[i] * max(x.shape[i], 1)
    memory = torch.full((offset + step,), torch.nan, dtype=x.dtype)
    return memory.as_strided(x.shape, strides, offset).copy_(x)


@examples(max_examples=100)
@given(any_case(), some.lists(layouts(4), min_size=4, max_size=4), some.lists(layouts(4), min_size=4, max_size=4))
def test_strides(case, of_features, of_gradients):
    """Inputs and incoming gradients that lie anyhow in memory give the same bits."""
    inputs = make(case)
    bits = []
    for arranged in (False, True):
        features = [arrange(x, of_features[m]) if arranged else x for m, x in enumerate(inputs.features)]
        leaves = Inputs([x.requires_grad_() for x in features], *astuple(inputs)[1:])
        values = list(call(native, case, leaves).values())
        incoming = cotangents(values)
        if arranged:
            incoming = [arrange(gradient, of_gradients[i % 4]) for i, gradient in enumerate(incoming)]
        bits.append([*values, *torch.autograd.grad(values, leaves.features, incoming)])
    torch.testing.assert_close(*bits, rtol=0, atol=0)


def astuple(inputs: Inputs) -> tuple:
    return inputs.features, inputs.layers, inputs.gates, inputs.lengths


def compare(count: int, number: int) -> int:
    """1 if one of ``count`` problems is wrong; it does not keep the others from being compared."""
    done, faults = 0, []

    @seed(number)
    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate])
    @given(any_case(), instruction_sets)
    def each(case, instruction_set):
        nonlocal done
        done += 1
        try:
            test_float64.hypothesis.inner_test(case, instruction_set)
        except AssertionError as error:
            faults.append(f"{case!r}, {instruction_set}: {str(error)[:300]}")

    torch.set_num_threads(1)
    each()
    print(json.dumps({"cases": done, "seed": number, "faults": faults}))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(compare(int(sys.argv[1]), int(sys.argv[2])))
