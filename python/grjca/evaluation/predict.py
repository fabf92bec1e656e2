"""``grjca predict``: write a value for every frame, in a file per video and in the challenge file."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from grjca import files
from grjca.config import TARGETS, PredictConfig, Target
from grjca.data.layout import composed
from grjca.data.videos import Video
from grjca.errors import UserError
from grjca.evaluation import video_prediction
from grjca.evaluation.trained import Trained, Values, infer, write_predictions
from grjca.training import inference, runs

CHALLENGE, HEADER = "challenge.txt", "image_location,valence,arousal"
IMAGE = re.compile(r"(?P<video>[^/\\,]+)/(?P<frame>[0-9]{1,9})\.jpg", re.ASCII)


class Row(NamedTuple):
    """A row of the challenge file."""

    image: str
    """<video>/<frame>.jpg"""
    video: str
    frame: int
    """Number of the frame, from 1."""


def predict(config: PredictConfig) -> int:
    """Predict with the best weights of one run, or of one run for each target; return the exit code.

    ``config.folder`` gets ``predictions/<video>.txt`` and ``challenge.txt``, or for a video file the files listed in
    :mod:`grjca.evaluation.video_prediction`. It appears only once it is complete.

    Raises:
        UserError: if runs, data, template or folder are invalid.
    """
    files.check_new_folder(config.folder)
    trained = _load(config)
    first = trained[0]
    on = inference.accelerator(first.settings.precision, config.batch_size)
    if config.video is not None:
        return video_prediction.predict_video(config, on, trained)
    assert config.data is not None
    everything = first.videos(config.data, config.split, progress=on.is_main_process)
    rows = None if config.template is None else read_template(config.template, {video.name for video in everything})
    listed = {video.name for video in everything} if rows is None else {row.video for row in rows}
    videos = [video for video in everything if video.name in listed]

    values: dict[Target, dict[str, np.ndarray]] = {}
    for of in trained:
        predictions = infer(on, of, videos, config.batch_size)
        values[of.settings.target] = {v.name: p.values for v, p in zip(videos, predictions, strict=True)}
    if on.is_main_process:
        rows = rows or every_frame(videos)
        with files.whole_folder(config.folder) as folder:
            write_predictions(folder / runs.PREDICTIONS, values)
            files.write_text(folder / CHALLENGE, challenge(rows, values))
        print(_report(config, values, videos, rows, left_out=len(everything) - len(videos)))
    return 0


def every_frame(videos: Sequence[Video]) -> list[Row]:
    """Return the rows of the challenge file without a template."""
    names = sorted((video.name, video.length) for video in videos)
    return [Row(f"{name}/{i:05d}.jpg", name, i) for name, length in names for i in range(1, length + 1)]


def challenge(rows: Sequence[Row], values: Values) -> str:
    """Return the text of the challenge file.

    Values are clipped to [-1, 1]. A frame after the last one gets the last value, and a missing target is 0.
    """
    clipped = {target: {name: np.clip(of, -1, 1) for name, of in values[target].items()} for target in values}

    def cell(target: Target, row: Row) -> str:
        if target not in clipped:
            return "0"
        of = clipped[target][row.video]
        return f"{of[min(row.frame, len(of)) - 1]:.8f}"

    lines = (",".join([row.image, *(cell(target, row) for target in TARGETS)]) for row in rows)
    return "\n".join([HEADER, *lines]) + "\n"


def read_template(path: Path, known: Collection[str]) -> list[Row]:
    """Read the rows that the organisers ask for, in their order. Placeholders for the values are allowed and ignored.

    Args:
        known: names of the existing videos.

    Raises:
        UserError: if a line is not as expected; the message names it.
    """
    header, *lines = _text(path).rstrip().splitlines() or [""]
    if header.strip() not in (HEADER, HEADER.partition(",")[0]):
        raise UserError(f"{path}, line 1: expected the header {HEADER}, got {header[:60]!r}.")
    if not lines:
        raise UserError(f"{path}: expected a row for each frame, got only the header.")
    seen: dict[tuple[str, int], int] = {}
    rows = []
    for number, line in enumerate(lines, start=2):
        row = _row(line)
        if row is None:
            raise UserError(f"{path}, line {number}: expected <video>/00001.jpg or a later frame, got {line[:60]!r}.")
        if row.video not in known:
            raise UserError(f"{path}, line {number}: there are no features of {row.video!r} to predict it from.")
        first = seen.setdefault((row.video, row.frame), number)
        if first != number:
            raise UserError(f"{path}, line {number}: expected each frame once, but line {first} has {row.image} too.")
        rows.append(row)
    return rows


def _row(line: str) -> Row | None:
    image, *placeholders = (cell.strip() for cell in line.split(","))
    match = IMAGE.fullmatch(image)
    if match is None or int(match["frame"]) < 1 or len(placeholders) > len(TARGETS):
        return None
    return (
        Row(image, composed(match["video"]), int(match["frame"])) if all(map(_is_placeholder, placeholders)) else None
    )


def _is_placeholder(cell: str) -> bool:
    try:
        float(cell or 0)
    except ValueError:
        return False
    return True


def _text(path: Path) -> str:
    try:
        return files.read_bytes(path).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: expected the template of the challenge file, but {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: expected text in UTF-8, got something else.") from error


def _load(config: PredictConfig) -> list[Trained]:
    """Load the run, and that of the other target if there is one."""
    first = Trained.load(config.run, config.backend)
    if config.other is None:
        return [first]
    other = Trained.load(config.other, config.backend)
    same: list[tuple[str, object, object]] = [
        ("modalities in the same order", list(first.widths.items()), list(other.widths.items())),
        ("source", first.settings.source, other.settings.source),
        ("precision", first.settings.precision, other.settings.precision),
    ]
    if config.split in ("train", "validate"):
        same.append(("fold", first.settings.fold, other.settings.fold))
    for what, ours, theirs in same:
        if ours != theirs:
            raise UserError(
                f"--other: expected two runs with the same {what}, got {ours} in {config.run} and {theirs} in "
                f"{config.other}; predict them one by one."
            )
    if first.settings.target == other.settings.target:
        raise UserError(
            f"--other: expected a run of the other target, but {config.run} and {config.other} both predict "
            f"{first.settings.target}."
        )
    return [first, other]


def _report(config: PredictConfig, values: Values, videos: Sequence[Video], rows: Sequence[Row], left_out: int) -> str:
    mended = sum(len(video.notes) for video in videos)
    missing = [target for target in TARGETS if target not in values]
    lines = [
        f"{config.folder / runs.PREDICTIONS}: {len(videos)} videos, {' and '.join(t for t in TARGETS if t in values)}",
        f"{config.folder / CHALLENGE}: {len(rows)} frames",
        *(f"The column {target} is 0: --other takes a run that predicts it." for target in missing),
    ]
    if left_out:
        lines.append(f"{left_out} of {left_out + len(videos)} videos are not in {config.template} and were left out.")
    if mended:
        lines.append(f"Files of another length than their video, mended: {mended}; grjca doctor lists them.")
    return "\n".join(lines)
