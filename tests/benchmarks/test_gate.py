"""Timed blocks are correct, and so are the counts beside the times: memory, FLOP and tanh."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import IMPLEMENTATIONS, Problem, flop, plain, tanhs
from benchmarks.gate import check
from benchmarks.memory import peak_memory, run_in_subprocess
from grjca.measure import SHAPES, Shape, alternate, saved_bytes
from grjca.model.eager import GatedRJCAEager
from grjca_kernels import GatedRJCAFused, backends

SMALL = Shape(9, 6, 5, 2, 3, "flat", normalize=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "compiled"])
def test_it_lets_right_ones_pass(implementation, dtype):
    problem = Problem(SMALL, dtype)
    check(problem.call(implementation, training=False), problem, training=False)
    check(problem.call(implementation, training=True, dropout=0.0), problem, training=True)
    if implementation == "fused":
        check(problem.call("fused", training=True, dropout=0.6), problem, training=True, dropout=0.6)


class Slightly(torch.autograd.Function):
    """Multiplies the value, or the gradient, by nearly 1."""

    @staticmethod
    def forward(ctx, x, value, gradient):
        ctx.gradient = gradient
        return x * value

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.gradient, None, None


@pytest.mark.parametrize(("value", "gradient"), [(1.0001, 1.0), (1.0, 1.0001), (float("nan"), 1.0)])
def test_it_fails_wrong_ones(value, gradient):
    class Wrong(GatedRJCAFused):
        def forward(self, visual, audio):
            return Slightly.apply(super().forward(visual, audio), value, gradient)

    problem = Problem(SMALL)
    block = problem.block(Wrong, dropout=0.0)
    with pytest.raises(AssertionError, match="is allowed"):
        check(plain(block, problem.gradient), problem, training=True)
    if value != 1:
        with pytest.raises(AssertionError, match="output"):
            check(plain(block), problem, training=False)


def test_it_fails_other_masks():
    class Wrong(GatedRJCAFused):
        def forward(self, visual, audio):
            torch.rand(1)
            return super().forward(visual, audio)

    problem = Problem(SMALL)
    call = plain(problem.block(Wrong, dropout=0.6), problem.gradient)
    with pytest.raises(AssertionError, match="is allowed"):
        check(call, problem, training=True, dropout=0.6)


# ---- what is counted


def test_saved_bytes():
    x = torch.randn(10, 4, requires_grad=True)
    weight = torch.randn(4, 4, requires_grad=True)
    assert saved_bytes(lambda: x + 1) == 0
    assert saved_bytes(lambda: x.exp()) == 160  # its result
    assert saved_bytes(lambda: x.sin() + x.cos()) == 160  # x, once
    assert saved_bytes(lambda: x[:2].sin()) == 160  # a view keeps all of it alive
    assert saved_bytes(lambda: x @ weight) == 160 + 64
    assert saved_bytes(lambda: x @ weight.t(), [weight]) == 160
    with torch.no_grad():
        assert saved_bytes(lambda: x.exp()) == 0
    results = []
    saved_bytes(lambda: results.append(x.exp()))
    results[0].sum().backward()
    assert torch.equal(x.grad, x.exp()), "the backward is intact"


def test_alternate():
    order = []
    times = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert all(len(of_call) == 2 and min(of_call) >= 0 for of_call in times.values())


@pytest.mark.skipif(backends()["cpu"] is not None, reason="the promise is that of the kernels")
@pytest.mark.parametrize(("name", "ratio"), [("abaw", 6), ("clip", 20)])
def test_memory_that_is_promised(name, ratio):
    """The share of the activations at least; every one of them grows with B, so a small B will do."""
    shape, saved = replace(SHAPES[name], batch=2), {}
    inputs = shape.inputs(0, requires_grad=True)
    for kind, options in ((GatedRJCAEager, {}), (GatedRJCAFused, {"keep": "least"})):
        block = shape.block(kind, **options)
        saved[kind] = saved_bytes(lambda block=block: block(*inputs), block.parameters())
    assert saved[GatedRJCAFused] * ratio <= saved[GatedRJCAEager]
    frames = shape.batch * shape.length * (shape.dim_visual + shape.dim_audio) * 4
    assert saved[GatedRJCAFused] <= (1 + shape.iterations) * frames + 8  # X^0 to X^T and the seed of the masks


def test_peak_memory():
    """Eager holds C of both modalities, [B, d_m, d] each, and the tanh of them."""
    shape = Shape(16, 128, 128, 2, 64)
    scores = 2 * 64 * 128 * 256 * 4
    peak = run_in_subprocess(peak_memory, shape, "eager", True)
    assert peak is None or scores < peak < 40 * scores


@pytest.mark.parametrize("gating", ["none", "dynamic", "flat", "hierarchical"])
def test_counts_are_those_of_pytorch(gating, monkeypatch):
    shape, counted = replace(SMALL, gating=gating, iterations=3), []
    tanh = torch.tanh
    monkeypatch.setattr(torch, "tanh", lambda x: (counted.append(x.numel()), tanh(x))[1])
    block = shape.block(GatedRJCAFused, backend="reference")
    with torch.no_grad(), FlopCounterMode(display=False) as mode:
        block.eval()(*shape.inputs(0))
    assert flop(shape) == mode.get_total_flops() and tanhs(shape) == sum(counted)
