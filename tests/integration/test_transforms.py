"""torch.func"""

import pytest
import torch
from pytest import mark
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap

from cases import BACKENDS
from family import D_A, D_V, L
from grjca_kernels import GatedRJCAFused

block = GatedRJCAFused(D_V, D_A, L, dtype=torch.float64).eval()
X = tuple(torch.randn(3, L, d_m, dtype=torch.float64) for d_m in (D_V, D_A))


def loss(parameters, visual, audio):
    return sum(y.square().sum() for y in functional_call(block, parameters, (visual, audio)))


def free() -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in block.named_parameters()}


@pytest.fixture
def by_reference(monkeypatch):
    """The way out that every refusal names."""
    monkeypatch.setattr(block, "backend", "reference")


def test_grad():
    """`grad`, `vjp` and `functional_call`: the gradients of autograd"""
    block.zero_grad()
    loss(dict(block.named_parameters()), *X).backward()
    expected = {name: parameter.grad for name, parameter in block.named_parameters()}
    torch.testing.assert_close(grad(loss)(free(), *X), expected, rtol=0, atol=0)
    value, back = vjp(lambda p: loss(p, *X), free())
    torch.testing.assert_close(back(torch.ones_like(value))[0], expected, rtol=0, atol=0)


def per_sample(visual, audio):
    return grad(loss)(free(), visual[None], audio[None])


REFUSED = {
    "vmap": ("no vmap", lambda: vmap(lambda v, a: block(v[None], a[None]))(*X)),
    "per-sample gradients": ("no vmap", lambda: vmap(per_sample)(*X)),
    "jacrev": ("no vmap", lambda: jacrev(lambda v: block(v, X[1])[0].sum((0, 1)))(X[0])),
    "jvp": ("no forward-mode derivative", lambda: jvp(lambda v: block(v, X[1]), X[:1], X[:1])),
    "hessian": ("no forward-mode derivative", lambda: hessian(lambda v: block(v, X[1])[0].sum())(X[0])),
    "double backward": ("no second derivative", lambda: grad(lambda v: grad(summed)(v).sum())(X[0])),
}


def summed(visual):
    return block(visual, X[1])[0].square().sum()


@mark.skipif("cpu" not in BACKENDS, reason="no kernels here")
@mark.parametrize("words, call", REFUSED.values(), ids=REFUSED)
def test_refused(words, call):
    """`vmap`, `jacrev`, `jvp`, `hessian`, double backward: refused with a sentence that names the way out"""
    with pytest.raises(RuntimeError, match=rf"gated_rjca: the kernels have {words}.*backend='reference'"):
        call()


@mark.parametrize("words, call", REFUSED.values(), ids=REFUSED)
def test_by_the_reference(words, call, by_reference):
    """The same with `backend="reference"`"""
    results = torch.utils._pytree.tree_leaves(call())
    assert results and all(result.isfinite().all() for result in results)


def test_per_sample_gradients(by_reference):
    """Per-sample gradients by `vmap(grad(...))`, with `backend="reference"`"""
    ours = vmap(per_sample)(*X)
    for b in range(len(X[0])):
        expected = grad(loss)(free(), *(x[b : b + 1] for x in X))
        torch.testing.assert_close({name: gradient[b] for name, gradient in ours.items()}, expected)


def test_ensemble(by_reference):
    """An ensemble by `stack_module_state` and `vmap`, with `backend="reference"`"""
    models = [GatedRJCAFused(D_V, D_A, L, dtype=torch.float64, backend="reference").eval() for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    outputs = vmap(lambda p, b: functional_call(models[0], (p, b), X))(parameters, buffers)
    for i, model in enumerate(models):
        torch.testing.assert_close(tuple(y[i] for y in outputs), model(*X))
