"""Training: its schedule, its folder, and that a killed and resumed run ends like an uninterrupted one."""

import errno
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import ReduceLROnPlateau

import arrays
import small
from grjca import files, settings, tensor_files
from grjca.cli import main
from grjca.config import TARGETS, ModelConfig, NetworksConfig, SynthConfig, TrainConfig
from grjca.data.synth import synth
from grjca.errors import UserError
from grjca.training import metrics, runs
from grjca.training.train import Result, train, warmup_rate
from grjca_kernels import backends

EPOCHS = 4
WIDTHS = ["--modalities", str(small.MODEL.widths)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture
def config(folder, tmp_path):
    return configure(folder, tmp_path / "run")


def configure(folder, out, **options):
    defaults = {"epochs": EPOCHS, "window": small.WINDOW, "hop": small.HOP, "batch_size": 4, "learning_rate": 1e-2}
    return TrainConfig(folder, "valence", out, model=small.MODEL, **(defaults | options))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An uninterrupted run."""
    config = configure(folder, tmp_path_factory.mktemp("whole") / "run")
    with torch.random.fork_rng():
        torch.set_num_threads(1)
        train(config, progress=False)
    return config.out


def read_metrics(run):
    return [json.loads(line) for line in (run / runs.METRICS).read_text().splitlines()]


def weights(run):
    """Return the best weights of a run, and its last weights with the optimiser's moments."""
    best = load_file(run / runs.BEST)
    (last,) = (run / runs.CHECKPOINT).glob("*.safetensors")
    return best | {f"checkpoint.{name}": tensor for name, tensor in load_file(last).items()}


def assert_same_end(run, whole):
    assert (run / runs.BEST).read_bytes() == (whole / runs.BEST).read_bytes()
    ours, theirs = weights(run), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for a, b in zip(read_metrics(run), read_metrics(whole), strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    for path in (whole / runs.PREDICTIONS).iterdir():
        assert (run / runs.PREDICTIONS / path.name).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in run.rglob("*") if "tfevents" not in p.name) == sorted(
        p.name for p in whole.rglob("*") if "tfevents" not in p.name
    )


# What a training leaves


def test_a_run_folder_holds_everything(whole):
    assert {path.name for path in whole.iterdir()} == {
        "config.yaml",
        "best.safetensors",
        "metrics.jsonl",
        "predictions",
        "tensorboard",
        "checkpoint",
        ".lock",
    }
    lines = read_metrics(whole)
    assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1))
    assert all(math.isfinite(line[name]) for line in lines for name in ("loss", "ccc", "rmse", "learning_rate"))
    assert {path.stem for path in (whole / "predictions").iterdir()} == set(small.LENGTHS["validate"])


def test_predictions_of_every_frame_give_the_best_metric(whole, folder):
    predictions, labels = small.read_predictions(whole / "predictions"), small.read_labels(folder, "validate")
    assert {name: len(p) for name, p in predictions.items()} == small.LENGTHS["validate"]
    x, y = (np.concatenate([of[name] for name in labels]) for of in (predictions, labels))
    valid = (np.abs(y) <= 1).all(axis=1)
    best = max(line["ccc"] for line in read_metrics(whole))
    assert metrics.ccc(x[valid, 0], y[valid, 0]) == pytest.approx(best, abs=1e-6)
    assert tensor_files.read_about(whole / runs.BEST)["ccc"] == best


def test_curves_hold_every_epoch_once(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("ccc")] == list(range(1, EPOCHS + 1))
    assert [event.value for event in events.Scalars("ccc")] == pytest.approx([m["ccc"] for m in read_metrics(whole)])


def test_config_reproduces_the_run(whole, tmp_path):
    out = tmp_path / "again"
    assert main(["train", "--config", str(whole / "config.yaml"), "--out", str(out)]) == 0
    assert_same_end(out, whole)


def test_another_seed_is_another_run(config, whole):
    train(replace(config, seed=1), progress=False)
    assert not torch.equal(weights(config.out)["head.output.weight"], weights(whole)["head.output.weight"])


def test_training_learns(config):
    train(replace(config, epochs=30, reload_best=False, model=replace(small.MODEL, dropout=0.0)), progress=False)
    losses = [line["loss"] for line in read_metrics(config.out)]
    assert losses[-1] < 0.7 * losses[0]


# The schedule


def test_warmup():
    def rates(**options):
        config = TrainConfig(Path(), "valence", Path(), **options)
        return [[warmup_rate(config, epoch, step, 4) for step in range(4)] for epoch in range(config.warmup_epochs)]

    lr0 = 1e-4
    released = rates(warmup="released")
    for r in range(5):
        assert released[r] == pytest.approx([lr0 * b * (r + 1) / (25 * 4) for b in range(4)])
    linear = np.concatenate(rates())
    assert np.diff(linear) == pytest.approx(np.full(19, lr0 / 20)) and linear[-1] == pytest.approx(lr0)
    assert rates(warmup_epochs=2)[1][3] == pytest.approx(lr0)


def scripted(monkeypatch, scores):
    """Make validation yield these CCCs, one per epoch."""
    remaining = iter(scores)

    def score(*_):
        value = next(remaining)
        return metrics.SplitScores(metrics.Scores(1, value, 0.0, math.nan), {})

    monkeypatch.setattr("grjca.training.train.split_scores", score)


def rates_of(config):
    return [line["learning_rate"] for line in read_metrics(config.out)]


def test_plateau(config, monkeypatch):
    """The rate falls after 2 epochs without a better CCC; the warm-up does not count, and a tie is not better."""
    scripted(monkeypatch, [0.5, 0.1, 0.1, 0.5, 0.2, 0.6, 0.1, 0.1, 0.1])
    config = replace(config, epochs=9, warmup_epochs=2, plateau_epochs=2)
    train(config, progress=False)
    assert rates_of(config) == pytest.approx([5e-3] + [1e-2] * 3 + [1e-3] * 4 + [1e-4], rel=1e-9)


def test_plateau_of_one_epoch_waits_for_the_end_of_the_warmup(config, monkeypatch):
    scripted(monkeypatch, [0.5, 0.1, 0.1, 0.1, 0.1])
    train(replace(config, epochs=5, warmup_epochs=3, plateau_epochs=1), progress=False)
    assert rates_of(config) == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 1e-3])


def test_plateau_agrees_with_pytorch(config, monkeypatch):
    scores = [round(random.Random(0).uniform(0, 1), 2) for _ in range(12)]
    scripted(monkeypatch, scores)
    train(replace(config, epochs=12, warmup="none", plateau_epochs=2), progress=False)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1e-2)
    plateau = ReduceLROnPlateau(optimizer, "max", 0.1, 1, threshold=0)
    expected = []
    for score in scores:
        expected.append(optimizer.param_groups[0]["lr"])
        plateau.step(score)
    assert rates_of(config) == pytest.approx(expected)


def test_early_stop(config, monkeypatch):
    scripted(monkeypatch, [0.1, 0.5, 0.4, 0.4, 0.4, 0.4])
    config = replace(config, epochs=6, early_stop_epochs=3)
    assert train(config, progress=False) == Result(5, 2, 0.5, True)
    assert len(read_metrics(config.out)) == 5


def test_each_part_of_the_schedule_can_be_switched_off(config, monkeypatch):
    scripted(monkeypatch, [0.5] + [0.1] * 7)
    config = replace(
        config, epochs=8, warmup="none", plateau=False, plateau_epochs=1, early_stop=False, early_stop_epochs=1
    )
    assert train(config, progress=False).epochs == 8
    assert rates_of(config) == [1e-2] * 8


@pytest.mark.parametrize("reload", [True, False])
def test_best_weights_are_loaded_back(config, monkeypatch, reload):
    scripted(monkeypatch, [0.5, 0.1])
    train(replace(config, epochs=2, reload_best=reload), progress=False)
    best = load_file(config.out / runs.BEST)
    end = {name.removeprefix("checkpoint.model."): t for name, t in weights(config.out).items() if ".model." in name}
    assert all(torch.equal(best[name], end[name]) for name in best) == reload


def test_released_loss_is_another_loss(config, whole):
    train(replace(config, epochs=1, loss="released"), progress=False)
    assert read_metrics(config.out)[0]["loss"] != read_metrics(whole)[0]["loss"]


# The folder


def test_nothing_is_overwritten(config, whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="--resume"):
        train(replace(config, out=whole), progress=False)
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}


def test_a_folder_of_something_else_is_left_alone(config):
    config.out.mkdir()
    (config.out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"config\.yaml"):
        train(config, resume=True, progress=False)
    assert [path.name for path in config.out.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_way(config):
    config.out.write_text("")
    with pytest.raises(UserError, match="got a file"):
        train(config, progress=False)


def test_bad_data_leaves_no_folder(config, tmp_path):
    with pytest.raises(UserError):
        train(replace(config, data=tmp_path), progress=False)
    assert not config.out.exists()


@pytest.mark.parametrize("split", ["train", "validate"])
def test_a_split_without_valid_labels_is_refused(config, tmp_path, split):
    data = small.write_data(tmp_path / "data")
    for path in (data / "annotations" / split).iterdir():
        path.write_text("valence,arousal\n" + "-5,-5\n" * (path.read_text().count("\n") - 1))
    with pytest.raises(UserError, match=f"{data}: expected valid labels in the {split} split"):
        train(replace(config, data=data), progress=False)
    assert not config.out.exists()
    assert main(["doctor", "--speed", "false", "--data", str(data), *WIDTHS]) == 1


def test_resuming_with_other_settings_is_refused(config):
    train(replace(config, epochs=1), progress=False)
    with pytest.raises(UserError, match="seed=3407, got 1"):
        train(replace(config, seed=1), resume=True, progress=False)


def test_resuming_with_other_data_is_refused(config, tmp_path):
    train(replace(config, epochs=1), progress=False)
    other = small.write_data(tmp_path / "other")
    (label,) = (other / "annotations" / "train").glob("alpha.txt")
    label.write_text(label.read_text().replace("0.", "-0.", 1))
    before = (config.out / runs.CONFIG).read_bytes()
    with pytest.raises(UserError, match=r"--data: .* is not what .* was begun with"):
        train(replace(config, data=other), resume=True, progress=False)
    assert (config.out / runs.CONFIG).read_bytes() == before


def test_resuming_with_another_backend_is_said(config, monkeypatch, capsys):
    train(replace(config, epochs=1), progress=False)
    monkeypatch.setenv("GRJCA_BACKEND", "reference")
    train(config, resume=True)
    assert ("not bit for bit" in capsys.readouterr().out) == (backends()["cpu"] is None)


def test_precisions_in_one_process(config):
    """A process can train in several precisions, and bf16 also resumes bit for bit."""
    for name, epochs in (("whole", [3]), ("parts", [1, 3])):
        for until in epochs:
            here = replace(config, out=config.out.with_name(name), epochs=until, precision="bf16")
            train(here, resume=True, progress=False)
        train(replace(config, out=config.out.with_name(f"{name}-float32"), epochs=1), progress=False)
    assert_same_end(config.out.with_name("parts"), config.out.with_name("whole"))


def test_a_full_disk_is_said(config, monkeypatch):
    """The message names the file, nothing is left half-written, and the run can continue when there is room again."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(config.out / runs.BEST))

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save", full)
        with pytest.raises(OSError, match=r"No space left.*best\.safetensors"):
            train(config, progress=False)
    assert {path.name for path in config.out.iterdir()} <= {".lock", runs.CONFIG, runs.TENSORBOARD}
    train(config, resume=True, progress=False)


def test_a_finished_run_can_be_made_longer(config, whole):
    train(replace(config, epochs=1), progress=False)
    assert train(config, resume=True, progress=False).epochs == EPOCHS
    assert_same_end(config.out, whole)


def test_a_finished_run_stays_as_it_is(config, whole):
    train(config, progress=False)
    assert train(config, resume=True, progress=False).epochs == EPOCHS
    assert_same_end(config.out, whole)


def spoil(path, damage):
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)


DAMAGE = {
    "a file cut short": lambda path: path.write_bytes(b"short"),
    "no file": lambda path: path.unlink(),
    "another model": lambda path: spoil(path, lambda t: t.update({"model.head.output.weight": torch.zeros(1, 9)})),
    "a weight missing": lambda path: spoil(path, lambda t: t.pop("model.head.output.weight")),
    "a foreign tensor": lambda path: spoil(path, lambda t: t.update({"foo": torch.zeros(1)})),
    "moments missing": lambda path: spoil(path, lambda t: t.pop("optimizer.0.exp_avg")),
    "a state of something else": lambda path: path.with_name("state.json").write_text('{"epochs": 1}'),
    "another optimiser": lambda path: (state := path.with_name("state.json")).write_text(
        state.read_text().replace('"weight_decay": 0.001', '"weight_decay": 0.5')
    ),
    "no state": lambda path: path.with_name("state.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named(config, damage):
    train(replace(config, epochs=1), progress=False)
    before = [(config.out / name).read_bytes() for name in (runs.BEST, runs.CONFIG)]
    DAMAGE[damage](config.out / "checkpoint" / "epoch-0001.safetensors")
    with pytest.raises(UserError, match=r"state\.json.* choose another --out|state\.json.*damaged.*another --out"):
        train(config, resume=True, progress=False)
    assert [(config.out / name).read_bytes() for name in (runs.BEST, runs.CONFIG)] == before


def test_divergence_is_refused_and_loses_nothing(config, monkeypatch):
    train(replace(config, epochs=1), progress=False)
    before = weights(config.out)
    monkeypatch.setattr("grjca.training.train.ccc_loss", lambda p, *_, **__: p.sum() * math.nan)
    with pytest.raises(UserError, match="epoch 2: expected finite numbers"):
        train(config, resume=True, progress=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(config.out).items())


# Killed


class Killed(BaseException):
    pass


def test_killed_at_every_write(config, whole, monkeypatch):
    """The training is killed before and after every file that it puts in place."""
    real, moment, count = os.replace, 0, 0

    def replace_or_die(source, destination):
        nonlocal count
        count += 1
        if count == (moment + 1) // 2 and moment % 2:
            raise Killed
        real(source, destination)
        if count == moment // 2 and not moment % 2:
            raise Killed

    monkeypatch.setattr(os, "replace", replace_or_die)
    while True:
        moment, count = moment + 1, 0
        here = replace(config, out=config.out.with_name(f"run-{moment}"), tensorboard=False)
        try:
            train(here, progress=False)
            break  # there are no more writes
        except Killed:
            assert not list(small.half_written(here.out))
        count = -(10**6)
        train(here, resume=True, progress=False)
        assert {name: t.tolist() for name, t in weights(here.out).items()} == {
            name: t.tolist() for name, t in weights(whole).items()
        }
        assert not list(small.half_written(here.out))
        assert not any(map(files.is_partial, here.out.rglob("*")))
    assert moment // 2 >= 1 + 3 * EPOCHS + len(small.LENGTHS["validate"])


def test_interrupt_leaves_a_run_to_go_on_with(config, whole, monkeypatch, capsys):
    from grjca.training.train import _Training

    real = _Training.epoch

    def interrupted(self):
        if self.state.epoch == 2:
            raise KeyboardInterrupt
        real(self)

    arguments = ["train", "--config", str(whole / "config.yaml"), "--out", str(config.out)]
    with monkeypatch.context() as patch:
        patch.setattr(_Training, "epoch", interrupted)
        assert main(arguments) == 130
    assert f"grjca train --out {config.out} --resume" in capsys.readouterr().out
    assert main(["train", "--out", str(config.out), "--resume"]) == 0
    assert_same_end(config.out, whole)


# Backends and processes


def test_curves_of_eager_and_fused_agree(config):
    """Both draw the same dropout masks, so only rounding separates the curves."""
    model = replace(small.MODEL, dropout=0.6)
    curves = {}
    for backend in ("eager", "reference", "auto"):
        here = replace(config, out=config.out.with_name(backend), backend=backend, model=model)
        train(here, progress=False)
        curves[backend] = [line["loss"] for line in read_metrics(here.out)]
    assert curves["reference"] == pytest.approx(curves["eager"], rel=1e-3)
    assert curves["auto"] == pytest.approx(curves["eager"], rel=1e-3)


def launch(*words):
    """Run a command of grjca in two processes, connected by gloo."""
    # Not --cpu: with that, accelerate starts a single process.
    options = ["--quiet", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "grjca", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def on_the_command_line(config, tmp_path, **options):
    """Return the command-line words for this config."""
    settings_file = tmp_path / "settings.yaml"
    files.write_text(settings_file, settings.to_yaml(replace(config, **options)))
    return ["train", "--config", str(settings_file)]


@pytest.mark.slow
def test_two_processes(config, tmp_path):
    """Both train; every frame is predicted once, and the metric is the one that a single process gets."""
    done = launch(*on_the_command_line(config, tmp_path, epochs=3, workers=1))
    assert done.returncode == 0, done.stderr
    assert "2 processes, 2 windows each" in done.stdout and done.stdout.count("epoch   3") == 1
    assert json.loads((config.out / "checkpoint" / "state.json").read_text())["environment"]["processes"] == 2
    assert len(read_metrics(config.out)) == 3
    best = tensor_files.read_about(config.out / runs.BEST)["ccc"]
    predictions = small.read_predictions(config.out / "predictions")
    assert {name: len(p) for name, p in predictions.items()} == small.LENGTHS["validate"]
    assert main(["evaluate", "--run", str(config.out), "--plots", "false"]) == 0
    alone = json.loads((config.out / "evaluation" / "validate" / "metrics.json").read_text())
    assert alone["overall"]["ccc"] == pytest.approx(best, abs=1e-6)

    done = launch("evaluate", "--run", str(config.out), "--plots", "false", "--out", str(tmp_path / "together"))
    assert done.returncode == 0, done.stderr
    together = json.loads((tmp_path / "together" / "metrics.json").read_text())
    assert together["overall"]["frames"] == alone["overall"]["frames"]
    assert together["overall"]["ccc"] == pytest.approx(alone["overall"]["ccc"], abs=1e-6)


@pytest.mark.slow
def test_two_processes_with_networks_in_the_loop(tmp_path):
    """Parts of them are released while both train: gradients of the new ones are exchanged too."""
    data = arrays.write_data(tmp_path / "data")
    networks = NetworksConfig(size="small", statistics="frozen", augment=False)
    schedule = {"warmup_epochs": 1, "plateau_epochs": 1, "plateau_factor": 1e-3, "learning_rate": 1e-5}
    config = TrainConfig(
        data, "valence", tmp_path / "together", source="arrays", window=8, hop=8, batch_size=2, epochs=7,
        model=replace(arrays.MODEL, dropout=0.0, encoder_dropout=0.0), networks=networks, tensorboard=False, **schedule,
    )  # fmt: skip
    done = launch(*on_the_command_line(config, tmp_path))
    assert done.returncode == 0, done.stderr
    lines = read_metrics(config.out)
    assert len({line["trained"] for line in lines}) > 1
    assert all(math.isfinite(line["ccc"]) for line in lines)
    assert main(["evaluate", "--run", str(config.out), "--plots", "false"]) == 0


@pytest.mark.slow
def test_two_processes_refuse_together(config, tmp_path):
    done = launch(*on_the_command_line(config, tmp_path, batch_size=5))
    assert done.returncode != 0 and "--batch_size: expected a multiple of the 2 processes, got 5" in done.stderr
    assert not config.out.exists()


def test_windows_read_by_other_processes_are_the_same(config, whole):
    train(replace(config, epochs=2, workers=1), progress=False)
    train(config, resume=True, progress=False)  # without them again
    assert_same_end(config.out, whole)


def test_one_process_a_folder(config):
    with files.lock(config.out.parent), pytest.raises(UserError, match="another process trains there"):
        train(replace(config, out=config.out.parent), resume=True, progress=False)
    assert [path.name for path in config.out.parent.iterdir()] == [files.LOCK]


@pytest.fixture(scope="module")
def learnable(tmp_path_factory):
    """Write synthetic data of a size that trains in seconds."""
    out = tmp_path_factory.mktemp("learnable") / "data"
    synth(SynthConfig(out=out, visual_features=64, audio_features=32, length=(150, 400)), progress=False)
    return out


def learn(data, out, target, backend="auto"):
    model = ModelConfig(
        modalities={"visual": 64, "audio": 32}, channels={"visual": (48, 48), "audio": (32, 32)}, hidden=48
    )
    options = {"window": 120, "hop": 80, "learning_rate": 1e-3, "warmup_epochs": 2, "tensorboard": False}
    return train(TrainConfig(data, target, out, epochs=12, backend=backend, model=model, **options), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.sampled(1)
def test_a_learnable_set_is_learnt(learnable, tmp_path, target):
    assert learn(learnable, tmp_path / "run", target).best_ccc >= 0.8


@pytest.mark.slow
@pytest.mark.exhaustive
def test_curves_agree_to_the_end_of_a_training(learnable, tmp_path):
    """Training amplifies rounding, by as much as two backends in plain PyTorch differ."""
    curves = {}
    for backend in ("eager", "reference", "auto"):
        learn(learnable, tmp_path / backend, "valence", backend)
        curves[backend] = np.array([[m["loss"], m["ccc"]] for m in read_metrics(tmp_path / backend)])
    rounding = np.abs(curves["eager"] - curves["reference"]).max()
    assert np.abs(curves["eager"] - curves["auto"]).max() <= 8 * max(rounding, 1e-6)
    assert rounding < 1e-2
