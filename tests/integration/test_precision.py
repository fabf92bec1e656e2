"""Mixed precision"""

import torch
from pytest import mark, param
from torch import nn

from family import D_A, D_V, L
from grjca_kernels import GatedRJCAFused
from hosts import TCNModel, batches

HALVES = [torch.float16, torch.bfloat16]
on_devices = mark.parametrize("device", ["cpu", param("cuda", marks=mark.gpu)])


def host(backend: str = "auto") -> nn.Module:
    torch.manual_seed(0)
    return TCNModel(GatedRJCAFused(D_V, D_A, L, normalize=True, output="concat", dropout=0.0, backend=backend))


@on_devices
@mark.parametrize("dtype", HALVES, ids=str)
def test_grad_scaler(dtype, device):
    """`torch.autocast` with `GradScaler`, float16 and bfloat16: a model trains, and as well as with the reference"""
    models = [host().to(device), host("reference").to(device)]
    losses = []
    for model in models:
        optimizer, scaler = torch.optim.Adam(model.parameters(), lr=0.02), torch.amp.GradScaler(device)
        losses.append([])
        for video, audio, target in [*batches(1, 16, torch.float32)] * 30:
            with torch.autocast(device, dtype):
                prediction = model(video.to(device), audio.to(device))
            loss = (prediction.float() - target.to(device)).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            assert nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()
            scaler.step(optimizer)
            scaler.update()
            losses[-1].append(loss.item())
    ours, expected = losses
    torch.testing.assert_close(ours[0], expected[0], rtol=0.01, atol=0)  # later ones drift: Adam takes signs for steps
    assert ours[-1] < min(0.7 * ours[0], 1.2 * expected[-1])
    assert all(parameter.dtype == torch.float32 for parameter in models[0].parameters())


@on_devices
@mark.parametrize("autocast", HALVES, ids=str)
@mark.parametrize("parameters", [torch.float32, *HALVES], ids=str)
@mark.parametrize("activations", [torch.float32, *HALVES], ids=str)
def test_mixed(activations, parameters, autocast, device):
    """float32 parameters with half activations under `torch.autocast`, and the reverse; gradients in both's dtypes"""
    block = GatedRJCAFused(D_V, D_A, L, dropout=0.0, dtype=parameters, device=device)
    x = [torch.randn(2, L, d_m, device=device).to(activations).requires_grad_() for d_m in (D_V, D_A)]
    with torch.autocast(device, autocast):
        y = block(*x)
    sum(t.float().sum() for t in y).backward()
    assert all(t.dtype == activations and t.isfinite().all() for t in y)
    assert all(t.grad.dtype == activations for t in x)
    assert all(p.grad.dtype == parameters and p.grad.isfinite().all() for p in block.parameters())


@on_devices
@mark.parametrize("normalize", [False, True])
@mark.parametrize("gating", ["flat", "hierarchical"])
def test_large(gating, normalize, device):
    """float16 activations up to 1e4, bare and under `torch.autocast`: no NaN or Inf where float32 rounded has none"""
    for autocast in (False, True):
        torch.manual_seed(0)
        block = GatedRJCAFused(D_V, D_A, L, gating=gating, normalize=normalize, dropout=0.0, device=device)
        x = [(torch.rand(4, L, d_m) * 2e4 - 1e4).half().to(device) for d_m in (D_V, D_A)]
        exact = block(*(t.float() for t in x))
        if not autocast:
            block.half()
        x = [t.requires_grad_() for t in x]
        with torch.autocast(device, torch.float16, enabled=autocast):
            y = block(*x)
        for ours, expected in zip(y, exact, strict=True):
            assert ours.dtype == torch.float16 and (ours.isfinite() | ~expected.half().isfinite()).all()
        (sum(t.float().mean() for t in y) / 1e3).backward()
        assert all(t.grad.isfinite().all() for t in (*x, *block.parameters()))
