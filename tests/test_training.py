"""Loss, metric, synthetic data, and the demo at a size of seconds."""

import numpy
import pytest
import torch

from grjca import demo
from grjca.__main__ import main
from grjca.losses import CONVENTIONS, ccc_loss
from grjca.measure import Shape
from grjca.metrics import ccc
from grjca.synthetic import sequences
from grjca_kernels import GatedRJCAFused

# By hand: means 2 and 3, covariance sum 4, square sums 2 and 8. Over N = 3: 2 * 4/3 / (10/3 + 1) = 8/13;
# with the variances over N - 1: 2 * 4/3 / (10/2 + 1) = 4/9.
X, Y = [1.0, 2.0, 3.0], [1.0, 3.0, 5.0]
BY_HAND = {"population": 8 / 13, "released": 4 / 9}


def float64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_loss_by_hand(convention):
    loss = ccc_loss(float64(X, X), float64(Y, X), convention=convention)
    same = {"population": 1.0, "released": 2 * (2 / 3) / 2}[convention]
    assert float(loss) == pytest.approx(1 - (BY_HAND[convention] + same) / 2, abs=1e-15)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_masked_frames_have_no_influence(convention):
    nan = float("nan")
    prediction = float64([nan, 1, 2, 9, 3], [4, nan, 4, 4, 4]).requires_grad_()
    target = float64([-5, 1, 3, nan, 5], [-5, -5, -5, -5, -5])
    mask = torch.tensor([[0, 1, 1, 0, 1], [0] * 5]).bool()
    loss = ccc_loss(prediction, target, mask, convention=convention)
    loss.backward()
    assert loss.item() == pytest.approx(
        1 - BY_HAND[convention], abs=1e-15
    )  # the window without valid frames is left out
    assert (prediction.grad[~mask] == 0).all() and (prediction.grad[mask] != 0).any()
    assert ccc_loss(prediction, target, torch.zeros_like(mask)).item() == 0


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("length", [1, 2, 300])
def test_constant_input(convention, dtype, length):
    """0.1 is not a binary fraction, so the mean of many is not 0.1 and leaves a variance of rounding errors."""
    varied = torch.linspace(-1, 1, length, dtype=dtype)
    constant = torch.full((length,), 0.1, dtype=dtype)
    for prediction in (constant, constant + 0.5, torch.zeros_like(constant), varied):
        for target in (constant, torch.zeros_like(constant), varied):
            leaf = prediction.clone()[None].requires_grad_()
            loss = ccc_loss(leaf, target[None], convention=convention)
            loss.backward()
            assert loss.isfinite() and leaf.grad.isfinite().all()
            if prediction is not varied or target is not varied:
                assert loss.item() == pytest.approx(1, abs=1e-5)
            assert leaf.grad.abs().max() < 100


def test_loss_gradient():
    prediction, target = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prediction.requires_grad_()
    mask = torch.arange(7) < torch.tensor([7, 4, 0])[:, None]
    for convention in CONVENTIONS:
        assert torch.autograd.gradcheck(lambda x, c=convention: ccc_loss(x, target, mask, convention=c), prediction)


def test_loss_refuses():
    x = torch.zeros(2, 3)
    for call, error, match in (
        (lambda: ccc_loss(x, x[..., None]), ValueError, "target"),
        (lambda: ccc_loss(x, x, x[:1].bool()), ValueError, "mask"),
        (lambda: ccc_loss(x, x, x), TypeError, "mask"),
        (lambda: ccc_loss(x, x, convention="sample"), ValueError, "convention"),
        (lambda: ccc_loss(x[:, :0], x[:, :0]), ValueError, "L >= 1"),
        (lambda: ccc(x, x[0]), ValueError, "one shape"),
        (lambda: ccc([], []), ValueError, "at least one"),
    ):
        with pytest.raises(error, match=match):
            call()


def test_metric():
    assert ccc(X, Y) == pytest.approx(BY_HAND["population"], abs=1e-15)
    assert ccc(numpy.float32(X), torch.tensor(Y).requires_grad_()) == ccc(X, Y)
    assert ccc(X, X) == 1 and ccc(X, X[::-1]) == -1
    assert ccc([0.1] * 7, [0.1] * 7) == 0
    assert numpy.isnan(ccc([0.1, float("nan")], [0.1, 0.2]))


def test_metric_is_over_all_values_and_in_float64():
    x, y = torch.randn(2, 1000, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e4
    n, m = x.numpy().ravel(), y.numpy().ravel()
    expected = 2 * numpy.cov(n, m, ddof=0)[0, 1] / (n.var() + m.var() + (n.mean() - m.mean()) ** 2)
    assert ccc(x, y) == pytest.approx(expected, abs=1e-10)


def test_synthetic_is_deterministic():
    a, b, c = (sequences(3, 40, 6, 5, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(a, c, strict=True))
    assert [tuple(x.shape) for x in a] == [(3, 40, 6), (3, 40, 5), (3, 40, 2), (3, 40, 2)]
    assert a.part(1, 3).audio.shape == (2, 40, 5)


def test_synthetic_is_what_it_says():
    data = sequences(200, 300, 12, 8, seed=3, lags=(0, 6), noise=(0.1, 0.1), blind=(0.1, 0.3))
    assert (data.labels.abs() < 1).all() and data.labels.std() > 0.5
    assert (data.labels.diff(dim=1).abs().mean() < 0.1) and (data.labels[:, ::60].diff(dim=1).abs().mean() > 0.3)
    assert (1 - data.clear.float()).mean(dim=(0, 1)).tolist() == pytest.approx([0.1, 0.3], abs=0.03)

    def explained(features, m, lag):
        """Share of the emotion's variance that a linear map finds in the clear frames, ``lag`` frames later."""
        length = data.labels.shape[1] - lag
        clear = data.clear[:, lag:, m]
        x, y = features[:, lag:][clear], torch.atanh(data.labels[:, :length][clear])
        residual = y - x @ torch.linalg.lstsq(x, y).solution
        return 1 - float(residual.var() / y.var())

    assert explained(data.visual, 0, 0) > 0.9 and explained(data.audio, 1, 6) > 0.9
    assert explained(data.visual, 0, 6) < 0.8 and explained(data.audio, 1, 0) < 0.8
    blind = sequences(50, 100, 12, 8, blind=(1.0, 0.0))
    assert not blind.clear[..., 0].any() and blind.clear[..., 1].all()


TINY = demo.Settings(train=8, held_out=4, length=12, features=(5, 4), widths=(6, 4), hidden=8, batch=4, epochs=3)


def test_demo(capsys):
    shapes = {"tiny": Shape(7, 5, 3, 2, 2, "flat")}
    assert demo.demonstrate(TINY, shapes, 1) == 0
    printed = capsys.readouterr().out
    for words in ("valence", "arousal", "eager", "fused", "held-out", "tiny 2 x 7 x (5 + 3)", "train alike"):
        assert words in printed


def test_demo_notices_a_wrong_block(monkeypatch, capsys):
    class Wrong(GatedRJCAFused):
        def forward(self, visual, audio, *rest, **extras):
            return super().forward(visual, audio.detach(), *rest, **extras)

    wrong = demo.compare_training(TINY, 0, fused=Wrong)
    assert wrong.difference > wrong.tolerance
    monkeypatch.setattr(demo, "compare_training", lambda *_: wrong)
    assert demo.demonstrate(TINY, {}, 1) == 1
    assert "FAILED" in capsys.readouterr().out


def test_demo_notices_nan():
    broken = demo.Comparison(demo.Run([1.0], 0.0), demo.Run([float("nan")], 0.0), demo.Run([1.0], 0.0))
    assert not broken.difference <= broken.tolerance


def test_command_line(capsys):
    for words in (["--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(words)
    assert "--epochs" in capsys.readouterr().out
    for wrong in (["demo", "--epochs", "0"], ["demo", "--repetitions", "x"], []):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
    assert "expected a whole number above 0, got '0'" in capsys.readouterr().err
