"""Tools of PyTorch"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pytest import fixture, mark, param
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from cases import BACKENDS
from family import D_A, D_V, L
from grjca_kernels import GatedRJCAFused
from grjca_kernels.problem import gate_ways

on_devices = mark.parametrize("device", ["cpu", param("cuda", marks=mark.gpu)])


def inputs(device: str = "cpu", requires_grad: bool = True) -> list[torch.Tensor]:
    return [torch.randn(3, L, d_m, device=device, requires_grad=requires_grad) for d_m in (D_V, D_A)]


def count(requires_grad: bool, frozen: str, **options) -> list[int]:
    """FLOPs of a forward and a backward."""
    module = GatedRJCAFused(D_V, D_A, L, dropout=0.0, **options)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not frozen or frozen not in name)
    counts = []
    with FlopCounterMode(display=False) as counter:
        y = module(*inputs(requires_grad=requires_grad))
    counts.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        sum(t.sum() for t in y).backward()
    return [*counts, counter.get_total_flops()]


OPTIONS = [
    {"gating": "none"},
    {"gating": "flat", "iterations": 3},
    {"gating": "hierarchical", "iterations": 3},
    {"gating": "dynamic", "share_weights": True, "iterations": 4},
    {"form": "paper"},
]


@mark.parametrize("frozen, requires_grad", [("", True), ("", False), ("key", True), ("gates", False)])
@mark.parametrize("options", OPTIONS, ids=str)
def test_flops(options, frozen, requires_grad):
    """`FlopCounterMode`: the products of the reference, and in the backward those that recompute besides"""
    forward, backward = count(requires_grad, frozen, backend="reference", **options)
    if "cpu" not in BACKENDS:
        assert count(requires_grad, frozen, **options) == [forward, backward]
        return
    ours = count(requires_grad, frozen, keep="least", **options)
    kept = sum(2 * 3 * L * (D_V + D_A) * d_m for d_m in (D_V, D_A)) * 2 if options.get("form") == "paper" else 0  # U
    assert ours == [forward, backward + forward - kept]
    ways = gate_ways(options.get("gating", "flat"), options.get("iterations", 2))
    gates = sum(2 * 3 * L * d_m * n for d_m in (D_V, D_A) for n in ways)  # which are computed anew in any case
    assert count(requires_grad, frozen, keep="most", **options) == [forward, backward + gates]


@on_devices
def test_profiler(device):
    """`torch.profiler` shows `grjca::forward` and `grjca::backward`, each once per call"""
    module, x = GatedRJCAFused(D_V, D_A, L, device=device), inputs(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    sum(y.sum() for y in module(*x)).backward()
    with profile(activities=activities) as profiler:
        sum(y.sum() for y in module(*x)).backward()
    shown = {event.key: event.count for event in profiler.key_averages() if event.key.startswith("grjca::")}
    assert shown == ({"grjca::forward": 1, "grjca::backward": 1} if device == "cuda" or "cpu" in BACKENDS else {})


@fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@on_devices
def test_deterministic(deterministic, device):
    """`torch.use_deterministic_algorithms(True)`: runs, and gives the same bits every time"""
    module, x = GatedRJCAFused(D_V, D_A, L, gating="hierarchical", device=device), inputs(device)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        y = module(*x)
        results.append([*y, *torch.autograd.grad(sum(t.square().sum() for t in y), [*x, *module.parameters()])])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_anomaly_mode():
    """`torch.autograd.detect_anomaly` finds the NaN, and is silent without one"""
    module = GatedRJCAFused(D_V, D_A, L, dropout=0.0)
    x = inputs()
    with torch.autograd.detect_anomaly():
        sum(y.sum() for y in module(*x)).backward()
        with torch.no_grad():
            x[0][0, 0, 0] = torch.nan
        with pytest.raises(RuntimeError, match="returned nan"):
            sum(y.sum() for y in module(*x)).backward()


def test_skeleton():
    """The meta device: shapes without memory, as `accelerate` and `FakeTensorMode` use it"""
    module = GatedRJCAFused(256, 128, 300, gating="hierarchical", output="concat", device="meta")
    y = module(torch.empty(12, 300, 256, device="meta"), torch.empty(12, 300, 128, device="meta"))
    assert y.shape == (12, 300, 384) and y.device.type == "meta"
    assert isinstance(module.to_empty(device="cpu"), nn.Module)


def test_threads():
    """Called from several threads at once, forward and backward: the same bits as alone"""
    module, x = GatedRJCAFused(D_V, D_A, L, gating="hierarchical", dropout=0.0), inputs()

    def call(_: int = 0) -> list[torch.Tensor]:
        y = module(*x)
        return [*y, *torch.autograd.grad(sum(t.square().sum() for t in y), [*x, *module.parameters()])]

    expected = call()
    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(call, range(64)):
            torch.testing.assert_close(results, expected, rtol=0, atol=0)


class Fused(torch.utils.data.Dataset):
    """Samples that are fused where they are loaded."""

    def __init__(self) -> None:
        self.module = GatedRJCAFused(D_V, D_A, L, output="concat").eval()
        self.x = [x.detach() for x in inputs()]

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> torch.Tensor:
        with torch.no_grad():
            return self.module(*(x[i : i + 1] for x in self.x))[0]


def test_data_loader():
    """In the worker processes of a `DataLoader`, forked after the block has run: the same bits"""
    data = Fused()
    with torch.no_grad():
        expected = data.module(*data.x)
    loaded = [*torch.utils.data.DataLoader(data, num_workers=2, timeout=60)]
    torch.testing.assert_close(torch.cat(loaded), expected, rtol=0, atol=0)
