"""Models you have"""

import copy
import io
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from pytest import mark
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from family import D_A, D_V, L
from grjca_kernels import GatedRJCAFused, Layer, Linear, gated_rjca, ops, reference
from grjca_kernels.backends import choose
from hosts import HOSTS, batches, build, train

pytestmark = mark.filterwarnings("ignore:from_released ignored")  # the names of what has no effect
adam = partial(torch.optim.Adam, lr=0.01)
every_host = mark.parametrize("host", HOSTS)
block = partial(GatedRJCAFused, D_V, D_A, L, dropout=0.0, dtype=torch.float64)


def inputs(batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(batch, L, d_m, generator=generator, dtype=torch.float64).to(dtype) for d_m in (D_V, D_A))


def by_reference(module: GatedRJCAFused, *x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    layers, gates = module.parameters_by_role()
    return reference.gated_rjca(x, layers, gates, gating=module.gating, normalize=module.normalize)


def assert_close(ours, expected) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


# ---- exchanged in a larger model


@every_host
def test_swapped_by_one_assignment_and_trained_on(host):
    """The block exchanged by one assignment in the middle of a training, with the optimiser and its state"""
    models = [build(host), build(host)]
    optimizers = [adam(model.parameters(), weight_decay=1e-3) for model in models]
    data = list(batches(8))
    before = [train(*pair, data[:4]) for pair in zip(models, optimizers, strict=True)]
    models[1].fusion = GatedRJCAFused.from_released(models[1].fusion, keep_parameters=True, dropout=0.0)
    after = [train(*pair, data[4:]) for pair in zip(models, optimizers, strict=True)]
    assert before[0] == before[1]
    assert_close(torch.tensor(after[1]), torch.tensor(after[0]))
    theirs, ours = (list(optimizer.state.values()) for optimizer in optimizers)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a["exp_avg_sq"], b["exp_avg_sq"])


@every_host
def test_resumed_from_a_checkpoint(host):
    """Training resumed from a checkpoint of weights and optimiser that was saved with the authors' block"""
    model = build(host)
    optimizer = adam(model.parameters())
    data = list(batches(6))
    train(model, optimizer, data[:3])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(model, optimizer, data[3:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = build(host)
    optimizer = adam(resumed.parameters())
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    resumed.fusion = GatedRJCAFused.from_released(resumed.fusion, keep_parameters=True, dropout=0.0)
    assert_close(torch.tensor(train(resumed, optimizer, data[3:])), torch.tensor(expected))


@every_host
def test_load_state_dict_of_the_authors(host):
    """`load_state_dict(strict=True)` of a checkpoint of the authors' whole model into one that has the fused block"""
    theirs, ours = build(host).eval(), build(host).eval()
    ours.fusion = GatedRJCAFused.from_released(ours.fusion).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.25)
    assert ours.load_state_dict(theirs.state_dict(), strict=True) == ([], [])
    video, audio, _ = next(batches(1))
    assert_close(ours(video, audio), theirs(video, audio))
    broken = theirs.state_dict()
    del broken["fusion.coattn.dcn_layers.1.linears.0.0.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.1\.output\.visual\.bias"):
        ours.load_state_dict(broken)


# ---- copied and kept


def through_safetensors(model: nn.Module, tmp_path) -> nn.Module:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(model, tmp_path / "model.safetensors")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert safetensors.load_model(other, tmp_path / "model.safetensors") == (set(), [])
    return other


KEPT = {
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "safetensors": through_safetensors,
    "AveragedModel": lambda model, _: torch.optim.swa_utils.AveragedModel(model).module,
}


@mark.uses("safetensors")
@mark.parametrize("keep", KEPT.values(), ids=KEPT)
def test_copied_and_kept(keep, tmp_path):
    """`deepcopy`, `pickle`, safetensors, `AveragedModel`: the same outputs, and no memory shared"""
    model = build("BiLSTM, DCA").eval()  # weight_norm of the other hosts cannot be pickled
    model.fusion = GatedRJCAFused.from_released(model.fusion).eval()
    video, audio, _ = next(batches(1))
    expected = model(video, audio)
    other = keep(model, tmp_path).eval()
    assert torch.equal(other(video, audio), expected)
    with torch.no_grad():
        other.fusion.layers[0].query.weight.add_(1)
    assert torch.equal(model(video, audio), expected)


@mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_moved(dtype):
    """`half()`, `bfloat16()`, `double()`, `to()`, `to_empty()`: parameters, outputs and gradients in that dtype"""
    module = GatedRJCAFused(D_V, D_A, L, device="meta").to_empty(device="cpu")
    module.reset_parameters()
    module = {torch.float16: module.half, torch.float64: module.double}.get(dtype, lambda: module.to(dtype))()
    x = [tensor.requires_grad_() for tensor in inputs(dtype=dtype)]
    outputs = module(*x)
    sum(y.float().sum() for y in outputs).backward()
    assert {tensor.dtype for tensor in (*outputs, *x, *module.parameters())} == {dtype}
    assert all(tensor.grad.dtype == dtype and tensor.grad.isfinite().all() for tensor in (*x, *module.parameters()))


# ---- subsets, ties and hooks


@mark.parametrize("frozen", ["layers", "layers.0", "gates", "query", "bias", "visual", "all"])
def test_frozen(frozen, monkeypatch):
    """`requires_grad_(False)` on any subset: no gradient is computed for it, and the others stay the same"""
    module = block(gating="hierarchical")
    sum(y.square().sum() for y in module(*inputs())).backward()
    expected = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    free = []
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(frozen != "all" and frozen not in name)
        free += [name] * parameter.requires_grad
    outputs = module(*inputs())
    assert all(y.requires_grad == bool(free) for y in outputs)
    computed = count_gradients(monkeypatch)
    if free:
        sum(y.square().sum() for y in outputs).backward()
    assert computed == ([len(free)] if free else [])
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == (name in free), name
        assert parameter.grad is None or torch.equal(parameter.grad, expected[name]), name


def count_gradients(monkeypatch) -> list[int]:
    """Of every backward that runs from now on, how many gradients it is asked for."""
    counts: list[int] = []
    row = ops.TABLE[choose("auto", torch.zeros(0))]
    if row.backward is None:
        pytest.skip("the reference leaves this to autograd")

    def counting(call, gradients):
        counts.append(sum(gradient is not None for gradient in (*gradients.features, *gradients.parameters)))
        row.backward(call, gradients)

    monkeypatch.setitem(ops.TABLE, row.name, replace(row, backward=counting))
    return counts


def test_shared_and_tied():
    """Submodules shared between blocks and weights tied within one: gradients add up, as in plain PyTorch"""

    def gradients(call) -> list[torch.Tensor]:
        torch.manual_seed(0)
        first, second = block(), block()
        second.layers[0] = first.layers[1]
        first.gates["visual"][0] = second.gates["visual"][0]
        second.layers[1].key["audio"].weight = second.layers[1].key["visual"].weight
        x = inputs()
        sum(y.square().sum() for y in call(second, *call(first, *x))).backward()
        parameters = list(nn.ModuleList([first, second]).parameters())
        assert len(parameters) == len({id(parameter) for parameter in parameters})
        return [parameter.grad for parameter in parameters]

    assert_close(gradients(lambda module, *x: module(*x)), gradients(by_reference))


def test_hooks():
    """Hooks on the module, before and after its forward and backward, and on its parameters and outputs"""
    module, seen = block(), []
    x = [tensor.requires_grad_() for tensor in inputs()]
    weight = module.layers[0].query.weight
    expected = by_reference(module, *x)
    (gradient,) = torch.autograd.grad(expected[0].sum() + expected[1].sum(), weight)
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda _, x, y: (y[0] * 2, y[1]))
    module.register_full_backward_hook(lambda _, into, out: seen.append(len(into)))
    weight.register_hook(lambda gradient: gradient * 10)
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    y = module(*x)
    y[0].register_hook(lambda gradient: gradient * 0.5)
    (y[0].sum() + y[1].sum()).backward()
    assert_close(y, (2 * expected[0], expected[1]))
    assert seen[0] == "before" and seen[-1] == 2
    assert_close(seen[1], 10 * gradient)


# ---- weights that are made of others


def check_weights(module: GatedRJCAFused, expected_weight, trainable: int) -> None:
    """Outputs and gradients are those of plain PyTorch with ``expected_weight()`` as W_q of the first iteration."""
    module.zero_grad()
    sum(y.square().sum() for y in module(*inputs())).backward()
    ours = {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.requires_grad}
    module.zero_grad()
    layers, gates = module.parameters_by_role()
    query = layers[0].query._replace(weight=expected_weight())
    y = reference.gated_rjca(inputs(), [layers[0]._replace(query=query), *layers[1:]], gates)
    assert_close(module(*inputs()), y)
    sum(tensor.square().sum() for tensor in y).backward()
    query_gradients = [name for name in ours if ("layers.0.query" in name and "weight" in name) or "lora" in name]
    assert len(query_gradients) == trainable
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert_close(ours[name], parameter.grad)


PARAMETRIZATIONS = {
    "weight_norm": (parametrizations.weight_norm, 2),
    "orthogonal": (parametrizations.orthogonal, 1),
    "spectral_norm": (parametrizations.spectral_norm, 1),
}


@mark.parametrize("register, weights", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
def test_parametrized(register, weights):
    """`torch.nn.utils.parametrize`: weight, spectral and orthogonal norm of projections are seen, and trained"""
    module = block().eval()
    projection = register(module.layers[0].query)
    check_weights(module, lambda: projection.weight, weights)
    before = projection.weight.detach().clone()
    assert_close(module.to_released()["coattn.dcn_layers.0.dense_coattn.query_linear.weight"], before)
    with torch.no_grad():
        next(iter(projection.parametrizations.weight.parameters())).add_(0.5)
    assert not torch.equal(projection.weight, before)
    check_weights(module, lambda: projection.weight, weights)
    parametrize.remove_parametrizations(projection, "weight")
    check_weights(module, lambda: projection.weight, 1)


def test_pruned():
    """`torch.nn.utils.prune`: what is pruned counts as 0, stays 0 in training, and has gradient 0"""
    torch.manual_seed(0)
    module = block()
    query = module.layers[0].query
    prune.l1_unstructured(query, "weight", amount=0.5)
    optimizer = adam(module.parameters())
    for _ in range(3):
        check_weights(module, lambda: query.weight_orig * query.weight_mask, 1)
        optimizer.step()
        optimizer.zero_grad()
    assert query.weight_mask.mean() == 0.5 and not query.weight_orig.grad
    prune.remove(query, "weight")
    assert (query.weight == 0).double().mean() >= 0.5
    check_weights(module, lambda: query.weight, 1)


def test_norm_by_hooks():
    """`torch.nn.utils.weight_norm`, the old one, which recomputes the weight in a hook"""
    module = block()
    with pytest.warns(FutureWarning):
        query = nn.utils.weight_norm(module.layers[0].query)
    optimizer = adam(module.parameters())
    for _ in range(3):
        norm = query.weight_v.norm(dim=1, keepdim=True)
        check_weights(
            module, lambda norm=norm: query.weight_g * query.weight_v / query.weight_v.norm(dim=1, keepdim=True), 2
        )
        optimizer.step()
        optimizer.zero_grad()


# ---- more than two modalities


class ThreeModalities(nn.Module):
    """Video, audio and text as RJCMA fuses them, with the gates of GRJCA, written around the functional form."""

    widths, iterations = (D_V, D_A, 6), 2

    def __init__(self) -> None:
        super().__init__()
        width = sum(self.widths)
        self.query = nn.ModuleList(nn.Linear(width, width) for _ in range(self.iterations))
        self.key, self.value, self.output = (
            nn.ModuleList(nn.ModuleList(nn.Linear(*size(d_m)) for d_m in self.widths) for _ in range(self.iterations))
            for size in (lambda _: (L, L), lambda d_m: (d_m, d_m), lambda d_m: (width, d_m))
        )
        self.gates = nn.ModuleList(nn.Linear(d_m, self.iterations + 1) for d_m in self.widths)

    def forward(self, *x: torch.Tensor, **options) -> torch.Tensor:
        def linear(module: nn.Module) -> Linear:
            return Linear(module.weight, module.bias)

        layers = [
            Layer(linear(query), *(tuple(map(linear, group)) for group in groups))
            for query, *groups in zip(self.query, self.key, self.value, self.output, strict=True)
        ]
        gates = [(linear(gate),) for gate in self.gates]
        return gated_rjca(x, layers, gates, gating="flat", normalize=True, concat=True, **options)


def test_third_modality():
    """A third modality, as in RJCMA (video, audio, text): a module around `gated_rjca`, with `lengths`, trained"""
    torch.manual_seed(0)
    model = ThreeModalities().double()
    x = [torch.randn(4, L, d_m, dtype=torch.float64, requires_grad=True) for d_m in model.widths]
    lengths = torch.tensor([L, 2, 1, L])
    tensors = [*x, *model.parameters()]
    results = []
    for backend in ("auto", "reference"):
        y = model(*x, lengths=lengths, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
    assert_close(*results)
    optimizer = adam(model.parameters())
    losses = []
    for _ in range(30):
        loss = (model(*x, lengths=lengths) - 0.1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
