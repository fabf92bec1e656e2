"""The eager block against the reference, and the model around the fusion block."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from pytest import mark
from safetensors.torch import load_file, save_file

from grjca.config import FUSIONS, GATING, ModelConfig
from grjca.errors import UserError
from grjca.model.audiovisual import AudioVisualModel, FrameNorm, TemporalConvNet
from grjca.model.eager import GatedRJCAEager
from grjca_kernels import GatedRJCAFused
from tolerances import check_close, check_draws, largest
from tolerances import length as norm

B, L, LENGTHS = 4, 9, (9, 4, 0, 1)
SMALL = ModelConfig(
    modalities={"visual": 7, "audio": 5}, channels={"visual": (8, 6, 6), "audio": (5, 4)}, kernel=3, hidden=6
)
NAN = float("nan")
BACKENDS = ("auto", "reference", "eager")


def features(batch=B, length=L, widths=(7, 5), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, length, width, generator=generator, dtype=torch.float64).to(dtype) for width in widths]


def absent(lengths=LENGTHS, length=L):
    return torch.arange(length) >= torch.tensor(lengths)[:, None]


def with_nan(x):
    return x.masked_fill(absent()[..., None], NAN)


def model(fusion="grjca", config=SMALL, *, dtype=torch.float64, backend="auto", length=L):
    """Make a model in which no scale, bias or running statistic is still 1 or 0."""
    torch.manual_seed(1)
    result = AudioVisualModel(config, fusion=fusion, length=length, backend=backend)
    with torch.no_grad():
        for name, tensor in result.state_dict().items():
            if "norm" in name and tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    if result.fusion is not None:
        with_biases(result.fusion)
    return result.to(dtype)


@torch.no_grad()
def with_biases(block):
    """Draw biases at random: they start at 0, which would hide errors."""
    for parameter in block.parameters():
        if parameter.dim() == 1:
            parameter.normal_(std=0.3)
    return block


def tensors_of(gates):
    return [x for of_one in gates for x in (of_one if isinstance(of_one, tuple) else (of_one,)) if x is not None]


# ---- the eager block


@mark.parametrize("dropout", [0.0, 0.6])
@mark.parametrize("lengths", [None, LENGTHS])
@mark.parametrize("gating", GATING.values())
def test_eager_is_the_reference(gating, lengths, dropout):
    """Eager and reference agree in outputs, gates, gradients, and the masks of one seed."""
    options = {"iterations": 3, "gating": gating, "normalize": True, "dropout": dropout, "dtype": torch.float64}
    eager = with_biases(GatedRJCAEager(6, 4, L, **options))
    fused = GatedRJCAFused(6, 4, L, backend="reference", **options)
    eager.shared_masks = True
    fused.load_state_dict(eager.state_dict())
    results = []
    for block in (eager, fused):
        x = [with_nan(x) if lengths else x for x in features(widths=(6, 4))]
        leaves = [x_m.requires_grad_() for x_m in x]
        torch.manual_seed(3)
        *outputs, extras = block(*leaves, lengths and torch.tensor(lengths), return_gates=True)
        tensors = [*outputs, *tensors_of(extras["gates"])]
        gradients = torch.autograd.grad(
            tensors,
            [*leaves, *block.parameters()],
            features(widths=[t.shape[-1] for t in tensors], seed=5),
            materialize_grads=True,
        )
        results.append(([x.detach() for x in tensors], gradients, torch.rand(())))
        if lengths:
            assert all((tensor[absent()] == 0).all() for tensor in (*tensors, *gradients[:2]))
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        check_close("value", ours, theirs)
    scale = max(largest(gradient) for gradient in results[1][1])
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        check_close("gradient", ours / scale, theirs / scale) if largest(theirs) else check_close("zero", ours, theirs)
    assert results[0][2] == results[1][2]  # the generator has moved as far


def test_eager_draws_its_own_masks_unless_told():
    x = features(widths=(6, 4))
    block = GatedRJCAEager(6, 4, L, dtype=torch.float64)
    fused = GatedRJCAFused(6, 4, L, dtype=torch.float64, backend="reference")
    fused.load_state_dict(block.state_dict())
    outputs = []
    for of in (block, fused):
        torch.manual_seed(3)
        outputs.append(of(*x)[0])
    assert not torch.allclose(*outputs)
    assert GatedRJCAEager.shared_masks is False


def test_eager_clears_zero_frames_in_float16():
    x = features(widths=(6, 4), dtype=torch.float16)
    block = with_biases(GatedRJCAEager(6, 4, L, dtype=torch.float16, normalize=True)).eval()
    assert all(y.isfinite().all() for y in block(*map(with_nan, x), torch.tensor(LENGTHS)))


def test_eager_refuses():
    x = features(widths=(6, 4), dtype=torch.float32)
    with pytest.raises(ValueError, match="no extras but the gates"):
        GatedRJCAEager(6, 4, L)(*x, return_iterates=True)
    with pytest.raises(ValueError, match="released form"):
        GatedRJCAEager(6, 4, L, form="paper")(*x)


# ---- parts


def test_encoder_is_causal():
    encoder = TemporalConvNet(3, (4, 4, 2), kernel=3).double().eval()
    (x,) = features(1, 60, (3,))
    changed = x.clone()
    changed[:, 20] += 1
    differs = (encoder(x) != encoder(changed)).any(-1)[0]
    reach = 2 * (3 - 1) * (1 + 2 + 4)  # two convolutions a block
    assert not differs[:20].any() and differs[20] and not differs[20 + reach + 1 :].any()
    assert differs[20 + reach]


def test_encoder_drops():
    encoder = TemporalConvNet(3, (4, 4, 2), dropout=0.5)
    (x,) = features(1, 9, (3,), torch.float32)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))
    net = model(config=replace(SMALL, encoder_dropout=0.25))
    dropouts = [module.p for module in net.encoders.modules() if isinstance(module, torch.nn.Dropout)]
    assert len(dropouts) == 5 and set(dropouts) == {0.25}


@torch.no_grad()
def test_norm_is_pytorchs():
    (x,) = features(3, 5, (4,))
    ours, theirs = FrameNorm(4).double(), torch.nn.BatchNorm1d(4).double()
    for _ in range(2):  # training, then evaluation
        check_close("norm", ours(x), theirs(x.mT).mT)
        for name, value in theirs.state_dict().items():
            check_close(name, ours.state_dict()[name].double(), value.double())
        ours.eval(), theirs.eval()


@mark.parametrize("training", [True, False])
def test_norm_of_some_frames(training):
    (x,) = features(widths=(3,))
    present = ~absent()
    ours, theirs = (FrameNorm(3).double().train(training) for _ in range(2))
    y = ours(with_nan(x).requires_grad_(), present)
    assert torch.equal(y[present], theirs(x[present][None])[0])
    assert (y[~present] == 0).all()
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())
    y.sum().backward()
    assert ours.weight.grad.isfinite().all()


@torch.no_grad()
@mark.parametrize("batch, lengths", [(1, None), (0, None), (3, (0, 0, 1)), (3, (0, 0, 0))])
def test_norm_without_a_variance(batch, lengths):
    (x,) = features(batch, 1, (3,))
    norm = FrameNorm(3).double()
    norm.running_mean += 0.5
    before = deepcopy(norm.state_dict())
    y = norm(x, None if lengths is None else ~absent(lengths, 1))
    present = slice(None) if lengths is None else ~absent(lengths, 1)
    check_close("norm", y[present], ((x - 0.5) / (1 + norm.eps) ** 0.5)[present])
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


# ---- the model


@mark.parametrize("backend", BACKENDS)
@mark.parametrize("fusion", FUSIONS)
def test_absent_frames_have_no_influence(fusion, backend):
    """Any content of absent frames gives the outputs, gates, gradients and running statistics of zeros."""
    results = []
    for fill in (0.0, NAN, 1e30):
        net = model(fusion, backend=backend)
        x = [x.masked_fill(absent()[..., None], fill).requires_grad_() for x in features()]
        torch.manual_seed(2)
        values, gates = net(*x, torch.tensor(LENGTHS), return_gates=True)
        values.square().sum().backward()
        gradients = [x_m.grad for x_m in x] + [p.grad for p in net.parameters() if p.grad is not None]
        results.append([values, *tensors_of(gates.values()), *gradients, *net.state_dict().values()])
        for x_m in (values, *tensors_of(gates.values()), *gradients[:2]):
            assert (x_m[absent()] == 0).all()
    for i, value in enumerate(results[0]):
        assert value.isfinite().all()
        assert all(torch.equal(value, other[i]) for other in results[1:])


@torch.no_grad()
@mark.parametrize("training", [False, True])
@mark.parametrize("fusion", FUSIONS)
def test_a_padded_sample_is_the_truncated_one(fusion, training):
    config, n = replace(SMALL, dropout=0.0, gate_dropout=0.0, encoder_dropout=0.0), 4
    net = model(fusion, config).train(training)
    short = AudioVisualModel(config, fusion=fusion, length=n).double().train(training)
    cut = {
        name: value[:n, :n] if name.endswith("weight") else value[:n]
        for name, value in net.state_dict().items()
        if ".key." in name
    }
    short.load_state_dict(net.state_dict() | cut)
    x = features(1)
    padded, gates = net(*x, torch.tensor([n]), return_gates=True)
    expected, expected_gates = short(*(x_m[:, :n] for x_m in x), return_gates=True)
    check_close("values", padded[:, :n], expected)
    for ours, theirs in zip(tensors_of(gates.values()), tensors_of(expected_gates.values()), strict=True):
        check_close("gates", ours[:, :n], theirs)
    for name, value in short.state_dict().items():
        if "running" in name:
            check_close(name, net.state_dict()[name], value)
    full = torch.full((1,), L)
    check_close("all present", net(*x, full), net(*x))


@mark.parametrize("fusion", FUSIONS)
def test_backends_train_alike(fusion):
    """Three steps from one seed, with dropout, end in the same weights."""
    ends = []
    for backend in BACKENDS:
        net = model(fusion, backend=backend)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        torch.manual_seed(4)
        for step in range(3):
            optimizer.zero_grad()
            net(*features(seed=step), torch.tensor(LENGTHS)).sum().backward()
            optimizer.step()
        ends.append(net.state_dict())
    for name, value in ends[0].items():
        for other in ends[1:]:
            check_close(name, other[name].double(), value.double(), 1e-9)


@mark.parametrize("fusion", FUSIONS)
def test_gates_are_named(fusion):
    net = model(fusion).eval()
    values, gates = net(*features(), return_gates=True)
    assert torch.equal(values, net(*features())) and values.shape == (B, L)
    ways = {"dca": (2,), "grjca": (3,), "hgrjca": (2, 3, 2), "tagf": (3,)}.get(fusion, ())
    assert list(gates) == ["visual", "audio"]
    for of_modality in gates.values():
        assert tuple(x.shape[-1] for x in tensors_of([of_modality])) == ways
        assert isinstance(of_modality, {"hgrjca": tuple}.get(fusion, torch.Tensor if ways else type(None)))


@mark.parametrize("fusion", FUSIONS)
@mark.parametrize("batch, length", [(1, 1), (1, L), (3, 1), (0, L)])
def test_small_batches_train(fusion, batch, length):
    net = model(fusion, length=length)
    values = net(*features(batch, length))
    assert values.shape == (batch, length) and values.isfinite().all()
    values.sum().backward()


@mark.parametrize("fusion", FUSIONS)
def test_copies(fusion, tmp_path):
    net = model(fusion, dtype=torch.float32)
    net(*features(dtype=torch.float32)).sum().backward()
    copy = deepcopy(net).eval()
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    loaded = AudioVisualModel(SMALL, fusion=fusion, length=L).eval()
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    expected = net.eval()(*features(dtype=torch.float32))
    assert torch.equal(copy(*features(dtype=torch.float32)), expected)
    assert torch.equal(loaded(*features(dtype=torch.float32)), expected)
    eager = AudioVisualModel(SMALL, fusion=fusion, length=L, backend="eager")
    assert eager.state_dict().keys() == net.state_dict().keys()


@mark.parametrize("fusion", FUSIONS)
def test_autocast(fusion):
    """In mixed precision, the error of values, as vectors, is no larger than that of plain PyTorch."""
    config = replace(SMALL, dropout=0.0, gate_dropout=0.0, encoder_dropout=0.0)
    x = features(dtype=torch.float32)
    results = {}
    for backend in BACKENDS:
        net = model(fusion, config, dtype=torch.float32, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            values = net(*map(with_nan, x), torch.tensor(LENGTHS))
        values.float().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
        results[backend] = values.detach()
    truth = model(fusion, config)(*(x_m.double() for x_m in x), torch.tensor(LENGTHS)).detach()
    for backend in ("auto", "reference"):
        check_draws(backend, results[backend], truth, [results["eager"]], norm)


def test_settings_reach_the_block():
    config = replace(SMALL, iterations=3, dropout=0.25, temperature=0.5)
    for fusion in ("rjca", "dca", "grjca", "hgrjca", "tagf"):
        block = AudioVisualModel(config, fusion=fusion, length=L, backend="reference").fusion
        assert (block.iterations, block.dropout, block.temperature) == (3, 0.25, 0.5)
        assert (block.dims, block.length, block.gating, block.backend) == ((6, 4), L, GATING[fusion], "reference")
        assert block.normalize == (fusion in ("grjca", "hgrjca", "tagf"))
        for normalize in (True, False):
            block = AudioVisualModel(replace(config, normalize=normalize), fusion=fusion, length=L).fusion
            assert block.normalize is normalize
        eager = AudioVisualModel(config, fusion=fusion, length=L, backend="eager").fusion
        assert type(eager) is GatedRJCAEager and eager.shared_masks


def test_the_authors_sizes():
    net = AudioVisualModel(ModelConfig(), fusion="grjca", length=300)
    assert net.head.hidden.weight.shape == (256, 384) and net.fusion.dims == (256, 128)
    assert [block.reach for block in net.encoders.visual.blocks] == [4, 8, 16, 32]
    assert [isinstance(block.downsample, torch.nn.Conv1d) for block in net.encoders.visual.blocks] == [0, 0, 1, 0]


# ---- what is refused


@mark.parametrize(
    "field, value",
    [
        ("channels", {"visual": (), "audio": (4,)}), ("channels", {"visual": (8,), "audio": (4, 0)}),
        ("channels", {"visual": 4, "audio": (4,)}), ("channels", {"smell": (4,)}), ("modalities", "visual:7"),
        ("modalities", {"visual": 7, "audio": -1}), ("modalities", {"visual": 7, "audio": 0}),
        ("modalities", "visual:7, Audio:5"), ("modalities", "visual:7, label:5"), ("modalities", "a:1, a:2"),
        ("modalities", "a:1, b:2, c:3, d:4, e:5"), ("modalities", "a:1:2, b:2"),
        ("kernel", 0), ("kernel", 2.5), ("encoder_dropout", 1.0), ("encoder_dropout", -0.1),
        ("dropout", 1), ("dropout", NAN), ("iterations", 0), ("iterations", 17), ("temperature", 0), ("hidden", 0),
        ("temperature", float("inf")), ("normalize", "yes"), ("hidden", True),
    ],
)  # fmt: skip
@mark.parametrize("fusion", ["concat", "grjca"])
def test_settings_that_make_no_sense(field, value, fusion):
    with pytest.raises(UserError, match=rf"^(--)?model\.{field}(\.\w+)?: expected .*[,;] got "):
        AudioVisualModel(replace(SMALL, **{field: value}), fusion=fusion, length=L)


def test_other_arguments_that_make_no_sense():
    with pytest.raises(UserError, match=r"fusion: expected one of concat, .*, got 'sum'"):
        AudioVisualModel(SMALL, fusion="sum", length=L)
    with pytest.raises(UserError, match="length: expected"):
        AudioVisualModel(SMALL, fusion="concat", length=0)
    with pytest.raises(ValueError, match="backend: expected"):
        AudioVisualModel(SMALL, fusion="grjca", length=L, backend="fast")


@mark.parametrize("fusion", ["concat", "grjca"])
@mark.parametrize(
    "change, error, match",
    [
        ({"visual": torch.zeros(4, L, 8)}, ValueError, r"visual: expected shape \[B, 9, 7\], got \[4, 9, 8\]"),
        ({"visual": torch.zeros(L, 7)}, ValueError, "visual"),
        ({"visual": torch.zeros(4, L + 1, 7)}, ValueError, "visual"),
        ({"audio": torch.zeros(4, L, 7)}, ValueError, "audio"),
        ({"audio": torch.zeros(1, L, 5)}, ValueError, r"audio: expected shape \[4, 9, 5\], got \[1, 9, 5\]"),
        ({"lengths": torch.tensor([1, 2, 3])}, ValueError, r"lengths: expected shape \[4\]"),
        ({"lengths": torch.tensor([1, 2, 3, L + 1])}, ValueError, "lengths: expected values from 0 to L = 9"),
        ({"lengths": torch.tensor([1, 2, 3, -1])}, ValueError, "lengths: expected values"),
        ({"lengths": torch.ones(4)}, TypeError, "lengths: expected an integer dtype"),
        ({"lengths": torch.ones(4).bool()}, TypeError, "lengths: expected an integer dtype"),
    ],
)
def test_inputs_that_do_not_fit(fusion, change, error, match):
    visual, audio = features(dtype=torch.float32)
    net = model(fusion, dtype=torch.float32)
    before = deepcopy(net.state_dict())
    with pytest.raises(error, match=match):
        net(*({"visual": visual, "audio": audio} | change).values())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
