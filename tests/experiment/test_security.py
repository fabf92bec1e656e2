"""SECURITY.md's promises on files and folders: nothing is lost, nothing outside is touched, nothing bad gets in."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import native_attacks
import signals
import small
from grjca import files, settings
from grjca.cli import main
from grjca.config import TrainConfig
from grjca.training import runs
from grjca.training.train import train
from grjca_kernels import cpu

WIDTHS = ["--modalities", str(small.MODEL.widths)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make data and a training of one epoch."""
    root = tmp_path_factory.mktemp("made")
    data = small.write_data(root / "data")
    config = TrainConfig(data, "valence", root / "run", epochs=1, window=20, hop=12, batch_size=4, tensorboard=False)
    train(dataclasses.replace(config, model=small.MODEL), progress=False)
    return root


@pytest.fixture
def run(tmp_path: Path, made: Path) -> Path:
    """Copy the training and its data."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace(str(made), str(tmp_path)))
    return path.parent


@pytest.fixture
def data(run: Path) -> Path:
    return run.parent / "data"


@pytest.fixture
def said(capsys: pytest.CaptureFixture) -> Any:
    """Run a command that must fail within ten seconds, and return the one sentence that it says."""

    def say(*words: object, codes: tuple[int, ...] = (1,)) -> str:
        capsys.readouterr()
        start = time.perf_counter()
        try:
            got = main([str(word) for word in words])
        except SystemExit as exit:
            got = exit.code  # type: ignore[assignment]
        printed = capsys.readouterr().err
        assert got in codes, printed
        assert "Traceback" not in printed and printed.startswith(f"grjca {words[0]}: ")
        assert printed.count("\n") == 1 and len(printed) < 2000
        assert time.perf_counter() - start < 10
        return printed

    return say


def resume(run: Path) -> list[object]:
    return ["train", "--out", run, "--resume", "--epochs", 2]


def predict(run: Path, data: Path, out: Path) -> list[object]:
    return ["predict", "--run", run, "--data", data, "--split", "all", "--out", out]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- links


@pytest.mark.parametrize("name", ["checkpoint", "predictions", "tensorboard", ".lock"])
def test_a_link_in_a_run_is_refused(run: Path, tmp_path: Path, said: Any, name: str) -> None:
    outside = tmp_path / "outside"
    if (run / name).is_dir():
        (run / name).rename(outside)
    else:
        outside.mkdir()
        (run / name).unlink(missing_ok=True)
    (outside / "mine.safetensors").write_text("precious")
    (outside / "events.out.tfevents.1").write_text("precious")
    before = tree(outside)
    (run / name).symlink_to(outside if name != ".lock" else outside / "mine.safetensors")
    assert "expected no link" in said(*resume(run))
    assert tree(outside) == before


@pytest.mark.parametrize("name", ["evaluation", "evaluation/validate"])
def test_a_link_for_an_evaluation_is_refused(run: Path, tmp_path: Path, said: Any, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(outside)
    assert "expected no link" in said("evaluate", "--run", run)
    assert not list(outside.iterdir())
    assert main(["evaluate", "--run", str(run), "--out", str(run / name), "--plots", "false"]) == 0  # if asked for


def test_links_to_files_are_replaced_and_not_followed(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    for name in (".metrics.jsonl.partial", ".config.yaml.partial", ".best.safetensors.partial", "metrics.jsonl"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(target)
    assert main([str(word) for word in resume(run)]) == 0
    out = run / "evaluation" / "validate"
    out.mkdir(parents=True)
    (out / ".metrics.json.partial").symlink_to(target)
    assert main(["evaluate", "--run", str(run), "--plots", "false"]) == 0
    assert target.read_text() == "precious"
    assert not (run / "metrics.jsonl").is_symlink()


def test_what_is_written_meets_nothing_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write replaces nothing that was planted, even if the random name is guessed."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0" * 16)
    (tmp_path / "target").write_text("precious")
    (tmp_path / f".grjca-{'0' * 16}.partial").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        files.write_text(tmp_path / "file", "mine")
    assert (tmp_path / "target").read_text() == "precious"


# ---- what others have put there


def test_foreign_files_in_a_run_stay(run: Path) -> None:
    foreign = {
        "checkpoint/mine.safetensors",
        "checkpoint/epoch-0009.safetensors",
        "checkpoint/epoch-1.safetensors",
        "tensorboard/notes.txt",
        ".thesis.partial",
        "predictions/.mine.partial",
    }
    for name in foreign:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("precious")
    assert main([str(word) for word in [*resume(run), "--tensorboard", "true"]]) == 0
    assert all((run / name).read_text() == "precious" for name in foreign)


def test_what_killed_commands_leave_is_stepped_over(run: Path, data: Path) -> None:
    """Folders of killed predictions, of this version and others, and files of a killed training do no harm."""
    for name in (".pred.17.partial", f".grjca-{'1' * 16}.partial"):
        (run / name).mkdir()
        (run / name / "challenge.txt").write_text("half")
    half = [run / f".grjca-{'2' * 16}.partial", run / "checkpoint" / f".grjca-{'3' * 16}.partial"]
    for path in half:
        path.write_text("half")
    assert main([str(word) for word in resume(run)]) == 0
    assert not any(path.exists() for path in half)
    assert main([str(word) for word in predict(run, data, run / "pred")]) == 0


def test_one_evaluation_a_folder(run: Path, tmp_path: Path, said: Any) -> None:
    with files.alone(tmp_path, "evaluates"):
        assert "another process evaluates there" in said("evaluate", "--run", run, "--out", tmp_path)


# ---- names


ODD = ["b,0.5,0.5", "a\nb", "a\rb", "a\x1b[2Jb", "a\u2028b", 'a"b', "a\\b", " a", os.fsdecode(b"a\xffb"), "n" * 246]


@pytest.mark.parametrize("name", ODD, ids=ascii)
@pytest.mark.sampled(2)
def test_a_name_that_cannot_be_written_is_refused_first(run: Path, data: Path, said: Any, name: str) -> None:
    (data / "features" / "gamma").rename(data / "features" / name)
    (data / "annotations" / "validate" / "gamma.txt").rename(data / "annotations" / "validate" / f"{name}.txt")
    before = tree(run)
    assert "Its predictions could not be written" in said(*resume(run))
    assert "Its predictions could not be written" in said("evaluate", "--run", run)
    assert "Its predictions could not be written" in said(*predict(run, data, run.parent / "out"))
    assert tree(run) == before and not (run.parent / "out").exists()
    assert main(["doctor", "--speed", "false", "--data", str(data), *WIDTHS]) == 1


def test_names_that_can_be_written(run: Path, data: Path) -> None:
    names = ["n" * 245, "é" * 122, "a b", "a.b", "名" * 81, "a'b", "=1+2"]
    for name in names:
        shutil.copytree(data / "features" / "gamma", data / "features" / name)
        shutil.copy(data / "annotations" / "validate" / "gamma.txt", data / "annotations" / "validate" / f"{name}.txt")
    warnings.filterwarnings("ignore", "Glyph")  # of matplotlib's font
    assert main(["evaluate", "--run", str(run), "--plotted_videos", str(len(names) + 4)]) == 0
    assert all((run / "evaluation" / "validate" / f"video_{name}.png").is_file() for name in names)
    assert main([str(word) for word in predict(run, data, run.parent / "out")]) == 0
    assert all((run.parent / "out" / "predictions" / f"{name}.txt").is_file() for name in names)


def test_folders_that_cannot_be_written_to_are_refused_first(
    run: Path, data: Path, tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal of the system is a stub, because root may write anywhere."""

    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr("grjca.evaluation.predict.infer", lambda *_: pytest.fail("it has begun"))
    monkeypatch.setattr("grjca.evaluation.evaluate.infer", lambda *_: pytest.fail("it has begun"))
    for words in (["evaluate", "--run", run, "--out", tmp_path / "locked"], predict(run, data, tmp_path / "locked/x")):
        assert "cannot be made or written to" in said(*words)


# ---- bad files


def edited(**changes: Any) -> Any:
    """Return a function that gives state.json these entries."""

    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


VALUES: dict[str, list[Any]] = {
    "epoch": ["1", True, 10**30, 0, 2],
    "best_ccc": ["x", None, float("nan"), float("inf")],
    "best_epoch": ["x", 99, 10**30, -1],
    "environment": [{}, []],
    "plateau": [[1], None, {}, {"best": "x"}, {"step": 1}, {"best": float("inf")}],
    "history": ["abc", None, [], [1], ["a"], [{"epoch": "one"}], [{"epoch": 2}]],
    "optimizer": [[], [{"lr": "fast"}], None],
}
STATES = {
    **{f"{name} {value!r}": edited(**{name: value}) for name, values in VALUES.items() for value in values},
    "an unknown entry": edited(foo=1),
    "a list": lambda path: path.write_text("[]"),
    "200,000 brackets": lambda path: path.write_text("[" * 200_000),
    "5,000 digits": lambda path: path.write_text('{"epoch": ' + "1" * 5_000 + "}"),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "nothing": lambda path: path.write_text(""),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("change", STATES)
def test_a_bad_state(run: Path, said: Any, change: str) -> None:
    best = (run / runs.BEST).read_bytes()
    STATES[change](run / "checkpoint" / "state.json")
    assert "state.json" in said(*resume(run))
    assert (run / runs.BEST).read_bytes() == best


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("exp_avg", torch.zeros(1000)),
        ("step", torch.zeros(3)),
        ("step", torch.tensor(-1.0)),
        ("step", torch.tensor(True)),
        ("step", torch.tensor(torch.nan)),
    ],
)
def test_bad_moments(run: Path, said: Any, name: str, of: torch.Tensor) -> None:
    path = run / "checkpoint" / "epoch-0001.safetensors"
    save_file(load_file(path) | {f"optimizer.0.{name}": of}, path)
    assert "the checkpoint is damaged" in said(*resume(run))


@pytest.mark.parametrize("name", ["best.safetensors", "predictions/gamma.txt", "checkpoint/epoch-0002.safetensors"])
def test_folders_where_files_go(run: Path, said: Any, name: str) -> None:
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir(parents=True)
    assert "got a folder" in said(*resume(run))


def test_a_sparse_file_of_features(run: Path, data: Path, said: Any) -> None:
    with open(data / "features" / "gamma" / "visual.npy", "r+b") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (2**34, 6)})
        file.truncate(file.tell() + 2**34 * 6 * 4)
    said("evaluate", "--run", run)
    said(*predict(run, data, run.parent / "out"))


@pytest.mark.parametrize("text", ['{"epoch": 1e999}', "[" * 200_000, "[]", '"x"', "{", "NaN", '{"epoch": NaN}'])
def test_bad_metadata_of_weights(run: Path, said: Any, text: str) -> None:
    save_file(load_file(run / runs.BEST), run / runs.BEST, {"grjca": text})
    assert "best.safetensors" in said("evaluate", "--run", run)


def test_metadata_of_another_origin(run: Path) -> None:
    save_file(load_file(run / runs.BEST), run / runs.BEST, {"format": "pt"})
    assert main(["evaluate", "--run", str(run), "--plots", "false"]) == 0


def alias_bomb(value: str) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    return "\n".join([*lines, f"data: {value}"])


CONFIGS = {
    "alias bomb": alias_bomb("*a9"),
    "200,000 brackets": "data: " + "[" * 200_000,
    "a list": "[1, 2]",
    "a tab": "\tdata: x",
    "bytes": b"\xff\xfe\xff",
    "large": "# " + "x" * (2 << 20),
    "nothing": "",
    "code": "data: !!python/object/apply:os.system ['touch owned']",
    "a module": "data: x\ntarget: valence\nout: y\nmodel: hostile.Thing",
    "a class": "data: x\ntarget: valence\nout: y\nmodel: {class_path: hostile.Thing}",
    "a dotted class": "data: x\ntarget: valence\nout: y\nmodel.class_path: hostile.Thing",
    "itself": "config: config.yaml",
    "a tag": "data: x\ntarget: valence\nout: y\nseed: !!int ''",
    "a sexagesimal": "data: x\ntarget: valence\nout: y\nseed: " + "1" + ":0" * 100_000,
    "another file": "data: x\ntarget: valence\nout: y\nmodel: /dev/zero",
}
SIZES = [
    {"hidden": 10**10},
    {"hidden": 10**7, "channels": {"visual": [10**6]}},
    {"hidden": 10**30},
    {"hidden": -1},
    {"hidden": "many"},
    {"channels": {"visual": [10**10, 10**10]}},
    {"iterations": 10**6},
    {"kernel": 10**9},
    {"window": 10**6},
    {"window": 10**30},
    {"batch_size": 0},
    {"channels": {"visual": [7] * 29}},
    {"channels": {"visual": [7] * 64}},
    {"channels": {"smell": [7]}},
    {"modalities": {"visual": 6}},
    {"modalities": {"visual": 6, "../audio": 5}},
    {"modalities": {"visual": 10**30, "audio": 5}},
    {"warmup_epochs": 10**400},
    {"learning_rate": 1e300},
    {"workers": 10**6},
    {"dropout": float("nan")},
]


def commands(run: Path) -> list[list[object]]:
    """Return all commands that read the settings of a run."""
    data = run.parent / "data"
    evaluate = ["evaluate", "--run", run, "--data", data]
    return [resume(run), evaluate, predict(run, data, run.parent / "out"), ["train", "--config", run / "config.yaml"]]


@pytest.mark.parametrize("name", CONFIGS)
def test_bad_settings(run: Path, said: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = CONFIGS[name]
    (tmp_path / "hostile.py").write_text("open('owned', 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (run / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    for words in commands(run):
        said(*words, codes=(2,) if words[0] == "train" else (1,))
    (tmp_path / "model.yaml").write_bytes((run / "config.yaml").read_bytes())
    for model in (tmp_path / "model.yaml", "hostile.Thing", "{class_path: hostile.Thing}"):
        said("train", "--data", "x", "--target", "valence", "--out", "y", "--model", model, codes=(1, 2))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("change", SIZES, ids=str)
def test_sizes_that_no_machine_has(run: Path, said: Any, change: dict[str, Any]) -> None:
    path = run / "config.yaml"
    content = yaml.safe_load(path.read_text())
    for name, value in change.items():
        (content if name in content else content["model"])[name] = value
    path.write_text(yaml.safe_dump(content))
    for words in commands(run):
        if words[0] == "train" and words[1] == "--config":
            words += ["--out", run.parent / "another"]
        said(*words, codes=(1, 2))


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_files_that_never_end(run: Path, data: Path, said: Any, tmp_path: Path, kind: str) -> None:
    def replace(path: Path) -> None:
        path.unlink(missing_ok=True)
        os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")

    template = tmp_path / "template.txt"
    replace(template)
    assert "regular file" in said(*predict(run, data, tmp_path / "out"), "--template", template)
    weights = (run / runs.BEST).read_bytes()
    replace(run / runs.BEST)
    assert "regular file" in said("evaluate", "--run", run)
    (run / runs.BEST).unlink()
    (run / runs.BEST).write_bytes(weights)
    annotation = data / "annotations" / "validate" / "gamma.txt"
    text = annotation.read_text()
    replace(annotation)
    assert "regular file" in said("evaluate", "--run", run)
    assert main(["doctor", "--speed", "false", "--data", str(data), *WIDTHS]) == 1
    annotation.unlink()
    annotation.write_text(text)
    features = data / "features" / "gamma" / "audio.npy"
    replace(features)
    said("evaluate", "--run", run)
    replace(run / "config.yaml")
    assert "config.yaml" in said("evaluate", "--run", run)
    assert "config.yaml" in said("train", "--config", run / "config.yaml", codes=(2,))


def test_a_frame_of_5000_digits(run: Path, data: Path, said: Any, tmp_path: Path) -> None:
    (tmp_path / "template.txt").write_text(f"image_location\ngamma/{'1' * 5000}.jpg\n")
    assert "template.txt, line 2" in said(
        *predict(run, data, tmp_path / "out"), "--template", tmp_path / "template.txt"
    )


def test_an_annotation_of_implausible_size(run: Path, data: Path, said: Any) -> None:
    path = data / "annotations" / "validate" / "gamma.txt"
    with open(path, "r+b") as file:
        file.truncate(1 << 40)  # sparse: it takes no room
    assert "at most" in said("evaluate", "--run", run)


def test_metrics_of_another_make_are_left_alone(run: Path, said: Any) -> None:
    out = run / "evaluation" / "validate"
    out.mkdir(parents=True)
    for text in ("old", "[]", '{"videos": ["../../best.safetensors"]}', '{"videos": 3}'):
        (out / "metrics.json").write_text(text)
        assert "metrics.json" in said("evaluate", "--run", run)
        assert (out / "metrics.json").read_text() == text
    before = (run / runs.BEST).read_bytes()
    (out / "metrics.json").write_text('{"videos": {"/../../../best.safetensors": {}, "x/../../../../best": {}}}')
    assert main(["evaluate", "--run", str(run), "--plots", "false"]) == 0
    assert (run / runs.BEST).read_bytes() == before


# ---- native code


@pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
def test_native_code_reaches_no_memory_that_is_not_there() -> None:
    """The calls run in a separate process, whose crash would be a failure."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, native_attacks.__file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert int(done.stdout.split()[-2]) > 300


LONG_CALLS = """
import signal, time
import torch
from grjca_kernels import GatedRJCAFused
block = GatedRJCAFused(128, 96, 200, iterations=8, backend="cpu", output="concat")
x, y = torch.randn(120, 200, 128, requires_grad=True), torch.randn(120, 200, 96)
out = block(x, y)
signal.signal(signal.SIGALRM, signal.default_int_handler)

def stop(call):
    start = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        call()
        print("whole", time.perf_counter() - start)
    except KeyboardInterrupt:
        print("stopped", time.perf_counter() - start)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert torch.isfinite(block(x[:1].detach(), y[:1])).all()

for threads in (1, 2):
    torch.set_num_threads(threads)
    stop(lambda: block(x, y))
    stop(lambda: out.backward(torch.ones_like(out), retain_graph=True))
"""


@pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
def test_ctrl_c_ends_a_long_call() -> None:
    """Ctrl-C ends the forward and the backward, with one thread and with two."""
    done = subprocess.run([sys.executable, "-c", LONG_CALLS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 4 and all(how == "stopped" and float(seconds) < 1.1 for how, seconds in lines), done.stdout


# ---- signals


@pytest.mark.parametrize(
    "name, count", [("train", 2), ("evaluate", 1), ("predict", 1), ("prepare", 1), ("extract", 1), ("loop", 1)]
)
@pytest.mark.sampled(2)
def test_commands_that_are_stopped(name: str, count: int, tmp_path: Path) -> None:
    """Signals stop commands a few times; ``python tests/support/signals.py`` does so as often as it is told to."""
    signals.prepare(tmp_path)
    outcome = signals.endure(tmp_path, name, count, seed=7)
    assert not outcome.faults
    assert sum(outcome.codes.values()) == count


def test_settings_survive_a_round_trip(run: Path) -> None:
    config = settings.from_yaml(TrainConfig, run / "config.yaml")
    assert settings.to_yaml(config) == (run / "config.yaml").read_text()
    assert np.isfinite(config.learning_rate)


SWALLOWS = """
import sys, time
from pathlib import Path
import grjca.__main__ as program
from grjca import cli, files

def main():
    with files.whole_folder(Path(sys.argv[1])) as folder:
        while True:
            try:
                (folder / "some").mkdir(parents=True, exist_ok=True)
                (folder / "some" / "values.txt").write_text("valence")
                print("ready", flush=True)
                time.sleep(0.05)
            except BaseException:
                pass

cli.main, program.PATIENCE = main, 0.5
program.program()
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_a_library_swallows_leaves_nothing(number: int, code: int, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SWALLOWS, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code and list(tmp_path.iterdir()) == []
