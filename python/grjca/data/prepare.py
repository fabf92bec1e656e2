"""``grjca prepare``: convert videos, cropped faces and annotations to the arrays that the networks read.

    annotations/{train,validate}/<video>.txt
    npy_data/<video>/                           arrays and footage.json; see footage.py
    prepared.json                               settings and, when done, the outcome of every video
    .lock                                       held by the process that prepares there

The folder of a video appears only once it is complete, and a video that has one is not made again, so that an
interrupted run can continue.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from grjca import files
from grjca.config import PrepareConfig
from grjca.data import faces, footage, isolated, reading, sources
from grjca.data.layout import OFFICIAL
from grjca.data.sources import Found, Task
from grjca.errors import UserError, printable

REPORT, ARRAYS, ANNOTATIONS = "prepared.json", "npy_data", "annotations"
SHOWN = 10
"""Number of failures that the terminal shows; the report lists all of them."""


def prepare(config: PrepareConfig) -> int:
    """Make the missing videos; return the exit code, 1 if a video could not be made.

    Raises:
        UserError: if folders cannot be read or are empty, or ``config.out`` holds something else.
    """
    if config.detect:
        faces.check_detector()
    found = sources.find(config)
    _check(config)
    files.make_folder(config.out)
    with files.alone(config.out, "prepares data"):
        _remove_partial(config.out)
        if not (config.out / REPORT).exists():
            files.write_json(config.out / REPORT, {"settings": _settings(config)})
        made: dict[str, dict[str, Any]] = {}
        failures = dict(found.failures)
        try:
            for task, outcome in _outcomes(config, found.tasks):
                if isinstance(outcome, UserError):
                    failures[task.name] = str(outcome)
                else:
                    made[task.name] = outcome
        finally:
            _remove_partial(config.out)
        report = {
            "settings": _settings(config),
            "videos": dict(sorted(made.items())),
            "failures": dict(sorted(failures.items())),
        }
        files.write_json(config.out / REPORT, report)
    print(*map(printable, _summary(config, found, made, failures)), sep="\n")  # names may hold control characters
    return 1 if failures else 0


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """Return the settings that determine the arrays."""
    folders = {"videos": config.videos, "faces": config.faces, "annotations": config.annotations}
    given = {name: None if folder is None else str(folder.resolve()) for name, folder in folders.items()}
    return {**given, "fps": config.fps, "detect": config.detect}


def _check(config: PrepareConfig) -> None:
    """Refuse a folder that holds something else, was made with other settings, or has links that lead elsewhere."""
    out = config.out
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; choose another.")
    there = (
        [path for path in out.iterdir() if path.name != files.LOCK and not files.is_partial(path)]
        if out.exists()
        else []
    )
    if there and not (out / REPORT).exists():
        raise UserError(f"--out: {out} exists already, and grjca prepare has not made it; choose another.")
    for name in (ARRAYS, ANNOTATIONS, *(f"{ANNOTATIONS}/{split}" for split in OFFICIAL)):
        path = out / name
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise UserError(f"{path}: expected a folder or nothing, got a link or a file; remove it.")
    if (out / REPORT).exists():
        before, now = files.read_json(out / REPORT), _settings(config)
        before = before.get("settings") if isinstance(before, dict) else None
        if not isinstance(before, dict):
            raise UserError(
                f"{out / REPORT}: expected the settings of a grjca prepare, got none; choose another --out."
            )
        for name, value in now.items():
            if before.get(name) != value:
                raise UserError(f"--{name}: {out} was made with {before.get(name)}, got {value}; choose another --out.")


def _remove_partial(out: Path) -> None:
    """Delete what killed processes have left incomplete. The caller holds the lock, so no other process writes
    there."""
    for split in OFFICIAL:
        files.remove_partial(out / ANNOTATIONS / split)
    for path in (out / ARRAYS).iterdir() if (out / ARRAYS).is_dir() else ():
        if files.is_partial(path) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def _outcomes(config: PrepareConfig, tasks: list[Task]) -> Iterator[tuple[Task, dict[str, Any] | UserError]]:
    """Yield the content of each video's footage.json, after writing its annotation, or why it could not be made."""
    calls = {}
    with tqdm(total=len(tasks), desc="preparing", unit="video", leave=False, disable=None) as bar:
        for task in tasks:
            folder = config.out / ARRAYS / task.name
            try:
                labels = None if task.annotation is None else reading.annotation(task.annotation)
                about = _done(folder, labels)
            except (UserError, OSError) as error:
                bar.update()
                yield task, UserError(str(error))
                continue
            if about is None:
                calls[task] = (task.source, folder, labels, config.fps)
            else:
                bar.update()
                _annotate(config.out, task)
                yield task, about
        for task, outcome in isolated.each(footage.write_folder, calls, config.jobs):
            if not isinstance(outcome, UserError):
                _annotate(config.out, task)
            bar.update()
            yield task, outcome


def _done(folder: Path, labels: np.ndarray | None) -> dict[str, Any] | None:
    """Return the footage.json of an earlier call, or None if there is none.

    Raises:
        UserError: if the folder holds something else, or the annotation has changed since.
    """
    if folder.is_symlink():
        raise UserError(f"{folder}: expected a folder or nothing, got a link; remove it.")
    if not folder.exists():
        return None
    if not (folder / footage.ABOUT).is_file():
        raise UserError(f"{folder}: exists already, and grjca prepare has not made it; move it away.")
    about = files.read_json(folder / footage.ABOUT)
    path = folder / footage.LABELS
    before = reading.labels(path) if path.exists() else None
    same = before is labels is None or (before is not None and labels is not None and np.array_equal(before, labels))
    if not same:
        raise UserError(f"{path}: the annotation has changed since; delete the folder, and it is made again.")
    if not isinstance(about, dict) or about.keys() != {"frames", "fps", "missing", "notes"}:
        raise UserError(f"{folder / footage.ABOUT}: expected a report, got something else; delete the folder.")
    return about


def _annotate(out: Path, task: Task) -> None:
    """Copy the annotation of a video."""
    if task.annotation is None or task.split is None:
        return
    path = out / ANNOTATIONS / task.split / f"{task.name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = files.read_bytes(task.annotation)
    if not path.is_file() or path.is_symlink() or files.read_bytes(path) != content:
        files.write(path, lambda file: file.write(content))


def _summary(
    config: PrepareConfig, found: Found, made: dict[str, dict[str, Any]], failures: dict[str, str]
) -> list[str]:
    frames, missing = (sum(about[name] for about in made.values()) for name in ("frames", "missing"))
    noted = sum(bool(about["notes"]) for about in made.values())
    lines = [f"{config.out}: {len(made)} videos, {frames} frames, {missing} of them without a picture."]
    if noted:
        lines.append(f"{noted} videos were mended or lack something; {config.out / REPORT} says what.")
    if found.unused:
        lines.append(f"Folders of cropped faces without a video or sound: {found.unused}.")
    if failures:
        lines.append(f"{len(failures)} videos failed:")
        lines += [f"  {name}: {reason}" for name, reason in sorted(failures.items())[:SHOWN]]
        lines += ["  …"] * (len(failures) > SHOWN)
    return lines
