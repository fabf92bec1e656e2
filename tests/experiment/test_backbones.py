"""The face and voice networks against the authors' values, their stages, their checkpoints, and the crop."""

import os

import numpy as np
import pytest
import torch
from pytest import mark
from safetensors.torch import save_file

import deterministic
from cases import DATA
from grjca.backbones import RANDOM, STAGES, crop, filled, load, make
from grjca.errors import UserError

NAMES = ("visual", "audio")
INPUTS = {
    "visual": deterministic.uniform((2, 3, 40, 40), "backbones/face"),
    "audio": deterministic.uniform((2, 96, 64), "backbones/logmel", 3.0),
}
KEYS = {"visual": "backbones/ir50", "audio": "backbones/vggish"}


def on_meta(name, size):
    with torch.device("meta"):
        return make(name, size)


def weights(name, seed=0):
    torch.manual_seed(seed)
    return make(name, "small").state_dict()


def same(network, state):
    return all(torch.equal(tensor, state[key]) for key, tensor in network.state_dict().items())


def prefixed(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


# ---- the networks


@mark.parametrize("name", NAMES)
def test_golden(name):
    network = on_meta(name, "released").double().to_empty(device="cpu").eval()
    deterministic.fill(network, KEYS[name])
    with np.load(DATA / "backbones.npz") as archive:
        expected = torch.from_numpy(archive[name])
    with torch.no_grad():
        assert (network(INPUTS[name]) - expected).abs().max() < 1e-10


@mark.parametrize(("name", "parameters", "some"), [
    ("visual", 37_283_520, ["input_layer.2.weight", "body.0.res_layer.4.running_var", "body.3.shortcut_layer.1.bias",
                            "body.23.res_layer.3.weight", "output_layer.3.weight", "output_layer.4.running_mean"]),
    ("audio", 72_141_184, ["features.0.weight", "features.13.bias", "embeddings.0.weight", "embeddings.4.bias"]),
])  # fmt: skip
def test_released_sizes_and_names(name, parameters, some):
    network = on_meta(name, "released")
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert set(some) <= network.state_dict().keys()


@mark.parametrize(("name", "width"), [("visual", 512), ("audio", 128)])
def test_the_small_pair_is_of_the_same_form(name, width):
    small, released = make(name, "small"), on_meta(name, "released").to_empty(device="cpu")
    assert {key.rpartition(".")[2] for key in small.state_dict()} == {
        key.rpartition(".")[2] for key in released.state_dict()
    }
    assert [key for key, _ in small.named_children()] == [key for key, _ in released.named_children()]
    assert small(INPUTS[name].float()).shape == (2, width) and small.outputs == released.outputs == width
    assert 50 < multiplications(released, name) / multiplications(small, name) < 300


def multiplications(network, name):
    """Count the multiplications of a sample in convolutions and linear layers."""
    counts = []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(lambda of, _, out: counts.append(out[0].numel() * of.weight[0].numel()))
    with torch.no_grad():
        network.eval()(INPUTS[name][:1].float())
    return sum(counts)


def test_rows_of_the_face_network_have_norm_1():
    rows = make("visual", "small").double()(INPUTS["visual"])
    assert torch.allclose(rows.norm(dim=1), torch.ones(2, dtype=torch.float64))


def test_one_face_can_be_trained_on():
    network = make("visual", "small").train()
    before = network.output_layer[4].running_mean.clone()
    assert network(INPUTS["visual"][:1].float()).isfinite().all()
    assert torch.equal(network.output_layer[4].running_mean, before)


@mark.parametrize(("name", "size"), [("text", "small"), ("visual", "large")])
def test_there_is_no_such_network(name, size):
    with pytest.raises(ValueError, match=r"expected a network of visual or audio in released or small, got"):
        make(name, size)


@mark.parametrize("size", STAGES)
@mark.parametrize("name", NAMES)
def test_stages_are_parts_of_the_network_and_share_none(name, size):
    keys = [key for key, _ in on_meta(name, size).named_parameters()]
    prefixes = [f"{prefix}." for stage in STAGES[size] for prefix in stage[name]]
    assert len(STAGES[size]) == 3 and len(set(prefixes)) == len(prefixes)
    assert all(any(key.startswith(prefix) for key in keys) for prefix in prefixes)
    last = [key.partition(".")[0] for key in keys][-1]
    assert keys[-1].startswith(STAGES[size][0][name]) and last in ("output_layer", "embeddings")


# ---- checkpoints


PLACES = {
    "bare": lambda name, w: w,
    "alone": lambda name, w: prefixed("backbone.", w) | {"logits.weight": torch.zeros(8, 512)},
    "whole": lambda name, w: (
        prefixed("spatial.visual.backbone.", weights("visual", 0) if name == "visual" else weights("visual", 9))
        | prefixed("spatial.audio.backbone.", weights("audio", 0) if name == "audio" else weights("audio", 9))
        | {"regressor1.weight": torch.zeros(2)}
    ),
    "in a dict": lambda name, w: {"epoch": 3, "state_dict": prefixed("module.backbone.", w)},
    "compiled": lambda name, w: prefixed("_orig_mod.", w),
    "beside averaged": lambda name, w: {"net": w, "ema": weights(name, 9)},
}


@mark.parametrize("place", PLACES)
@mark.parametrize("name", NAMES)
def test_weights_are_found(place, name):
    w = weights(name)
    network = make(name, "small")
    assert network.origin == RANDOM and not same(network, w)
    load(network, PLACES[place](name, w))
    assert same(network, w) and network.origin == "source"


@mark.parametrize("file", ["net.pth", "net.safetensors"])
def test_files(file, tmp_path):
    w = prefixed("backbone.", weights("audio"))
    torch.save(w, tmp_path / file) if file.endswith("pth") else save_file(w, tmp_path / file)
    network = make("audio", "small").double()
    load(network, tmp_path / file)
    assert network.origin == str(tmp_path / file)
    assert all(tensor.dtype == torch.float64 for tensor in network.parameters())
    assert torch.equal(network.embeddings[4].bias, w["backbone.embeddings.4.bias"].double())


@mark.parametrize("key", ["input_layer.2.weight", "body.1.shortcut_layer.0.weight", "output_layer.4.running_var"])
def test_a_tensor_that_does_not_fit_is_named(key):
    w = prefixed("backbone.", weights("visual"))
    full = f"backbone.{key}"
    for change, match in (
        ({}, rf"source: {full}: expected a tensor of the authors' model, got no such key"),
        ({full: torch.zeros(5, 4)}, rf"source: {full}: expected shape \[.*\], got \[5, 4\]"),
        (
            {full: torch.zeros(w[full].shape, dtype=torch.int32)},
            rf"source: {full}: expected a floating dtype, got torch",
        ),
        ({full: w[full].numpy()}, rf"source: {full}: expected a tensor .* got ndarray"),
    ):
        network = make("visual", "small")
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        with pytest.raises(UserError, match=match):
            load(network, {name: tensor for name, tensor in w.items() if name != full} | change)
        assert same(network, before) and network.origin == RANDOM


def test_counts_of_batches_may_be_missing():
    w = weights("visual")
    network = make("visual", "small")
    load(network, {key: tensor for key, tensor in w.items() if not key.endswith("num_batches_tracked")})
    assert same(network, w)


def test_what_is_no_such_network():
    w = weights("visual")
    for source, match in (
        (w | {"body.5.res_layer.0.weight": torch.zeros(1)}, r"body\.5\.\S+: expected no such key in a IR50"),
        (weights("audio"), r"expected one IR50, with a key input_layer.0.weight, got none among 18 keys \(features.0"),
        ({}, r"got none among 0 keys"),
        ({"a": w, "b": w}, r"got 2, under 'a\.' and 'b\.'; pass a dict of one alone"),
    ):
        with pytest.raises(UserError, match=match):
            load(make("visual", "small"), source)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_is_executed(tmp_path):
    torch.save({"state_dict": weights("audio"), "more": Trap(str(tmp_path / "sprung"))}, tmp_path / "net.pth")
    with pytest.raises(UserError, match="nothing was loaded"):
        load(make("audio", "small"), tmp_path / "net.pth")
    assert not (tmp_path / "sprung").exists()


@mark.parametrize("name", NAMES)
def test_filled_copies_weights_in_their_dtype(name):
    w = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in weights(name).items()}
    network = filled(name, "small", "label", w, "")
    assert same(network, w) and network.size == "small" and network.origin == "label"


# ---- the crop


FACES = torch.randint(0, 256, (3, 2, 48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_centre():
    expected = (FACES[:, :, 4:44, 4:44].numpy() / 255 - 0.5) / 0.5
    assert np.allclose(crop(FACES).numpy(), np.moveaxis(expected, -1, -3), atol=1e-6)
    assert crop(FACES).shape == (3, 2, 3, 40, 40) and crop(FACES[0, 0]).shape == (3, 40, 40)
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 48, 48, 3)
    assert crop(black_and_white).unique().tolist() == [-1, 1]


def test_a_crop_and_a_flip_for_each_window():
    offsets, flip = torch.tensor([[0, 8], [8, 0], [4, 4]]), torch.tensor([True, False, True])
    cut = crop(FACES, offsets, flip)
    for b, (row, column) in enumerate(offsets.tolist()):
        x = FACES[b, :, row : row + 40, column : column + 40].numpy() / 255
        x = x[:, :, ::-1] if flip[b] else x
        assert np.allclose(cut[b].numpy(), np.moveaxis((x - 0.5) / 0.5, -1, -3), atol=1e-6)
    assert torch.equal(crop(FACES, offsets), crop(FACES, offsets, torch.zeros(3, dtype=torch.bool)))
    assert torch.equal(crop(FACES, torch.full((3, 2), 4)), crop(FACES))


@mark.parametrize(("arguments", "match"), [
    ((FACES.float(),), r"faces: expected uint8 \[\.\.\., 48, 48, 3\], got torch.float32"),
    ((FACES[:, :, :40],), r"got torch.uint8 \[3, 2, 40, 48, 3\]"),
    ((FACES, torch.zeros(2, 2)), r"offsets: expected shape \[3, 2\], got \[2, 2\]"),
    ((FACES, torch.full((3, 2), 9)), "offsets: expected whole numbers from 0 to 8"),
    ((FACES, torch.zeros(3, 2)), "offsets: expected whole numbers"),
    ((FACES, None, torch.zeros(2, dtype=torch.bool)), r"flip: expected shape \[3\], got \[2\]"),
])  # fmt: skip
def test_crops_that_cannot_be(arguments, match):
    with pytest.raises(ValueError, match=match):
        crop(*arguments)
