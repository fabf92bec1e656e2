"""Commands that are stopped at random moments, and what has to be true afterwards.

``python tests/support/signals.py COMMAND COUNT`` sends COUNT signals to a command of :data:`COMMANDS`, prints what came
of them in JSON, and fails if a promise of SECURITY.md was broken. The command loop is train with the networks in the
loop."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

import arrays
import small
from grjca import files, settings
from grjca.config import NetworksConfig, SynthConfig, TrainConfig
from grjca.data.synth import synth

COMMANDS = ("train", "evaluate", "predict", "prepare", "extract", "loop")
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
STARTS = 0.06
"""Seconds until Python runs the program. Before that, Python itself answers a signal."""
PER_FOLDER = 5
"""Signals that the command gets in one folder, before it may run to its end there."""


@dataclass
class Outcome:
    """The outcome of many signals."""

    codes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def prepare(root: Path) -> None:
    """Write data, a run, and the settings of a training into ``root``."""
    data = small.write_data(root / "data")
    small.write_run(root / "run", data)
    sizes = {"epochs": 4, "window": small.WINDOW, "hop": small.HOP, "batch_size": 4, "learning_rate": 1e-2}
    train = TrainConfig(data, "valence", root, tensorboard=False, model=small.MODEL, **sizes)
    synth(SynthConfig(out=root / "footage", layout="footage", videos=3, length=(6, 9)), progress=False)
    sizes |= {"epochs": 2, "window": 8, "hop": 8}
    networks = NetworksConfig(size="small")
    loop = replace(
        train, data=arrays.write_data(root / "arrays"), source="arrays", model=arrays.MODEL, networks=networks, **sizes
    )
    for name, config in (("train", train), ("loop", loop)):
        content = yaml.safe_load(settings.to_yaml(config))
        del content["out"]
        (root / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def words(name: str, root: Path, out: Path) -> list[str]:
    """The command line of a command that makes the folder ``out`` from what :func:`prepare` has written."""
    footage = root / "footage"
    of_command = {
        "train": ["train", "--config", root / "train.yaml", "--resume"],
        "evaluate": ["evaluate", "--run", root / "run"],
        "predict": ["predict", "--run", root / "run", "--data", root / "data", "--split", "all"],
        "prepare": ["prepare", "--videos", footage / "videos", "--faces", footage / "cropped_aligned"],
        "extract": ["extract", "--data", root / "arrays", "--size", "small"],
        "loop": ["train", "--config", root / "loop.yaml", "--resume"],
    }[name]
    return [*map(str, of_command), "--out", str(out)]


def begin(arguments: list[str]) -> subprocess.Popen[str]:
    """Start a command with one thread, so that its results are equal to the last bit."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell has it ignored in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", "grjca", *arguments], stdout=pipe, stderr=pipe, text=True, env=environment
    )


def content(folder: Path) -> dict[str, bytes]:
    """The content of every file by its name, without the lines that hold times, and without locks and leftovers."""
    return {
        str(path.relative_to(folder)): b"".join(
            line for line in path.read_bytes().splitlines() if b'"seconds"' not in line
        )
        for path in folder.rglob("*")
        if path.is_file() and path.name != files.LOCK and not any(map(files.is_partial, [path, *path.parents]))
    }


def after(name: str, number: int, arguments: list[str], moment: float, here: Path) -> Iterator[str]:
    """Send a signal to a command after ``moment`` seconds. The exit code comes first, and then the faults."""
    made = name == "predict" and (here / "new").exists()  # predict refuses a folder that is there
    killed = set(filter(files.is_partial, here.rglob("*")))  # SIGKILL left these, and this command may not reach them
    process = begin(arguments)
    time.sleep(moment)
    process.send_signal(number)
    printed = "".join(process.communicate(timeout=60))
    yield f"{signal.Signals(number).name} {process.returncode}"
    if process.returncode not in (0, CODES[signal.Signals(number)], *([1] if made else [])):
        yield f"it ended with {process.returncode}: {printed[-500:]}"
    if "Traceback" in printed or "Exception ignored" in printed:
        yield printed[-2000:]
    for path in small.half_written(here):
        yield f"{path} is half-written"
    for path in list(filter(files.is_partial, here.rglob("*"))):
        if number != signal.SIGKILL and path not in killed:
            yield f"it left {path}"
        if path.is_dir():  # no command deletes what predict leaves when it is killed
            shutil.rmtree(path)


def endure(root: Path, name: str, count: int, seed: int) -> Outcome:
    """Stop a command ``count`` times; it must end up with what it makes undisturbed, and touch nothing else."""
    moments, outcome = random.Random(f"{name} {seed}"), Outcome()
    for whole in [root / "cold", root / "whole"][count < 10 :]:  # the first one reads everything from disk
        start = time.perf_counter()
        process = begin(words(name, root, whole))
        _, said = process.communicate()
        assert process.returncode == 0, said
        seconds = time.perf_counter() - start
    around = {part: content(root / part) for part in ("data", "run", "arrays", "footage")}
    for first in range(0, count, PER_FOLDER):
        here = root / f"stopped-{first}"
        here.mkdir()
        (here / "mine.txt").write_text("valence\n")
        arguments = words(name, root, here / "new")
        for _ in range(min(PER_FOLDER, count - first)):
            number, moment = moments.choice(list(CODES)), moments.uniform(STARTS, 1.05 * seconds)
            code, *faults = after(name, number, arguments, moment, here)
            outcome.codes[code] += 1
            outcome.faults += [f"{signal.Signals(number).name} after {moment:.3f} s: {fault}" for fault in faults]
        if name != "predict" or not (here / "new").exists():
            process = begin(arguments)
            printed = "".join(process.communicate())
            outcome.faults += [f"it does not go on: {printed}"] * (process.returncode != 0)
        ours, expected = content(here / "new"), content(root / "whole")
        names = (ours.keys() | expected.keys()) - {"config.yaml"}  # which has the name of the folder in it
        outcome.faults += [f"{one} differs" for one in names if ours.get(one) != expected.get(one)]
        left = {path.name for path in here.iterdir()} - {"new", "mine.txt"}
        outcome.faults += [f"it left {path}" for path in [*left, *filter(files.is_partial, here.rglob("*"))]]
    outcome.faults += [f"{part} has changed" for part, before in around.items() if content(root / part) != before]
    return outcome


def main(name: str, count: int) -> int:
    """1 if there are faults."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        outcome = endure(Path(folder), name, count, seed=18)
    print(json.dumps({"command": name, "signals": count, **vars(outcome)}, indent=1))
    return bool(outcome.faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
