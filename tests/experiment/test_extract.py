"""grjca extract: the features of arrays, the record of what made them, and what a killed extraction leaves."""

import hashlib
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest import mark

from grjca import backbones, files
from grjca.cli import main
from grjca.config import ExtractConfig
from grjca.data.videos import load
from grjca.errors import UserError
from grjca.model.extract import NAME, about, extract, random_networks

LENGTHS = {"train": {"alpha": 5, "beta_left": 1}, "validate": {"gamma": 7}, "test": {"omega": 3}}
FRAMES = {name: n for lengths in LENGTHS.values() for name, n in lengths.items()}
NAMES = list(FRAMES)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    """Write arrays as grjca prepare does."""
    generator = np.random.default_rng(0)
    for split, lengths in LENGTHS.items():
        for name, n in lengths.items():
            video = tmp_path / "data" / "npy_data" / name
            video.mkdir(parents=True)
            np.save(video / "video.npy", generator.integers(0, 256, (n, 48, 48, 3), dtype=np.uint8))
            np.save(video / "logmel.npy", generator.normal(size=(n, 96, 64)).astype(np.float16))
            labels = np.tanh(generator.normal(size=(n, 2))).round(3)
            np.save(video / "VA_continuous_label.npy", labels if split != "test" else np.full((n, 2), -5.0))
            if split != "test":
                (tmp_path / "data" / "annotations" / split).mkdir(parents=True, exist_ok=True)
                rows = "".join(f"{v:g},{a:g}\r\n" for v, a in labels)
                path = tmp_path / "data" / "annotations" / split / f"{name}.txt"
                path.write_bytes(f"valence,arousal\r\n{rows}".encode())
    return tmp_path / "data"


def configure(folder, out="out", **options):
    return ExtractConfig(**{"data": folder, "out": folder.parent / out, "size": "small", "batch_size": 4} | options)


def words(folder, out="out", *more):
    few = ["--size", "small", "--batch_size", "4", "--device", "cpu"]
    return ["extract", "--data", str(folder), "--out", str(folder.parent / out), *few, *map(str, more)]


def tree(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != files.LOCK
    }


def video(folder, name, kind):
    return np.load(folder / "npy_data" / name / {"visual": "video.npy", "audio": "logmel.npy"}[kind])


def plain(kind):
    """Stand in for a network: return a few numbers of each row."""

    def function(rows):
        return rows.flatten(1)[:, :3].float() * {"visual": 1, "audio": 2}[kind]

    return function


PLAIN = {kind: plain(kind) for kind in ("visual", "audio")}


# ---- features


def test_features_are_what_the_networks_make_of_arrays(folder, capsys):
    assert main(words(folder, "out", "--seed", 5)) == 0
    out = folder.parent / "out"
    printed = capsys.readouterr().out
    assert "Random weights (seed 5): visual, audio" in printed and "features of 4 of 4 videos" in printed
    torch.manual_seed(5)
    face = backbones.make("visual", "small").eval()
    torch.manual_seed(5)
    voice = backbones.make("audio", "small").eval()
    with torch.no_grad():
        for name in NAMES:
            expected = {
                "visual": face(backbones.crop(torch.from_numpy(video(folder, name, "visual")))),
                "audio": voice(torch.from_numpy(video(folder, name, "audio")).float()),
            }
            for kind, rows in expected.items():
                ours = np.load(out / "features" / name / f"{kind}.npy")
                assert ours.dtype == np.float32 and np.allclose(ours, rows.numpy(), atol=1e-5)


def test_it_makes_a_data_folder(folder):
    extract(configure(folder), progress=False)
    out = folder.parent / "out"
    assert {path.name for path in out.iterdir()} == {"annotations", "features", NAME, files.LOCK}
    for split in ("train", "validate", "test"):
        ours, theirs = load(out, split), load(folder, split, kind="arrays")
        assert [(v.name, v.length, v.notes) for v in ours] == [(v.name, v.length, ()) for v in theirs]
        assert all(
            np.array_equal(a.labels, b.labels) for a, b in zip(ours, theirs, strict=True) if a.labels is not None
        )
    text = Path("annotations", "validate", "gamma.txt")
    assert (out / text).read_bytes() == (folder / text).read_bytes()


def test_labels_that_are_in_npy_data_alone(folder):
    shutil.rmtree(folder / "annotations")
    for split, lengths in LENGTHS.items():
        for name in lengths:
            (folder / "npy_data" / split).mkdir(exist_ok=True)
            (folder / "npy_data" / name).rename(folder / "npy_data" / split / name)
    assert extract(configure(folder), networks=PLAIN, progress=False) == 0
    for split in ("train", "validate"):
        ours = load(folder.parent / "out", split, widths={"visual": 3, "audio": 3})
        theirs = load(folder, split, kind="arrays")
        assert all(np.array_equal(a.labels, b.labels) for a, b in zip(ours, theirs, strict=True))


def test_weights_from_a_file(folder, capsys):
    torch.manual_seed(9)
    network = backbones.make("audio", "small")
    path = folder.parent / "voice.pth"
    torch.save({f"spatial.audio.backbone.{key}": tensor for key, tensor in network.state_dict().items()}, path)
    assert main(words(folder, "out", "--audio", path)) == 0
    out = folder.parent / "out"
    assert "Random weights (seed 0): visual, for which" in capsys.readouterr().out
    assert random_networks(out) == ["visual"]
    assert about(out)["audio"] == {
        "network": "VGGish", "size": "small", "weights": "voice.pth",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }  # fmt: skip
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy(video(folder, "gamma", "audio")).float())
    assert np.allclose(np.load(out / "features" / "gamma" / "audio.npy"), expected.numpy(), atol=1e-5)


def test_what_is_noted(folder):
    assert about(folder) is None and random_networks(folder) == []
    extract(configure(folder, seed=3), networks={"audio": PLAIN["audio"]}, progress=False)
    noted = about(folder.parent / "out")
    assert noted.pop("versions")["torch"]
    assert noted == {
        "visual": {"network": "IR50", "size": "small", "weights": "random", "seed": 3, "crop": "centre"},
        "audio": {"network": "test_extract.plain.<locals>.function", "weights": None},
        "batch_size": 4,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    assert random_networks(folder.parent / "out") == ["visual"]


@mark.parametrize("text", ["[]", '{"visual": {}}', '{"visual": 1, "audio": {}}', "{"])
def test_a_damaged_note(folder, text):
    (folder / NAME).write_text(text)
    with pytest.raises(UserError, match=rf"{NAME}: expected"):
        about(folder)


# ---- other networks


def test_functions_take_the_place_of_networks(folder):
    seen = []

    def faces(rows):
        seen.append((rows.dtype, tuple(rows.shape), torch.is_grad_enabled()))
        return rows.numpy().reshape(len(rows), -1)[:, :5].astype(np.float64)

    def voices(rows):
        seen.append((rows.dtype, tuple(rows.shape), torch.is_grad_enabled()))
        return rows.sum(dim=2)

    assert extract(configure(folder, device="cpu"), networks={"visual": faces, "audio": voices}, progress=False) == 0
    out = folder.parent / "out" / "features" / "gamma"
    assert np.array_equal(np.load(out / "visual.npy"), video(folder, "gamma", "visual").reshape(7, -1)[:, :5])
    assert np.allclose(np.load(out / "audio.npy"), video(folder, "gamma", "audio").astype(float).sum(2), atol=1e-4)
    assert {shape[0] for _, shape, _ in seen} <= {1, 3, 4} and not any(enabled for *_, enabled in seen)
    assert {(dtype, shape[1:]) for dtype, shape, _ in seen} == {
        (torch.uint8, (48, 48, 3)),
        (torch.float32, (96, 64)),
    }


@mark.parametrize(("function", "match"), [
    (lambda rows: rows, r"gamma: visual: expected features \[4, d\] from the network, got \[4, 48, 48, 3\]"),
    (lambda rows: rows[:1].flatten(1), r"expected features \[4, d\] from the network, got \[1, 6912\]"),
    (lambda rows: torch.zeros(len(rows), len(rows)), r"gamma: visual: expected features \[3, 4\] .* got \[3, 3\]"),
    (lambda rows: torch.full((len(rows), 2), torch.nan), r"gamma: visual, frame 0 .*: expected finite features"),
])  # fmt: skip
def test_functions_that_do_not_give_features(folder, function, match, capsys):
    assert extract(configure(folder), networks={**PLAIN, "visual": function}, progress=False) == 1
    assert re.search(match, capsys.readouterr().err)
    assert not (folder.parent / "out" / "features" / "gamma").exists()


def test_functions_that_cannot_be(folder):
    with pytest.raises(UserError, match="networks: expected visual and audio, got 'text'"):
        extract(configure(folder), networks={"text": PLAIN["visual"]})
    with pytest.raises(UserError, match="--visual: expected no file, because a function takes the network's place"):
        extract(configure(folder, visual=folder / "x.pth"), networks=PLAIN)
    assert not (folder.parent / "out").exists()


@mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_the_example_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["extract_with_torchvision.py", "data", "out"])
    with pytest.raises(SystemExit, match="pip install torchvision"):
        runpy.run_path(str(ROOT / "examples" / "extract_with_torchvision.py"), run_name="__main__")


# ---- going on


def slow(rows):
    time.sleep(0.004)
    return rows.flatten(1)[:, :3].float()


def extract_slowly(config):
    torch.set_num_threads(1)
    extract(config, networks={"visual": slow, "audio": slow}, progress=False)


@mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_killed_ten_times_it_ends_as_if_undisturbed(folder):
    config = configure(folder, batch_size=1, device="cpu")
    start = time.perf_counter()
    extract_slowly(configure(folder, "whole", batch_size=1, device="cpu"))
    seconds = time.perf_counter() - start
    moments, out, killed = random.Random(0), folder.parent / "out", 0
    for _ in range(10):
        process = multiprocessing.get_context("fork").Process(target=extract_slowly, args=(config,))
        process.start()
        process.join(moments.uniform(0, 0.7 * seconds))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        done = list((out / "features").glob("[!.]*"))
        for path in done:
            expected = dict.fromkeys(("visual.npy", "audio.npy"), FRAMES[path.name])
            assert {part.name: len(np.load(part)) for part in path.iterdir()} == expected
        if len(done) > 2:
            shutil.rmtree(out)
    assert killed > 5
    extract_slowly(config)
    assert tree(out) == tree(folder.parent / "whole")
    assert not list(out.rglob("*.partial"))


def test_a_signal_ends_the_command(folder):
    """A signal ends the command, and the next extraction continues from there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "grjca", *words(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out = folder.parent / "out"
    while not (out / NAME).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    printed = "".join(process.communicate())
    assert process.returncode in (143, 0) and "Traceback" not in printed
    assert not list(out.rglob("*.partial"))
    assert main(words(folder)) == 0 and len(list((out / "features").iterdir())) == len(NAMES)


def test_videos_that_are_done_are_not_computed_again(folder):
    assert extract(configure(folder), networks=PLAIN, progress=False) == 0
    before = tree(folder.parent / "out")
    (folder.parent / "out" / "features" / f".grjca-{'1' * 16}.partial").mkdir()
    shutil.rmtree(folder.parent / "out" / "features" / "gamma")
    calls = []
    counting = {kind: lambda rows, kind=kind: (calls.append(len(rows)), PLAIN[kind](rows))[1] for kind in PLAIN}
    for function in counting.values():
        function.__module__, function.__qualname__ = __name__, PLAIN["visual"].__qualname__
    assert extract(configure(folder), networks=counting, progress=False) == 0
    assert sum(calls) == 2 * 7 and tree(folder.parent / "out") == before
    assert sorted(path.name for path in (folder.parent / "out" / "features").iterdir()) == sorted(NAMES)


@mark.parametrize("change", [{"batch_size": 3}, {"seed": 1}, {"size": "released"}])
def test_other_settings_are_refused(folder, change, monkeypatch):
    extract(configure(folder), progress=False)
    before = tree(folder.parent / "out")
    make = backbones.make
    monkeypatch.setattr(backbones, "make", lambda name, size: make(name, "small"))  # the released ones take seconds
    with pytest.raises(UserError, match=r"was begun with .*; choose another folder, or the same settings to go on"):
        extract(configure(folder, **change), progress=False)
    assert tree(folder.parent / "out") == before


def test_one_extraction_a_folder(folder):
    config = configure(folder)
    extract(config, networks=PLAIN, progress=False)
    with files.alone(config.out, "extracts"), pytest.raises(UserError, match="another process extracts there"):
        extract(config, networks=PLAIN, progress=False)


# ---- what is bad


def spoil(path, kind):
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif kind == "pickled":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    elif kind == "shape":
        np.save(path, np.zeros((3, 5), np.uint8))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "sparse":
        with open(path, "r+b") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (2**30, 48, 48, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 2**30 * 48 * 48 * 3)
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "device":
        path.unlink()
        path.symlink_to("/dev/zero")


@mark.parametrize("kind", ["missing", "truncated", "pickled", "shape", "empty", "sparse", "pipe", "device"])
def test_a_bad_video_does_not_stop_the_others(folder, kind, capsys):
    path = folder / "npy_data" / "gamma" / "video.npy"
    kept = path.read_bytes()
    spoil(path, kind)
    config = configure(folder)
    assert extract(config, networks=PLAIN) == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and str(path) in printed.err and "3 of 4 videos" in printed.out
    assert {p.name for p in (config.out / "features").iterdir()} == set(NAMES) - {"gamma"}
    with pytest.raises(UserError, match=r"gamma\.txt has no features"):
        load(config.out, "validate", widths={"visual": 3, "audio": 3})
    path.unlink(missing_ok=True)
    path.write_bytes(kept)
    assert extract(config, networks=PLAIN, progress=False) == 0


def test_patches_that_are_not_finite(folder, capsys):
    path = folder / "npy_data" / "gamma" / "logmel.npy"
    patches = np.load(path)
    patches[2, 0, 0] = np.inf
    np.save(path, patches)
    assert extract(configure(folder), networks=PLAIN, progress=False) == 1
    assert f"{path}, frame 2" in capsys.readouterr().err


def test_features_of_other_arrays_are_not_taken_for_done(folder, capsys):
    config = configure(folder)
    extract(config, networks=PLAIN, progress=False)
    path = config.out / "features" / "gamma"
    (path / "visual.npy").write_bytes(b"")
    np.save(config.out / "features" / "alpha" / "audio.npy", np.zeros((2, 3), np.float32))
    shutil.rmtree(config.out / "features" / "omega")
    (config.out / "features" / "omega").symlink_to(folder)
    assert extract(config, networks=PLAIN, progress=False) == 1
    printed = capsys.readouterr().err
    assert "gamma/visual.npy: expected features of 7 frames, got a broken file; delete the folder" in printed
    assert "alpha/audio.npy: expected features of 5 frames, got 2 frames" in printed
    assert "omega/visual.npy: expected features of 3 frames, got something else" in printed


@mark.parametrize("name", ["features", "annotations", "annotations/train", NAME, files.LOCK])
def test_a_link_is_refused(folder, name):
    config, outside = configure(folder), folder.parent / "outside"
    extract(config, networks=PLAIN, progress=False)
    outside.mkdir()
    (config.out / name).rename(outside / "it")
    (config.out / name).symlink_to(outside / "it")
    shutil.rmtree(config.out / "features" / "gamma")
    before = tree(outside)
    with pytest.raises(UserError, match="expected no link, got one"):
        extract(config, networks=PLAIN, progress=False)
    assert tree(outside) == before


def test_folders_that_cannot_be_used(folder):
    (folder.parent / "mine").mkdir()
    (folder.parent / "mine" / "thesis.txt").write_text("precious")
    (folder.parent / "file").write_text("precious")
    for out, match in (
        ("mine", f"mine holds something, but no {NAME}"),
        ("file", "expected a folder or nothing, got a file"),
        ("data", "expected another folder than --data"),
    ):
        before = tree(folder.parent)
        with pytest.raises(UserError, match=match):
            extract(configure(folder, out), progress=False)
        assert tree(folder.parent) == before and not list((folder.parent / "mine").glob(".*"))


@mark.parametrize(("more", "code", "match"), [
    (["--device", "abacus"], 1, "--device: expected one that is here, as cpu or cuda:0, got abacus"),
    (["--batch_size", "0"], 1, "--batch_size: expected a whole number from 1"),
    (["--batch_size", "900000000"], 1, "a batch of 900000000 frames"),
    (["--seed", "-1"], 1, "--seed: expected a whole number from 0"),
    (["--size", "large"], 2, "one of"),
    (["--visual", "none.pth"], 1, "none.pth: expected a checkpoint, got no such file"),
    (["--data", "nowhere"], 1, "nowhere does not exist"),
])  # fmt: skip
def test_bad_settings(folder, more, code, match, capsys):
    try:
        got = main(words(folder, "out", *more))
    except SystemExit as exit:
        got = exit.code
    printed = capsys.readouterr().err
    assert got == code and match in printed and printed.count("\n") == 1
    assert not (folder.parent / "out").exists()


def test_a_name_that_cannot_be_written(folder, capsys):
    (folder / "npy_data" / "omega").rename(folder / "npy_data" / "o,\x1bm")
    assert extract(configure(folder), networks=PLAIN, progress=False) == 1
    printed = capsys.readouterr().err
    assert "o,\\x1bm" in printed and "\x1b" not in printed
    assert json.loads((folder.parent / "out" / NAME).read_text())["batch_size"] == 4
