"""Commands that are stopped at random moments, and what has to be true afterwards.

``python tests/signals.py COMMAND COUNT`` sends COUNT signals to train, evaluate or predict, prints a line of JSON, and
fails if anything is not as SECURITY.md says.
"""

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from safetensors.torch import load_file

import small
from grjca import files, settings
from grjca.config import TrainConfig

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
STARTS = 0.06
"""Seconds until Python has begun to run the program; a signal before gets Python's own answer."""
EPOCHS = 4


@dataclass
class Command:
    """One that may be stopped and begun again until it is done."""

    name: str
    words: Callable[[Path], list[str]]
    """Of the folder that it works in."""
    made: Callable[[Path], Path]
    """What it makes there."""
    differs: tuple[str, ...] = ()
    """Names of files that are not the same each time."""


@dataclass
class Outcome:
    """Of many signals."""

    codes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def begin(words: list[str]) -> subprocess.Popen[str]:
    """The command, as from a shell; one thread, so that equal means equal."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell, and inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        [sys.executable, "-m", "grjca", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def stopped(words: list[str], number: int, moment: float) -> tuple[int, str]:
    """Exit code and all that was printed, of a command that gets a signal after ``moment`` seconds."""
    process = begin(words)
    time.sleep(moment)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err


def content(folder: Path) -> dict[str, bytes]:
    """Of all files, by their names; without times, the digest of them, and what a killed command may leave."""
    return {
        str(path.relative_to(folder)): b"".join(
            line for line in path.read_bytes().splitlines() if b'"seconds"' not in line and b'"sha256"' not in line
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != files.LOCK and not any(map(files.is_partial, [path, *path.parents]))
    }


def half_written(folder: Path) -> Iterator[Path]:
    """Files with a final name that cannot be read from beginning to end."""
    for path in folder.rglob("*"):
        if not path.is_file() or any(map(files.is_partial, [path, *path.parents])):
            continue
        try:
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                assert all(json.loads(line)["epoch"] for line in path.read_text().splitlines())
            elif path.suffix == ".yaml":
                settings.from_yaml(TrainConfig, path)
            elif path.suffix == ".txt":
                lines = path.read_text().splitlines()
                assert path.read_text().endswith("\n") and len({line.count(",") for line in lines}) == 1
            elif path.suffix == ".png":
                assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
        except Exception:
            yield path


def commands(root: Path) -> list[Command]:
    """The three, on the data and the run in ``root``."""
    data, run = root / "data", root / "run"
    return [
        Command(
            "train",
            lambda here: ["train", "--config", str(root / "train.yaml"), "--out", str(here / "new"), "--resume"],
            lambda here: here / "new",
            ("config.yaml",),
        ),
        Command(
            "evaluate",
            lambda here: ["evaluate", "--run", str(run), "--out", str(here / "new")],
            lambda here: here / "new",
        ),
        Command(
            "predict",
            lambda here: ["predict", "--run", str(run), "--data", str(data), "--split", "all", "--out", f"{here}/new"],
            lambda here: here / "new",
        ),
    ]


def prepare(root: Path) -> None:
    """Data, a run, and the settings of a training."""
    data = small.write_data(root / "data")
    run = small.write_run(root / "run", data)
    config = TrainConfig(
        data, "valence", root / "nowhere", epochs=EPOCHS, window=small.WINDOW, hop=small.HOP, batch_size=4
    )
    config = replace(config, learning_rate=1e-2, tensorboard=False, model=small.MODEL)
    content_of = yaml.safe_load(settings.to_yaml(config))
    del content_of["out"]
    (root / "train.yaml").write_text(yaml.safe_dump(content_of))
    assert run.is_dir()


def endure(root: Path, command: Command, count: int, seed: int, each: int = 5) -> Outcome:
    """``count`` signals: ``each`` to one folder, then the command to its end, which must be that of the undisturbed."""
    moments, outcome, sent = random.Random(f"{command.name} {seed}"), Outcome(), 0
    whole = root / f"{command.name}-whole"
    whole.mkdir()
    seconds = 0.0
    for _ in range(1 if count < 10 else 2):  # the first reads everything from disk
        shutil.rmtree(command.made(whole), ignore_errors=True)
        start = time.perf_counter()
        process = begin(command.words(whole))
        _, err = process.communicate()
        assert process.returncode == 0, err
        seconds = time.perf_counter() - start
    expected = content(command.made(whole))
    around = {name: content(root / name) for name in ("data", "run")}
    attempt = 0
    while sent < count:
        here = root / f"{command.name}-{attempt}"
        attempt += 1
        (here / "beside").mkdir(parents=True)
        (here / "beside" / "mine.txt").write_text("precious\n")
        for _ in range(min(each, count - sent)):
            number = moments.choice(list(CODES))
            moment = moments.uniform(STARTS, 1.05 * seconds)
            code, printed = stopped(command.words(here), number, moment)
            sent += 1
            outcome.codes[f"{signal.Signals(number).name} {code}"] += 1
            what = f"{command.name}, {signal.Signals(number).name} after {moment:.3f} s"
            already = command.name == "predict" and command.made(here).exists()
            if code not in (0, CODES[signal.Signals(number)]) and not (already and code == 1):
                outcome.faults.append(f"{what}: ended with {code}: {printed[-500:]}")
            if "Traceback" in printed or "Exception ignored" in printed:
                outcome.faults.append(f"{what}: {printed[-2000:]}")
            outcome.faults += [f"{what}: {path} is half-written" for path in half_written(here)]
            for path in [path for path in here.rglob("*") if files.is_partial(path)]:
                if number != signal.SIGKILL:
                    outcome.faults.append(f"{what}: left {path}")
                if path.is_dir():  # as predict leaves it; nothing deletes it
                    shutil.rmtree(path)
        if command.name != "predict" or not command.made(here).exists():
            process = begin(command.words(here))
            out, err = process.communicate()
            if process.returncode != 0:
                outcome.faults.append(f"{command.name}: does not go on: {out}{err}")
        ours = content(command.made(here))
        outcome.faults += [
            f"{command.name}: {name} differs in {here}"
            for name in ours.keys() | expected.keys()
            if ours.get(name) != expected.get(name) and name not in command.differs
        ]
        if {path.name for path in here.iterdir()} != {"beside", "new"} or any(map(files.is_partial, here.rglob("*"))):
            outcome.faults.append(f"{command.name}: left {sorted(path.name for path in here.rglob('*'))}")
    for name, before in around.items():
        if content(root / name) != before:
            outcome.faults.append(f"{command.name}: {name} has changed")
    return outcome


def main(name: str, count: int) -> int:
    """1 if there are faults."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root)
        outcome = endure(root, next(command for command in commands(root) if command.name == name), count, seed=18)
    print(json.dumps({"command": name, "signals": count, **vars(outcome)}, indent=1))
    return bool(outcome.faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
