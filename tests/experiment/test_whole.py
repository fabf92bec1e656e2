"""The whole model equals its parts one by one, trains only released parts, and runs in chunks of frames."""

import warnings

import pytest
import torch
from pytest import mark
from torch.profiler import ProfilerActivity, profile

from authors import authors_model, checkpoint
from grjca import backbones
from grjca.backbones import STAGES, crop
from grjca.config import ModelConfig
from grjca.errors import UserError
from grjca.model import whole
from grjca.model.audiovisual import AudioVisualModel
from grjca.model.whole import WholeModel, activation_bytes
from grjca.released import load_model
from tolerances import check_close

LENGTH, BATCH = 5, 3
LENGTHS = torch.tensor([5, 2, 4])
MODEL = ModelConfig(channels={"visual": (7, 6), "audio": (4,)}, kernel=3, hidden=5, encoder_dropout=0, dropout=0)
SIZES = {"length": LENGTH, "visual": (512, 6, 5), "audio": (128, 3), "kernel": 3, "hidden": 6}
TOLERANCE = 1e-12


def networks(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return {name: backbones.make(name, "small").to(dtype) for name in ("visual", "audio")}


def model(stage=0, dtype=torch.float64, config=MODEL, length=LENGTH, **options):
    """Make a whole model, always with the same weights."""
    of = networks(dtype=dtype)
    made = WholeModel(AudioVisualModel(config, fusion="grjca", length=length).to(dtype), of, **options)
    made.release(stage)
    return made


def arrays(batch=BATCH, length=LENGTH):
    generator = torch.Generator().manual_seed(1)
    faces = torch.randint(0, 256, (batch, length, 48, 48, 3), dtype=torch.uint8, generator=generator)
    return faces, torch.randn(batch, length, 96, 64, generator=generator).half()


def gradients(of, *inputs, **options):
    """Return the values and the gradients of all trained parameters, with the dropout of seed 3."""
    of.zero_grad()
    torch.manual_seed(3)
    values = of(*inputs, **options)
    values.square().sum().backward()
    return values.detach(), {key: p.grad.clone() for key, p in of.named_parameters() if p.grad is not None}


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in b)


def statistics(of):
    return {key: buffer.clone() for key, buffer in of.backbones.named_buffers()}


# ---- the authors' checkpoints


def with_networks(w):
    for name, network in networks().items():
        w |= {f"spatial.{name}.backbone.{key}": tensor for key, tensor in network.state_dict().items()}
    return w


@mark.parametrize("name", ["GRJCA", "HGRJCA"])
def test_a_whole_checkpoint_is_its_parts_one_by_one(name):
    w = with_networks(checkpoint(name, **SIZES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_model({"state_dict": w})
    assert isinstance(loaded, WholeModel) and not loaded.training and not loaded.backbones.training
    faces, patches = arrays()
    of = {key: network.eval() for key, network in networks().items()}
    features = [
        of["visual"](crop(faces).flatten(0, 1).double()).unflatten(0, (BATCH, LENGTH)),
        of["audio"](patches.flatten(0, 1).double()).unflatten(0, (BATCH, LENGTH)),
    ]
    with torch.no_grad():
        check_close("values", loaded(faces, patches), authors_model(w, name, *features), TOLERANCE)
        parts = load_model({key: tensor for key, tensor in w.items() if not key.startswith("spatial.")})
        check_close("from features", loaded(faces, patches), parts(*features), TOLERANCE)
    assert {network.origin for network in loaded.backbones.values()} == {"source"}


def without(w, prefix):
    return {key: tensor for key, tensor in w.items() if not key.startswith(prefix)}


def test_without_networks_it_reads_features():
    w = without(with_networks(checkpoint("GRJCA", **SIZES)), "spatial.")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(load_model(w), AudioVisualModel)


@mark.parametrize(("there", "missing"), [("visual", "audio"), ("audio", "visual")])
def test_with_one_network_it_reads_features_and_says_why(there, missing):
    w = without(with_networks(checkpoint("GRJCA", **SIZES)), f"spatial.{missing}.")
    with pytest.warns(UserWarning) as caught:
        assert isinstance(load_model(w), AudioVisualModel)
    (said,) = (str(warning.message) for warning in caught)
    assert said == (
        f"source: expected both networks or none, got spatial.{there}.backbone.* without "
        f"spatial.{missing}.backbone.*: the model reads features, and the {there} network is left out."
    )


@mark.parametrize("both", [True, False])
@mark.parametrize(
    "key", ["visual.backbone.input_layer.0.weight", "visual.backbone.body.2.res_layer.4.running_var",
            "audio.backbone.features.0.weight", "audio.backbone.embeddings.4.bias"]
)  # fmt: skip
def test_a_network_that_is_incomplete_is_refused(key, both):
    """A network with missing keys is refused, even if the other network is absent."""
    key, other = f"spatial.{key}", {"visual": "audio", "audio": "visual"}[key.partition(".")[0]]
    w = with_networks(checkpoint("GRJCA", **SIZES))
    w = w if both else without(w, f"spatial.{other}.")
    with pytest.raises(UserError, match=rf"source: {key}: expected a tensor of the authors' model, got no such key"):
        load_model(without(w, key))
    with pytest.raises(UserError, match=rf"source: {key}: expected shape \[.*\], got \[3, 2\]"):
        load_model(w | {key: torch.zeros(3, 2)})
    with pytest.raises(UserError, match=rf"source: {key}: expected a floating dtype, got torch.int64"):
        load_model(w | {key: w[key].long()})


def test_a_count_of_batches_may_be_missing():
    """A count of batches has no effect, and old versions of PyTorch do not save it."""
    w = with_networks(checkpoint("GRJCA", **SIZES))
    counts = [key for key in w if key.startswith("spatial.") and key.endswith("num_batches_tracked")]
    loaded = load_model({key: tensor for key, tensor in w.items() if key not in counts})
    expected = load_model(w)
    assert counts and isinstance(loaded, WholeModel)
    assert same(loaded.state_dict(), expected.state_dict())
    with pytest.raises(UserError, match=rf"{counts[0]}: expected shape \[\], got \[2\]"):
        load_model(w | {counts[0]: torch.zeros(2).long()})


def test_a_network_that_does_not_fit_is_refused():
    w = with_networks(checkpoint("GRJCA", **SIZES))
    key = "spatial.audio.backbone.embeddings.2.weight"
    with pytest.raises(UserError, match=rf"source: {key}: expected shape \[256, 256\], got \[3, 2\]"):
        load_model(w | {key: torch.zeros(3, 2)})
    with pytest.raises(UserError, match=r"modalities: expected those of the networks, .*512.* got .*511"):
        load_model(with_networks(checkpoint("GRJCA", **SIZES | {"visual": (511, 6, 5)})))


# ---- frames that exist


@torch.no_grad()
@mark.parametrize("mode", ["batch", "frozen"])
def test_absent_frames_have_no_influence(mode):
    faces, patches = arrays()
    of = [model(statistics=mode).train() for _ in range(2)]
    torch.manual_seed(5)
    values = of[0](faces, patches, LENGTHS)
    absent = torch.arange(LENGTH) >= LENGTHS[:, None]
    faces[absent], patches[absent] = 99, torch.nan
    torch.manual_seed(5)
    assert torch.equal(of[1](faces, patches, LENGTHS), values)
    assert same(statistics(of[1]), statistics(of[0])) and (values[absent] == 0).all()


@torch.no_grad()
def test_no_frame_at_all():
    of = model().train()
    before = statistics(of)
    assert (of(*arrays(), torch.zeros(BATCH, dtype=torch.long)) == 0).all()
    assert same(statistics(of), before)


@torch.no_grad()
def test_faces_that_are_cropped_already():
    faces, patches = arrays()
    of = model(dtype=torch.float32).eval()
    offsets, flip = torch.tensor([[0, 8], [3, 3], [8, 1]]), torch.tensor([True, False, True])
    values = of(faces, patches, offsets=offsets, flip=flip)
    assert torch.equal(of(crop(faces, offsets, flip), patches), values)
    assert not torch.equal(of(faces, patches), values)
    assert of(faces, patches, return_gates=True)[1].keys() == {"visual", "audio"}


@mark.parametrize(("change", "match"), [
    (lambda f, p: (f[:, :4], p), r"faces: expected uint8 \[B, 5, 48, 48, 3\] or floating \[B, 5, 3, 40, 40\], got"),
    (lambda f, p: (f.int(), p), "faces: .* got torch.int32"),
    (lambda f, p: (f[..., :40, :], p), "faces: "),
    (lambda f, p: (f, p[:2]), r"patches: expected floating \[3, 5, 96, 64\], got torch.float16 \[2, 5, 96, 64\]"),
    (lambda f, p: (f, p.int()), "patches: expected floating"),
    (lambda f, p: (f, p, torch.tensor([5, 2, 6])), "lengths: expected values from 0 to L = 5"),
])  # fmt: skip
def test_bad_arguments(change, match):
    of = model().train()
    before = statistics(of)
    with pytest.raises(ValueError, match=match):
        of(*change(*arrays()))
    assert same(statistics(of), before)


def test_crops_are_not_cropped_again():
    faces, patches = arrays()
    with pytest.raises(ValueError, match="offsets, flip: expected none"):
        model()(crop(faces), patches, flip=torch.ones(BATCH, dtype=torch.bool))


@mark.parametrize(("options", "match"), [
    ({"statistics": "none"}, "statistics: expected batch or frozen, got 'none'"),
    ({"chunk": -1}, "chunk: expected a number of frames, or 0"),
    ({"config": ModelConfig(modalities="visual:512, audio:128, text:7")}, "modalities: expected those of the networks"),
])  # fmt: skip
def test_bad_settings(options, match):
    with pytest.raises(UserError, match=match):
        model(**options)


# ---- release


def of_stages(of, stage):
    """Return the names of the parameters that stages 1 to ``stage`` release."""
    prefixes = [f"{name}.{prefix}." for s in STAGES["small"][:stage] for name in s for prefix in s[name]]
    return {key for key, _ in of.backbones.named_parameters() if key.startswith(tuple(prefixes))}


@mark.parametrize("chunk", [0, 4])
@mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_reach_released_parts_alone(stage, chunk):
    of = model(stage, chunk=chunk).train()
    of(*arrays(), LENGTHS).sum().backward()
    trained = {key for key, parameter in of.backbones.named_parameters() if parameter.grad is not None}
    assert trained == of_stages(of, stage) == {key for key, p in of.backbones.named_parameters() if p.requires_grad}
    assert all(parameter.grad is not None for parameter in of.model.parameters())


def test_frozen_parts_build_no_graph():
    of, seen = model(2).train(), {}
    for name, network in of.backbones.items():
        for key, part in network.named_modules():
            part.register_forward_hook(lambda _, __, out, key=f"{name}.{key}": seen.update({key: out.requires_grad}))
    of(*arrays(), LENGTHS)
    released = {"visual.body.4", "visual.output_layer", "audio.embeddings.2", "audio.embeddings.4"}
    assert all(seen[key] for key in released)
    frozen = {"visual.input_layer", *(f"visual.body.{k}" for k in range(4)), "audio.features.13", "audio.embeddings.0"}
    assert not any(seen[key] for key in frozen)


def test_a_stage_can_be_taken_back_and_there_are_three():
    of = model(3)
    of.release(0)
    assert not any(parameter.requires_grad for parameter in of.backbones.parameters())
    assert all(parameter.requires_grad for parameter in of.model.parameters())
    for stage in (-1, 4):
        with pytest.raises(ValueError, match=f"stage: expected 0 to 3, got {stage}"):
            of.release(stage)
    shallow = {"visual": backbones.IR50(widths=(2, 2, 2, 2, 2), units=(1, 1, 1, 1)), "audio": networks()["audio"]}
    with pytest.raises(ValueError, match=r"stage: expected body.21.\* in the visual network"):
        WholeModel(of.model, shallow).release(2)


# ---- chunks and statistics


@mark.parametrize("chunk", [1, 4, 100])
@mark.parametrize("stage", [0, 1, 3])
def test_chunks_change_nothing_in_frozen_mode(stage, chunk):
    expected = gradients(model(stage, statistics="frozen").train(), *arrays(), lengths=LENGTHS)
    ours = gradients(model(stage, statistics="frozen", chunk=chunk).train(), *arrays(), lengths=LENGTHS)
    check_close("values", ours[0], expected[0], TOLERANCE)
    assert ours[1].keys() == expected[1].keys()
    check_close("gradients", *(torch.cat([g.flatten() for g in of[1].values()]) for of in (ours, expected)), TOLERANCE)


@mark.parametrize("stage", [1, 3])
def test_recomputation_changes_nothing(stage, monkeypatch):
    """Recomputation gives the same result with chunk statistics and dropout."""
    of = model(stage, chunk=4).train()
    ours = gradients(of, *arrays(), lengths=LENGTHS)
    after = statistics(of)
    monkeypatch.setattr(whole, "_recomputed", lambda part, x: part(x))
    plain = model(stage, chunk=4).train()
    expected = gradients(plain, *arrays(), lengths=LENGTHS)
    assert torch.equal(ours[0], expected[0]) and same(ours[1], expected[1]) and same(after, statistics(plain))


@mark.parametrize("stage", [0, 3])
@mark.parametrize("chunk", [0, 4])
def test_running_statistics_are_updated_once_a_chunk_by_frames_that_exist(stage, chunk):
    of, plain = model(stage, chunk=chunk).train(), networks()["visual"].train()
    gradients(of, *arrays(), lengths=LENGTHS)
    frames = crop(arrays()[0])[torch.arange(LENGTH) < LENGTHS[:, None]].double()
    pieces = 3 if chunk else 1
    torch.manual_seed(3)  # as in gradients
    for piece in frames.tensor_split(pieces):
        plain(piece)
    ours = dict(of.backbones["visual"].named_buffers())
    assert same(ours, dict(plain.named_buffers()))
    assert {int(count) for key, count in ours.items() if key.endswith("tracked")} == {pieces}


def test_modes():
    batch, frozen = model(3).train(), model(3, statistics="frozen").train()
    assert batch.training and batch.backbones.training and frozen.training and frozen.model.training
    assert not any(module.training for module in frozen.backbones.modules())
    assert not batch.eval().backbones.training
    before = statistics(frozen)
    frozen.train()(*arrays())
    assert same(statistics(frozen), before)


# ---- memory


def measured_bytes(of, batch):
    """Return the peak memory of a training step, according to PyTorch's profiler."""
    faces, patches = arrays(batch, of.model.length)
    of(faces, patches).sum().backward()  # what is made once
    of.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        of(faces, patches).sum().backward()
    totals, events = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag.name == "Allocation":
            totals.append((event.start_time_ns, event.extra_fields.total_allocated, event.extra_fields.alloc_size))
    totals.sort()
    return max(total for _, total, _ in totals) - (totals[0][1] - totals[0][2]) + faces.nbytes + patches.nbytes


@mark.parametrize(
    ("stage", "chunk", "workspace"), [(0, 0, 2), (0, 8, 2), (1, 0, 2), (1, 8, 1.02), (3, 0, 2), (3, 8, 1.02)]
)
def test_bytes_that_are_counted_are_those_that_a_step_takes(stage, chunk, workspace):
    """If the networks' forward is the peak of a step, the CPU's convolutions add copies of their inputs."""
    of = model(stage, torch.float32, ModelConfig(channels={"visual": (7, 6), "audio": (4,)}), 20, chunk=chunk).train()
    assert 0.99 < measured_bytes(of, 2) / activation_bytes(of, 2) < workspace
    assert not any(parameter.is_meta for parameter in of.parameters())
