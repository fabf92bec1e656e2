"""torch.compile"""

import shutil

import torch
from pytest import fixture, mark
from torch import nn
from torch._dynamo.utils import counters

from cases import Case, make
from family import D_A, D_V, L
from grjca_kernels import GatedRJCAFused, gated_rjca
from hosts import TCNModel, batches


@fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compilations() -> int:
    return counters["stats"]["unique_graphs"]


class Whole(nn.Module):
    """A model and its loss."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = TCNModel(GatedRJCAFused(D_V, D_A, L, normalize=True, output="concat", dropout=0.0, **options))

    def forward(self, video, audio, target):
        return (self.model(video, audio) - target).square().mean()


def step(module, compiled, batch) -> list[torch.Tensor]:
    module.zero_grad()
    loss = compiled(*batch)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in module.parameters())]


@mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="Inductor needs a C++ compiler")
def test_whole_model():
    """`fullgraph=True` with Inductor, a whole model: loss and gradients are those of eager mode"""
    module = Whole(gating="hierarchical")
    batch = next(batches(1, dtype=torch.float32))
    expected = step(module, module, batch)
    torch.testing.assert_close(step(module, torch.compile(module, fullgraph=True), batch), expected)


@mark.parametrize("dynamic, most", [(True, 1), (None, 2)])
@mark.sampled(1)
def test_batch_sizes_and_lengths(dynamic, most):
    """One compilation for all batch sizes and `lengths`, forward and backward, with `dynamic=True`; by default two"""
    module = GatedRJCAFused(D_V, D_A, L, gating="hierarchical", dropout=0.3)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 5, 3, 17, 8):
        x = [torch.randn(batch, L, d_m, requires_grad=True) for d_m in (D_V, D_A)]
        lengths = torch.randint(L + 1, (batch,))
        results = []
        for function in (module, compiled):
            torch.manual_seed(batch)
            y = function(*x, lengths)
            results.append([*y, *torch.autograd.grad(sum(t.square().sum() for t in y), [*x, *module.parameters()])])
        torch.testing.assert_close(*results, rtol=0, atol=0)
    assert compilations() == most


@mark.exhaustive
def test_all_sizes():
    """One compilation of the functional form for all B, L and widths"""

    def function(features, layers, gates):
        return gated_rjca(features, layers, gates, gating="flat", normalize=True, concat=True)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length, widths in ((2, 7, (5, 8)), (4, 9, (6, 11)), (6, 12, (8, 10))):
        inputs = make(Case("sizes", batch, length, widths), torch.float32).leaves()
        arguments = inputs.features, inputs.layers, inputs.gates
        results = []
        for call in (function, compiled):
            y = call(*arguments)
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs.features + inputs.parameters)])
        torch.testing.assert_close(*results, rtol=0, atol=0)
    assert compilations() == 1


@mark.uses("peft")
def test_changed_weights():
    """`fullgraph=True` with projections that are parametrized, or adapted by LoRA"""
    import peft

    module = GatedRJCAFused(D_V, D_A, L).eval()
    nn.utils.parametrizations.weight_norm(module.layers[0].query)
    config = peft.LoraConfig(r=2, target_modules=["value.visual"], init_lora_weights=False)
    model = peft.get_peft_model(module, config)
    x = torch.randn(2, L, D_V), torch.randn(2, L, D_A)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x), model(*x))


@mark.gpu
def test_graphed_callables():
    """`torch.cuda.make_graphed_callables` of the block: forward and backward replayed as CUDA graphs, on a GPU"""
    torch.manual_seed(0)
    block = GatedRJCAFused(D_V, D_A, L, normalize=True, dropout=0.0).cuda()
    inputs = [
        tuple(torch.randn(3, L, width, device="cuda", requires_grad=True) for width in (D_V, D_A)) for _ in range(3)
    ]
    expected = [gradients_of(block, x) for x in inputs]
    graphed = torch.cuda.make_graphed_callables(block, tuple(x.detach().requires_grad_() for x in inputs[0]))
    for x, values in zip(inputs, expected, strict=True):
        torch.testing.assert_close(gradients_of(graphed, x), values, rtol=0, atol=0)


def gradients_of(block: nn.Module, x: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Outputs, and gradients of inputs and parameters."""
    y = block(*x)
    gradients = torch.autograd.grad(y, [*x, *block.parameters()], [torch.ones_like(y_m) for y_m in y])
    return [tensor.detach().clone() for tensor in (*y, *gradients)]


@mark.gpu
@mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs(mode):
    """`mode="reduce-overhead"` and `"max-autotune"`, which capture CUDA graphs, on a GPU"""
    module = Whole(gating="flat").cuda()
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    for batch in batches(4, dtype=torch.float32):
        batch = tuple(x.cuda() for x in batch)
        expected = [x.clone() for x in step(module, module, batch)]
        torch.testing.assert_close(step(module, compiled, batch), expected, rtol=1e-3, atol=1e-4)
