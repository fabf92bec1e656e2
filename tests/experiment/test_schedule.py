"""How a training restarts, stops, shuffles and releases networks, as the settings say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import arrays
import small
from grjca import backbones
from grjca.config import ModelConfig, NetworksConfig, PredictConfig, TrainConfig
from grjca.errors import UserError
from grjca.evaluation.predict import predict
from grjca.model.audiovisual import AudioVisualModel
from grjca.training import metrics, runs
from grjca.training.train import train

RELEASED = {  # by stage: what begins with these names is trained from then on
    1: ("visual.output_layer.", "audio.embeddings.4."),
    2: ("visual.body.21.", "visual.body.22.", "visual.body.23.", "audio.embeddings.2."),
    3: ("visual.body.18.", "visual.body.19.", "visual.body.20.", "audio.embeddings.0."),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture
def config(folder, tmp_path):
    return TrainConfig(
        folder, "valence", tmp_path / "run", window=small.WINDOW, hop=small.HOP, batch_size=4, epochs=4,
        model=small.MODEL, tensorboard=False,
    )  # fmt: skip


def scripted(monkeypatch, ccc):
    """Make validation yield this CCC in every epoch, or ``ccc(epoch)``."""
    epochs = iter(range(10**6))

    def score(*_):
        epoch = next(epochs)
        return metrics.SplitScores(metrics.Scores(1, ccc(epoch) if callable(ccc) else ccc, 0.0, math.nan), {})

    monkeypatch.setattr("grjca.training.train.split_scores", score)


def history(config):
    return [json.loads(line) for line in (config.out / runs.METRICS).read_text().splitlines()]


def rates(config):
    """Return the learning rate of the last batch of each epoch."""
    return [line["learning_rate"] for line in history(config)]


# ---- initial weights


def test_initial_weights_are_the_authors():
    torch.manual_seed(0)
    model = AudioVisualModel(ModelConfig(), fusion="grjca", length=300)
    narrowing = model.encoders["visual"].blocks[2].downsample
    assert float(narrowing.weight.detach().std()) == pytest.approx(0.0721, rel=0.02)
    bound = math.sqrt(2) * math.sqrt(6 / (512 + 256))
    assert 0.99 * bound < float(narrowing.weight.detach().abs().max()) <= bound
    for name, of in model.named_modules():  # all else is as PyTorch makes it, but for the fusion block
        if isinstance(of, nn.Linear) and not name.startswith("fusion"):
            assert (
                0.9 / math.sqrt(of.in_features) < float(of.weight.detach().abs().max()) <= 1 / math.sqrt(of.in_features)
            )
        if isinstance(of, nn.Conv1d) and "downsample" not in name:
            fan_in = of.in_channels * of.kernel_size[0]
            assert float(of.weight.detach().std()) == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.02)
        if isinstance(of, nn.BatchNorm1d):
            assert bool((of.weight == 1).all()) and not of.bias.any()


# ---- restarting


def fallen(warmup=2, plateau=1, factor=1e-3):
    """Return settings with which a rate of 1e-5 falls to 1e-8 in an epoch after the warm-up."""
    return {
        "learning_rate": 1e-5, "warmup_epochs": warmup, "plateau_epochs": plateau, "plateau_factor": factor,
    }  # fmt: skip


def test_the_rate_stays_where_it_has_fallen_to(config, monkeypatch):
    scripted(monkeypatch, 0.5)
    config = replace(config, epochs=7, **fallen())
    train(config, progress=False)
    assert rates(config) == pytest.approx([5e-6, 1e-5, 1e-5, 1e-8, 1e-8, 1e-8, 1e-8])


def test_training_begins_anew_where_that_is_asked_for(config, monkeypatch):
    """Every restart has a warm-up and new moments, and begins from the best weights."""
    scripted(monkeypatch, lambda epoch: 0.5 - epoch / 100)
    config = replace(config, epochs=13, restart=True, **fallen())
    train(config, progress=False)
    assert rates(config) == pytest.approx([5e-6, 1e-5, 1e-5, 1e-8, 1e-8, 1e-8] * 2 + [5e-6])
    state = json.loads((config.out / runs.CHECKPOINT / runs.STATE).read_text())
    assert state["started"] == 12 and state["stage"] == 0


@pytest.mark.parametrize(("warmup", "begins"), [(1, 6), (4, 6), (5, 6), (7, 8)])
def test_training_begins_anew_after_more_than_five_epochs(config, monkeypatch, warmup, begins):
    """The training restarts after more than five epochs, whatever the warm-up; the rate falls in the epoch after it."""
    scripted(monkeypatch, 0.5)
    config = replace(config, epochs=begins, restart=True, **fallen(warmup=warmup))
    train(config, progress=False)
    state = json.loads((config.out / runs.CHECKPOINT / runs.STATE).read_text())
    assert state["started"] == begins


def test_a_rate_of_1e_8_up_to_rounding_has_fallen(config, monkeypatch):
    """1e-4 times 0.1, four times, is a little above; and the authors' steps take 5 + 4 x 6 epochs."""
    scripted(monkeypatch, 0.5)
    config = replace(config, epochs=31, restart=True, learning_rate=1e-4)
    train(config, progress=False)
    expected = [k * 2e-5 for k in range(1, 6)]
    expected += [1e-4] * 6 + [1e-5] * 6 + [1e-6] * 6 + [1e-7] * 6 + [2e-5, 4e-5]
    assert rates(config) == pytest.approx(expected)


@pytest.mark.parametrize("interrupted", [1, 5, 6, 12])
@pytest.mark.sampled(1)
def test_a_run_that_begins_anew_resumes_bit_for_bit(config, monkeypatch, interrupted):
    config = replace(config, restart=True, **fallen())
    for out, begun, epochs in (("whole", 0, 13), ("parts", 0, interrupted), ("parts", interrupted, 13)):
        scripted(monkeypatch, lambda epoch, begun=begun: 0.5 - (begun + epoch) / 100)
        train(replace(config, out=config.out.with_name(out), epochs=epochs), resume=True, progress=False)
    whole, parts = (config.out.with_name(name) for name in ("whole", "parts"))
    assert (whole / runs.BEST).read_bytes() == (parts / runs.BEST).read_bytes()
    assert [p.read_bytes() for p in sorted(whole.glob("checkpoint/*.safetensors"))] == [
        p.read_bytes() for p in sorted(parts.glob("checkpoint/*.safetensors"))
    ]


# ---- stopping early


@pytest.mark.parametrize(("since", "expected"), [("best", 4), ("warmup", 6)])
def test_early_stopping_counts_from(config, monkeypatch, since, expected):
    """The best epoch is 1, the warm-up takes 3 epochs, and early stopping waits for 3 epochs."""
    scripted(monkeypatch, lambda epoch: 0.5 - epoch / 100)
    config = replace(config, epochs=9, warmup_epochs=3, early_stop_epochs=3, early_stop_from=since)
    assert train(config, progress=False).epochs == expected


@pytest.mark.parametrize(("since", "expected"), [("best", 11), ("warmup", 13)])
def test_beginning_anew_resets_early_stopping(config, monkeypatch, since, expected):
    """The restart after epoch 6 resets early stopping, which then applies after 5 epochs (best) or never (warmup)."""
    scripted(monkeypatch, lambda epoch: 0.5 - epoch / 100)
    schedule = fallen(plateau=2)
    config = replace(config, epochs=13, restart=True, early_stop_epochs=5, early_stop_from=since, **schedule)
    assert train(config, progress=False).epochs == expected


# ---- shuffling


@pytest.mark.parametrize("shuffle", ["epoch", "once"])
def test_windows_are_shuffled(config, monkeypatch, shuffle):
    orders = []
    forward = AudioVisualModel.forward

    def spied(self, *features, lengths=None, **options):
        if self.training:
            orders[-1].append(round(float(features[0].sum()), 3))
        return forward(self, *features, lengths=lengths, **options)

    monkeypatch.setattr(AudioVisualModel, "forward", spied)
    monkeypatch.setattr("grjca.training.train._Training._title", lambda self, doing: orders.append([]) or "")
    train(replace(config, shuffle=shuffle, batch_size=1), progress=False)
    orders = [order for order in orders if order]
    assert len(orders) == 4 and sorted(orders[0]) == sorted(orders[1])
    assert (orders[0] == orders[1] == orders[3]) == (shuffle == "once")


# ---- networks in the loop


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    return arrays.write_data(tmp_path_factory.mktemp("arrays") / "data")


@pytest.fixture
def whole(footage, tmp_path):
    return TrainConfig(
        footage, "valence", tmp_path / "whole", source="arrays", window=8, hop=8, batch_size=4, epochs=3,
        networks=NetworksConfig(size="small"), model=arrays.MODEL, tensorboard=False,
    )  # fmt: skip


def test_networks_are_released_in_three_stages(whole, monkeypatch):
    """A stage is released at epoch 0 and whenever the rate has fallen; a fourth release would end the training."""
    scripted(monkeypatch, lambda epoch: 0.5 - epoch / 100)
    traced = []
    step = torch.optim.Adam.step

    def spied(self, *arguments, **options):
        traced.append(sum(p.numel() for group in self.param_groups for p in group["params"]))
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", spied)
    config = replace(whole, epochs=20, **fallen())
    result = train(config, progress=False)
    assert result.epochs == 18
    assert rates(config) == pytest.approx([5e-6, 1e-5, 1e-5, 1e-8, 1e-8, 1e-8] * 3)
    networks = {name: backbones.make(name, "small") for name in ("visual", "audio")}
    head = sum(p.numel() for p in AudioVisualModel(arrays.MODEL, fusion="grjca", length=8).parameters())
    expected, prefixes = [], ()
    for stage in (1, 2, 3):
        for name, of in backbones.STAGES["small"][stage - 1].items():
            prefixes += tuple(f"{name}.{prefix}." for prefix in of)
        released = (
            p.numel()
            for name, network in networks.items()
            for key, p in network.named_parameters()
            if f"{name}.{key}".startswith(prefixes)
        )
        expected += [head + sum(released)] * 6
    assert [line["trained"] for line in history(config)] == expected
    assert list(dict.fromkeys(traced)) == list(dict.fromkeys(expected))  # Adam itself holds no others


def test_the_stages_are_the_authors():
    for stage, prefixes in RELEASED.items():
        ours = {f"{name}.{prefix}." for name, of in backbones.STAGES["released"][stage - 1].items() for prefix in of}
        assert ours == set(prefixes)


def test_frozen_networks_stay_as_they_are(whole):
    config = replace(whole, networks=replace(whole.networks, release=False, statistics="frozen"), epochs=2)
    train(config, progress=False)
    torch.manual_seed(config.seed)
    initial = runs.new_model(config)
    _, trained = runs.load_best(config.out)
    for a, b in zip(initial.backbones.state_dict().values(), trained.backbones.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(initial.model.head.output.weight, trained.model.head.output.weight)
    assert {line["trained"] for line in history(config)} == {
        sum(p.numel() for p in AudioVisualModel(arrays.MODEL, fusion="grjca", length=8).parameters())
    }


@pytest.mark.parametrize("options", [{}, {"statistics": "frozen"}, {"chunk": 5}])
@pytest.mark.sampled(1)
def test_training_with_networks_resumes_bit_for_bit(whole, options):
    ends = []
    for name, until in (("at-once", [3]), ("parts", [1, 2, 3])):
        for epochs in until:
            networks = replace(whole.networks, **options)
            here = replace(whole, out=whole.out.with_name(name), epochs=epochs, networks=networks)
            train(here, resume=True, progress=False)
        ends.append(here.out)
    assert (ends[0] / runs.BEST).read_bytes() == (ends[1] / runs.BEST).read_bytes()
    (a,), (b,) = (list(end.glob("checkpoint/*.safetensors")) for end in ends)
    assert a.read_bytes() == b.read_bytes()


def test_pictures_need_the_networks_modalities(whole):
    with pytest.raises(UserError, match=r"model\.modalities: expected .*from arrays"):
        replace(whole, model=small.MODEL)
    with pytest.raises(UserError, match="--networks: expected its settings with --from arrays alone"):
        replace(whole, source="features")


def test_networks_begin_with_the_weights_that_are_named(whole, tmp_path):
    torch.manual_seed(5)
    network = backbones.make("visual", "small")
    path = tmp_path / "face.pt"
    torch.save({f"backbone.{name}": value for name, value in network.state_dict().items()}, path)
    networks = replace(whole.networks, visual=path, release=False, statistics="frozen")
    config = replace(whole, networks=networks, epochs=1)
    train(config, progress=False)
    _, model = runs.load_best(config.out)
    for name, value in network.state_dict().items():
        assert torch.equal(model.backbones["visual"].state_dict()[name], value)
    assert runs.random_networks(config, config.data) == "audio network of random weights"


# ---- three modalities


@pytest.mark.parametrize("fusion", ["rjcma", "grjca", "tagf", "concat"])
def test_a_third_modality(config, tmp_path, fusion):
    data = small.write_data(tmp_path / "data")
    for folder in (data / "features").iterdir():
        frames = len(np.load(folder / "audio.npy"))
        np.save(folder / "text.npy", np.random.default_rng(3).normal(size=(frames, 9)).astype(np.float32))
    model = replace(small.MODEL, modalities="visual:6, audio:5, text:9", channels=small.MODEL.channels | {"text": (8,)})
    config = replace(config, data=data, model=model, fusion=fusion, epochs=2)
    train(config, progress=False)
    assert runs.read_config(config.out).model.widths == {"visual": 6, "audio": 5, "text": 9}
    assert {p.stem for p in (config.out / "predictions").iterdir()} == set(small.LENGTHS["validate"])
    (data / "features" / "alpha" / "text.npy").unlink()
    with pytest.raises(UserError, match=r"text\.npy is missing; expected text \[N, 9\]"):
        train(replace(config, out=tmp_path / "other"), progress=False)


def test_files_are_named_by_the_modality():
    from grjca.data.layout import Source

    plain = Source("v", None, None, Path("features/v"), True)
    assert [plain.features(name).name for name in ("visual", "text")] == ["visual.npy", "text.npy"]
    theirs = Source("v", None, None, Path("npy_data/v"), False)
    names = [theirs.features(name).name for name in ("visual", "audio", "text")]
    assert names == ["video.npy", "vggish.npy", "text.npy"]


def test_the_order_of_modalities_counts(config, tmp_path):
    """The names in another order are another model: a resumed run keeps its own order and settings."""
    model = replace(small.MODEL, modalities="audio:5, visual:6")
    train(replace(config, epochs=1), progress=False)
    before = (config.out / runs.CONFIG).read_bytes()
    with pytest.raises(UserError, match="was begun with model="):
        train(replace(config, model=model), resume=True, progress=False)
    assert (config.out / runs.CONFIG).read_bytes() == before
    other = small.write_run(tmp_path / "other", config.data, target="arousal", model=model)
    with pytest.raises(UserError, match="the same modalities in the same order"):
        predict(PredictConfig(config.out, config.data, tmp_path / "predicted", other=other))


@pytest.mark.parametrize("name", ["values", "type", "keys", "forward"])
def test_names_of_methods_are_no_modalities(name):
    with pytest.raises(UserError, match=f"expected other names than those of PyTorch's own methods, got '{name}'"):
        AudioVisualModel(ModelConfig(modalities={"visual": 3, name: 2}), fusion="grjca", length=4)


def test_a_run_goes_on_without_the_files_that_it_began_with(whole, tmp_path):
    path = tmp_path / "face.pt"
    torch.save(backbones.make("visual", "small").state_dict(), path)
    config = replace(whole, networks=replace(whole.networks, visual=path), epochs=1)
    train(config, progress=False)
    path.unlink()
    assert train(replace(config, epochs=2), resume=True, progress=False).epochs == 2
