"""Conversion of video files, sound and cropped faces to arrays: protocol.md, "From footage to arrays".

Frame n, from 0, is the n-th picture that the video file shows, row n of the annotation, and crop n + 1. Its patch of
sound begins n / fps seconds after the first frame. If the frame rate is not constant (a frame is shown more than half a
frame away from n / fps), every patch begins at the time at which the file shows its frame.

Everything is streamed to disk, so that memory does not grow with the length of a video.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from grjca import files
from grjca.data import audio, faces, media
from grjca.errors import UserError

FACES, PATCHES, LABELS, ABOUT = "video.npy", "logmel.npy", "VA_continuous_label.npy", "footage.json"
RATES = (1, 1000)
"""Lowest and highest frame rate, in frames per second."""

_CHUNK = 256  # patches written at a time
_SHORT = 0.5  # seconds of sound that may be missing without a note
_PATCH_SECONDS = 2.0  # seconds of sound beyond which a patch of one second does not change


@dataclass(frozen=True)
class Source:
    """Files with the pictures and the sound of one face."""

    video: Path | None = None
    """A video file. Without ``crops``, a detector looks for the face in it."""
    sound: Path | None = None
    """A sound file that begins with the first frame; it replaces the sound of the video file."""
    crops: Path | None = None
    """A folder with ``00001.jpg`` and so on."""
    side: faces.Side = None
    """Which of two faces in the picture the detector takes."""


@dataclass(frozen=True)
class Arrays:
    """Result of :func:`arrays`."""

    faces: np.ndarray
    """[N, 48, 48, 3] uint8, mapped from a file; black where a picture is missing."""
    patches: np.ndarray
    """[N, 96, 64] float16, mapped from a file."""
    fps: float
    """Average frame rate of the video, in frames per second."""
    missing: int
    """Number of frames without a picture."""
    notes: tuple[str, ...]
    """Sentences on what was repaired."""


def arrays(source: Source, folder: Path, *, frames: int | None = None, fps: float | None = None) -> Arrays:
    """Write ``video.npy`` and ``logmel.npy`` into ``folder``, which may be a temporary one, and return them mapped.

    Args:
        source: pictures and sound; a source without sound is silent.
        folder: an existing folder that holds neither file.
        frames: N according to an annotation; None takes the frames of the video file, or all up to the last crop if
            there is no video file.
        fps: frames per second, in place of the video file's own rate.

    Raises:
        UserError: if a file is missing, truncated, damaged, too large or of another kind, or does not fit ``frames``
            (the message names it); if the frame rate is unknown; if there are neither crops nor a face detector.
        OSError: if ``folder`` cannot be written to.
    """
    video = None if source.video is None else media.read(source.video)
    shown = 0 if video is None else len(video.times)
    if source.crops is None and not shown:
        raise UserError(f"{source.video or source.sound}: expected pictures in it or cropped faces, got neither.")
    notes: list[str] = []
    count = _count(source, frames, shown, notes)
    rate, times = _rate(source, video, fps, count, notes)
    missing = _write_faces(source, video, folder / FACES, count, notes)
    with tempfile.TemporaryFile(dir=folder) as file:
        waveform = _waveform(source, video, file, count / rate if times is None else float(times[-1]), notes)
        starts = audio.patch_starts(audio.rows(len(waveform)), rate, count, times=times)
        parts = (audio.patches(waveform, starts[i : i + _CHUNK]) for i in range(0, count, _CHUNK))
        _write(folder / PATCHES, (count, audio.PATCH, audio.BANDS), np.float16, parts)
        del waveform  # Windows does not delete mapped files
    mapped, patches = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in (FACES, PATCHES))
    return Arrays(mapped, patches, rate, missing, tuple(notes))


def write_folder(source: Source, folder: Path, labels: np.ndarray | None, fps: float | None) -> dict[str, Any]:
    """Make the folder of one video in ``npy_data``, completely or not at all.

    Besides the arrays, it holds ``VA_continuous_label.npy`` with ``labels`` [N, 2] float64, unless they are None, and
    ``footage.json`` with the returned dict: ``frames``, ``fps``, ``missing`` and ``notes``.

    Raises:
        UserError: as :func:`arrays`.
        OSError: if the folder cannot be written.
    """
    with files.whole_folder(folder) as partial:
        made = arrays(source, partial, frames=None if labels is None else len(labels), fps=fps)
        if labels is not None:
            _write(partial / LABELS, labels.shape, np.float64, [labels])
        about = {"frames": len(made.faces), "fps": made.fps, "missing": made.missing, "notes": list(made.notes)}
        files.write_json(partial / ABOUT, about)
        del made
    return about


def _count(source: Source, annotated: int | None, shown: int, notes: list[str]) -> int:
    """Determine the number of frames, N."""
    if annotated and shown and abs(annotated - shown) > media.MEND:
        raise UserError(
            f"{source.video} has {shown} frames, but its annotation has {annotated} rows; a difference of at most "
            f"{media.MEND} is mended. One of the two is of another video, or damaged."
        )
    if annotated and shown and annotated != shown:
        notes.append(f"The annotation has {annotated} rows and the video {shown} frames: the rows count.")
    count = annotated or shown
    if not count and source.crops is not None:
        count = max(faces.numbers(source.crops))
        notes.append(f"Nothing but the pictures says how many frames there are: {count}, by the last picture.")
    if count > media.MOST_FRAMES:
        raise UserError(f"{source.video or source.crops}: expected at most {media.MOST_FRAMES} frames, got {count}.")
    return count


def _rate(
    source: Source, video: media.Media | None, asked: float | None, count: int, notes: list[str]
) -> tuple[float, np.ndarray | None]:
    """Return the frames per second and, if the rate varies, the time of each frame, [count], in seconds from the
    first."""
    path = source.video or source.sound or source.crops
    rate = asked or (video.fps if video is not None else None)
    if rate is None:
        raise UserError(
            f"{path}: it does not say how many frames per second its video has; grjca prepare takes them by --fps."
        )
    if not RATES[0] <= rate <= RATES[1]:
        raise UserError(
            f"{path}: expected {RATES[0]} to {RATES[1]} frames per second, got {rate:g}; grjca prepare takes another "
            "rate by --fps."
        )
    if asked or video is None or np.isnan(video.times).any():
        return rate, None
    times = video.times - video.times[0]
    if times[-1] > len(times) / RATES[0]:
        raise UserError(
            f"{path}: expected at least {RATES[0]} frame per second, got {len(times)} in {times[-1]:.0f} s."
        )
    if np.abs(times - np.arange(len(times)) / rate).max() * rate <= 0.5:
        return rate, None
    notes.append(f"The frame rate varies, {rate:.2f} a second on average: sound follows the time of each frame.")
    beyond = times[-1] + np.arange(1, max(0, count - len(times)) + 1) / rate
    return rate, np.concatenate([times, beyond])[:count]


def _write_faces(source: Source, video: media.Media | None, path: Path, count: int, notes: list[str]) -> int:
    """Write the faces, black where there is none, and return how many are missing."""
    missing = 0

    def filled(found: Iterable[np.ndarray | None]) -> Iterator[np.ndarray]:
        nonlocal missing
        for face in found:
            missing += face is None
            yield np.zeros((faces.SIZE, faces.SIZE, 3), np.uint8) if face is None else face

    if source.crops is not None:
        there = faces.numbers(source.crops)
        later = sum(number > count for number in there)
        if later:
            notes.append(f"Pictures after the last frame, {count}, are left out: {later}.")
        found = faces.crops(source.crops, count, there)
    else:
        assert video is not None
        found = _detected(video, count, source.side)
    _write(path, (count, faces.SIZE, faces.SIZE, 3), np.uint8, filled(found))
    if missing == count:
        raise UserError(f"{source.crops or source.video}: expected a face in some frame, found none in {count}.")
    return missing


def _detected(video: media.Media, count: int, side: faces.Side) -> Iterator[np.ndarray | None]:
    detector = faces.Detector(side)
    frames = media.frames(video)
    for _ in range(count):
        image = next(frames, None)
        yield None if image is None else detector(image)


def _waveform(
    source: Source, video: media.Media | None, file: IO[bytes], seconds: float, notes: list[str]
) -> np.ndarray:
    """Return as much sound as that many seconds of frames need, [samples] int16 at 16 kHz, mapped from ``file``."""
    heard = video if source.sound is None else media.read(source.sound)
    if heard is not None and heard.has_sound:
        for samples in media.sound(heard, seconds + _PATCH_SECONDS):
            file.write(samples.tobytes())
        file.flush()
        lacks = seconds - file.tell() / (2 * audio.RATE)
        if lacks > _SHORT:
            notes.append(f"The sound ends {lacks:.1f} s before the pictures: its last patch is repeated.")
        if file.tell():
            return np.memmap(file, np.int16, "r")
    if source.sound is not None:
        raise UserError(f"{source.sound}: expected sound, got none.")
    notes.append("There is no sound: it counts as silence.")
    return np.zeros(1, np.int16)


def _write(path: Path, shape: tuple[int, ...], dtype: type, parts: Iterable[np.ndarray]) -> None:
    """Write an .npy file piece by piece. Writing to a mapped file would kill the process if the disk is full."""
    with open(path, "xb") as file:
        npy.write_array_header_1_0(
            file, {"descr": npy.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        )
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype).data)
        file.flush()
        os.fsync(file.fileno())
