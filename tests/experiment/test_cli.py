"""The command line: help is complete, and what is wrong is said in one sentence, without a traceback."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import small
from grjca import demo
from grjca.cli import COMMANDS, main

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can compute it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.write_data(tmp_path_factory.mktemp("data") / "data")


def said(capsys, words, code):
    """Run a command that must fail, and return the one sentence that it prints."""
    try:
        got = main(words)
    except SystemExit as exit:
        got = exit.code
    printed = capsys.readouterr()
    assert got == code and printed.out == "", printed
    assert printed.err.startswith(f"grjca {words[0]}: ") and "Traceback" not in printed.err
    assert printed.err.count("\n") == 1
    return printed.err


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_explains_every_option(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for field in fields(COMMANDS[name].settings):
        value = rf"(?:{field.name.upper()}|\{{\S+\}}|\[ITEM,...\]|CONFIG)"
        found = re.search(rf" --{field.name} {value}(?:, --\w+ \S+)? (?!--)(.)", printed)
        assert found and found[1] != "(", f"--{field.name} has no explanation"
    assert (name == "train") == ("--resume" in printed)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "COMMAND"),
        (["trian"], "trian"),
    ],
)
def test_no_such_command(words, match, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    printed = capsys.readouterr().err
    assert match in printed and printed.startswith("grjca: ") and printed.count("\n") == 1


TRAIN = ["train", "--target", "valence", "--out", "run", "--data", "nowhere"]


@pytest.mark.parametrize(
    ("words", "code", "match"),
    [
        (["train"], 2, "data, target, out"),
        ([*TRAIN, "--target", "joy"], 2, "--target: Expected one of 'valence', 'arousal'. Got value: joy"),
        ([*TRAIN, "--fusion", "lstm"], 2, "--fusion: .*'grjca'.*lstm"),
        ([*TRAIN, "--epochs", "many"], 2, "--epochs: .*int.*many"),
        ([*TRAIN, "--model.channels.visual", "[a]"], 2, "--model.channels: .*int.*a"),
        ([*TRAIN, "--speed", "11"], 2, "unrecognized arguments: --speed 11"),
        ([*TRAIN, "--config", "nowhere.yaml"], 2, "--config: .*nowhere.yaml"),
        ([*TRAIN, "--epochs", "0"], 1, "--epochs: expected a whole number above 0, got 0"),
        ([*TRAIN, "--hop", "301"], 1, "--hop: expected at most --window, 300, .* got 301"),
        ([*TRAIN, "--seed", "4294967296"], 1, "--seed: expected a whole number from 0 to .*got 4294967296"),
        (["evaluate", "--run", "x", "--backend", "xx"], 2, "--backend: Expected one of 'auto', .* Got value: xx"),
        ([*TRAIN, "--fold", "6"], 1, "--fold: expected 0 to 5, got 6"),
        (TRAIN, 1, "nowhere.*does not exist"),
        (["evaluate", "--run", "nowhere"], 1, "nowhere.*config.yaml"),
        (["predict", "--run", "nowhere", "--data", "nowhere", "--out", "out"], 1, "nowhere"),
        (["synth", "--out", "out", "--videos", "1"], 1, "--videos: expected at least 2, .* got 1"),
        (["synth", "--out", "out", "--weak", "2"], 1, "--weak: .*got 2"),
        (["synth", "--out", "out", "--weak_kind", "dull"], 2, "--weak_kind: .*dull"),
        (["study", "--out", "out", "--jobs", "0"], 1, "--jobs: .*got 0"),
    ],
)
def test_refusals(words, code, match, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(match, said(capsys, words, code))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["evaluate", "--run", "old"], 1),
        (["train", "--resume", "--out", "old"], 2),
        ([*TRAIN, "--config", "old/config.yaml"], 2),
        ([*TRAIN, "--model", "old/model.yaml"], 2),
        ([*TRAIN, "--model.audio_features", "64"], 2),
        ([*TRAIN, "--model.visual_channels=[3]"], 2),
    ],
)
def test_settings_that_have_been_replaced(words, code, capsys, tmp_path, monkeypatch):
    """Settings of an earlier version are refused with their new names; other unknown settings are not."""
    monkeypatch.chdir(tmp_path)
    old = Path("old")
    old.mkdir()
    model = "visual_features: 512\naudio_features: 128\nvisual_channels: [6]\naudio_channels: [4]\n"
    (old / "model.yaml").write_text(model)
    text = "data: nowhere\ntarget: valence\nout: old\nmodel:\n  " + model.strip().replace("\n", "\n  ")
    (old / "config.yaml").write_text(text + "\n")
    message = said(capsys, words, code)
    assert re.search(r"visual_features and audio_features are now model\.modalities, .* model\.channels, ", message)
    assert "are now" not in said(capsys, [*TRAIN, "--model.audio_colour", "64"], 2)


@pytest.mark.parametrize(
    ("option", "match"),
    [
        (["--model.dropout", "1"], "model.dropout: .*got 1"),
        (["--model.iterations", "17"], "model.iterations: .*got 17"),
        (["--model.modalities", "visual:7,audio:5"], r"visual\.npy.*7"),
        pytest.param(["--precision", "fp16"], "precision: .* got none", marks=without_gpu),
        (["--backend", "cuda"], "cuda"),
    ],
)
def test_refusals_of_settings_leave_no_folder(option, match, capsys, folder, tmp_path):
    out = tmp_path / "run"
    sizes = ["--model.modalities", "visual:6, audio:5", "--model.channels", "{visual: [4], audio: [4]}"]
    words = ["train", "--data", str(folder), "--target", "valence", "--out", str(out), "--epochs", "1"]
    assert re.search(match, said(capsys, [*words, *sizes, *option], 1))
    assert not out.exists()


def test_a_module_that_is_missing_is_named(capsys, monkeypatch, folder, tmp_path):
    monkeypatch.setitem(sys.modules, "grjca.training.train", None)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    words = ["evaluate", "--run", str(tmp_path)]
    monkeypatch.delitem(sys.modules, "grjca.evaluation.evaluate", raising=False)
    monkeypatch.delitem(sys.modules, "grjca.training.inference", raising=False)
    message = said(capsys, words, 1)
    assert "accelerate" in message and "[train]" in message


def test_console_script():
    done = subprocess.run([sys.executable, "-m", "grjca", "train"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("grjca train: ") and done.stdout == ""


def test_demo(tmp_path, monkeypatch, capsys):
    """The demo runs its real commands, at a size that takes seconds."""
    monkeypatch.setattr(demo, "SCHEDULE", ["--epochs", "1", "--window", "30", "--hop", "20", "--batch_size", "8"])
    real = demo.commands

    def smaller(out, seed):
        words = real(out, seed)
        words[0] = [*words[0], "--videos", "4", "--length", "[30, 50]"]
        words[3] = [*words[3], "--speed", "false"]
        return words

    monkeypatch.setattr(demo, "commands", smaller)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr().out
    for line in printed[printed.index("All of it is in") :].splitlines()[1:-1]:
        assert (tmp_path / "demo" / line.split()[0]).exists(), line
    assert list((tmp_path / "demo" / "run-valence" / "evaluation" / "validate").glob("video_*.png"))


def test_demo_stops_at_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "commands", lambda *_: [["evaluate", "--run", str(tmp_path)], ["doctor"]])
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 1
    assert "doctor" not in capsys.readouterr().out
