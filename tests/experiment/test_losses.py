"""Loss and metrics, against closed forms, NumPy, SciPy and audmetric."""

import math

import audmetric
import numpy
import pytest
import scipy.stats
import torch

from grjca.data.videos import Video
from grjca.errors import UserError
from grjca.training.losses import CONVENTIONS, ccc_loss
from grjca.training.metrics import Scores, ccc, pearson, rmse, split_scores

# By hand: means 2 and 3, covariance sum 4, square sums 2 and 8. Over N = 3: 2 * 4/3 / (10/3 + 1) = 8/13;
# with the variances over N - 1: 2 * 4/3 / (10/2 + 1) = 4/9.
X, Y = [1.0, 2.0, 3.0], [1.0, 3.0, 5.0]
BY_HAND = {"population": 8 / 13, "released": 4 / 9}


def float64(*rows):
    return torch.stack([torch.as_tensor(row, dtype=torch.float64) for row in rows])


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


def draws(seed, size=500):
    """Draw a target and a correlated prediction, neither centred nor of variance 1."""
    generator = numpy.random.default_rng(seed)
    target = numpy.tanh(generator.normal(0.3, 0.8, size))
    return 0.6 * target + 0.2 * generator.normal(size=size) - 0.1, target


@pytest.mark.parametrize("seed", range(5))
def test_audmetric_agrees(seed):
    prediction, target = draws(seed)
    expected = audmetric.concordance_cc(target, prediction)
    assert ccc(prediction, target) == pytest.approx(expected, abs=1e-10)
    assert 1 - float(ccc_loss(float64(prediction), float64(target))) == pytest.approx(expected, abs=1e-10)
    assert pearson(prediction, target) == pytest.approx(audmetric.pearson_cc(target, prediction), abs=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_loss_is_the_mean_over_windows_of_valid_frames(seed):
    pairs = [draws(seed + i, 60) for i in range(4)]
    prediction, target = (float64(*side) for side in zip(*pairs, strict=True))
    mask = torch.rand(4, 60, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[2] = False
    expected = [
        1 - audmetric.concordance_cc(target[i][mask[i]].numpy(), prediction[i][mask[i]].numpy()) for i in (0, 1, 3)
    ]
    assert float(ccc_loss(prediction, target, mask)) == pytest.approx(numpy.mean(expected), abs=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_rmse_and_pearson(seed):
    prediction, target = draws(seed)
    assert rmse(prediction, target) == pytest.approx(numpy.sqrt(((prediction - target) ** 2).mean()), abs=1e-12)
    assert pearson(prediction, target) == pytest.approx(scipy.stats.pearsonr(prediction, target)[0], abs=1e-12)


def test_pearson_of_a_constant_is_undefined():
    assert math.isnan(pearson([0.1] * 7, X[:1] * 7)) and math.isnan(pearson([0.1] * 3, X))
    assert Scores.of(numpy.full(3, 0.1), numpy.array(X)).as_json()["pearson"] is None


def video(name, labels):
    labels = numpy.array(labels)
    valid = (numpy.abs(labels) <= 1).all(axis=1)
    return Video(name, len(labels), labels, valid, (), {}, {})


def test_split_scores_count_valid_frames_of_all_videos():
    videos = [
        video("a", [[0.1, 0], [0.5, 0], [-5, -5], [0.2, -5]]),
        video("b", [[-5, -5]]),
        video("c", [[0.9, 0], [0.3, 0]]),
    ]
    predictions = [numpy.array([0.2, 0.4, 9, 9]), numpy.array([9.0]), numpy.array([0.8, 0.5])]
    scores = split_scores(predictions, videos, "valence")
    x, y = [0.2, 0.4, 0.8, 0.5], [0.1, 0.5, 0.9, 0.3]
    assert scores.together == Scores.of(numpy.array(x), numpy.array(y)) and scores.together.frames == 4
    assert scores.together.ccc == pytest.approx(audmetric.concordance_cc(y, x), abs=1e-10)
    assert set(scores.videos) == {"a", "c"} and scores.videos["a"].frames == 2
    with pytest.raises(UserError, match="at least one frame"):
        split_scores(predictions[1:2], videos[1:2], "valence")
