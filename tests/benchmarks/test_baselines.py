"""The strong baseline computes what the others do; otherwise it would be a strawman of another kind."""

from dataclasses import replace

import pytest
import torch

from benchmarks import baselines, gate
from benchmarks.baselines import GatedRJCAStrong
from benchmarks.cases import Problem, plain
from grjca.measure import Shape, saved_bytes
from grjca.model.eager import GatedRJCAEager
from grjca_kernels import GatedRJCAFused
from tolerances import check_close

SMALL = Shape(9, 6, 5, 2, 3, "flat", normalize=True)
ODD = {"one frame": Shape(1, 3, 7, 2, 5), "one of all": Shape(1, 1, 1, 2, 1), "wide": Shape(5, 33, 17, 2, 7)}
GATINGS = ("none", "dynamic", "flat", "hierarchical")


def check_equal(shape, kind=GatedRJCAStrong):
    """Compare values and gradients with the reference in float64, where a mistake cannot hide behind rounding."""
    problem = Problem(shape, torch.float64)
    results = []
    for of, options in ((kind, {}), (GatedRJCAFused, {"backend": "reference"})):
        block = problem.block(of, dropout=0.0, **options)
        results.append(plain(block, problem.gradient)(problem.inputs[0]))
    ours, truth = results
    check_close("output", ours[0], truth[0])
    kinds = gate.kinds_of(problem)
    for name in dict.fromkeys(kinds):
        check_close(f"d {name}", *(gate.joined(values[1:], kinds, name) for values in results))


@pytest.mark.parametrize("kind", [GatedRJCAStrong, GatedRJCAEager])
@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("iterations", [1, 3])
def test_it_is_the_reference(gating, normalize, iterations, kind):
    check_equal(replace(SMALL, gating=gating, normalize=normalize, iterations=iterations), kind)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("gating", ["none", "hierarchical"])
def test_odd_shapes(name, gating):
    check_equal(replace(ODD[name], gating=gating))


@pytest.mark.parametrize("samples", [1, 2])
def test_chunks_of_a_batch(samples, monkeypatch):
    monkeypatch.setattr(baselines, "CHUNK", samples * 6 * 11 * 8)
    check_equal(SMALL)


def test_shared_weights_and_a_pair():
    torch.manual_seed(0)
    shared = {"share_weights": True, "gating": "flat", "iterations": 3, "dtype": torch.float64}
    ours, truth = GatedRJCAStrong(6, 5, 9, **shared), GatedRJCAFused(6, 5, 9, backend="reference", **shared)
    truth.load_state_dict(ours.state_dict())
    x = torch.randn(2, 9, 6, dtype=torch.float64), torch.randn(2, 9, 5, dtype=torch.float64)
    with torch.no_grad():
        for name, y, expected in zip(("visual", "audio"), ours.eval()(*x), truth.eval()(*x), strict=True):
            check_close(name, y, expected)


def test_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    block = SMALL.block(GatedRJCAStrong, dropout=0.6)
    kept = block._mask(torch.empty(3, 1001, 333)).double().mean()
    assert abs(float(kept) - 0.4) < 0.003  # six standard deviations of 10^6 draws
    problem = Problem(replace(SMALL, gating="none", normalize=False, iterations=1))
    with torch.no_grad():
        means = []
        for kind in (GatedRJCAStrong, GatedRJCAEager):
            block = problem.block(kind, dropout=0.6).train()
            draws = torch.stack([block(*problem.inputs[0]) for _ in range(1500)]).double()
            means.append((draws.mean(0), draws.std(0) / len(draws) ** 0.5))
    (ours, error), (theirs, other) = means
    assert ((ours - theirs).abs() <= 6 * (error.square() + other.square()).sqrt() + 1e-6).all()


def test_gradients_under_a_mask_are_those_of_the_mask():
    """Dropout has no reference here: the same draws, and a difference quotient in float64."""
    problem = Problem(replace(SMALL, gating="flat", normalize=False), torch.float64)
    block, x = problem.block(GatedRJCAStrong, dropout=0.6).train(), problem.inputs[0]

    def drawn(*features):
        torch.manual_seed(1)
        return block(*features)

    direction = [torch.randn_like(value) for value in x]
    gradients = torch.autograd.grad(drawn(*x), x, problem.gradient)
    step = 1e-6
    ahead, behind = (
        drawn(*(value + sign * step * way for value, way in zip(x, direction, strict=True))) for sign in (1, -1)
    )
    slope = ((ahead - behind) * problem.gradient).sum() / (2 * step)
    along = sum((gradient * way).sum() for gradient, way in zip(gradients, direction, strict=True))
    torch.testing.assert_close(along, slope, rtol=1e-5, atol=1e-5)


def test_it_saves_less_than_eager():
    problem, saved = Problem(SMALL), {}
    for kind in (GatedRJCAStrong, GatedRJCAEager):
        block = problem.block(kind, dropout=0.6).train()
        saved[kind] = saved_bytes(lambda block=block: block(*problem.inputs[0]), block.parameters())
    assert saved[GatedRJCAStrong] < saved[GatedRJCAEager]


@pytest.mark.parametrize("options", [{"lengths": torch.tensor([9, 4, 1])}, {"return_gates": True}])
def test_what_it_refuses(options):
    problem = Problem(SMALL)
    with pytest.raises(ValueError, match="take GatedRJCAEager"):
        problem.block(GatedRJCAStrong)(*problem.inputs[0], **options)


def test_it_refuses_the_paper_form():
    block = GatedRJCAStrong(6, 5, 9, form="paper")
    with pytest.raises(ValueError, match="released form"):
        block(torch.randn(1, 9, 6), torch.randn(1, 9, 5))
