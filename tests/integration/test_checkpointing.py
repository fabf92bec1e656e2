"""Activation checkpointing"""

import torch
from pytest import mark
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from family import D_A, D_V, L
from grjca_kernels import GatedRJCAFused


@mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    """`torch.utils.checkpoint`, both variants, with dropout: the same mask again, so the same gradients bit for bit"""
    block = GatedRJCAFused(D_V, D_A, L, gating="hierarchical", dropout=0.5)
    x = [torch.randn(2, L, d_m, requires_grad=True) for d_m in (D_V, D_A)]
    tensors = [*x, *block.parameters()]

    def gradients(call) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        for tensor in tensors:
            tensor.grad = None
        sum(y.square().sum() for y in call(*x)).backward()
        return tuple(tensor.grad for tensor in tensors)

    plain = gradients(block)
    again = gradients(lambda *x: checkpoint(block, *x, use_reentrant=use_reentrant))
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


class Pair(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = GatedRJCAFused(D_V, D_A, L, dropout=0.5)

    def forward(self, pair):
        return self.block(*pair)


@mark.parametrize("use_reentrant", [False, True])
def test_several_blocks(use_reentrant):
    """Several blocks under `checkpoint_sequential`, dropout included"""
    model = torch.nn.Sequential(*(Pair() for _ in range(4)))
    x = tuple(torch.randn(2, L, d_m, requires_grad=True) for d_m in (D_V, D_A))

    def gradients(call) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        sum(y.square().sum() for y in call(x)).backward()
        return [parameter.grad for parameter in model.parameters()]

    plain = gradients(model)
    if use_reentrant:  # which wants tensors as arguments

        def again(x):
            for pair in model:
                x = checkpoint(lambda v, a, pair=pair: pair((v, a)), *x, use_reentrant=True)
            return x
    else:

        def again(x):
            return checkpoint_sequential(model, 2, x, use_reentrant=False)

    torch.testing.assert_close(gradients(again), plain, rtol=0, atol=0)
