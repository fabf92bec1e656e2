"""Search for the videos to prepare, with their pictures, sound and annotations. Nothing here opens a file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grjca.config import PrepareConfig
from grjca.data import layout
from grjca.data.footage import Source
from grjca.errors import UserError

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".flv", ".wmv")
SOUND = ".wav"
SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")

Paths = dict[str, list[Path]]
"""Paths by the name of the video."""


@dataclass(frozen=True)
class Task:
    """One face of one video."""

    name: str
    source: Source
    annotation: Path | None
    split: str | None
    """train or validate if it is annotated, else None."""


@dataclass(frozen=True)
class Found:
    """Content of the input folders."""

    tasks: list[Task]
    """Videos to prepare, sorted by name."""
    failures: dict[str, str]
    """Videos that cannot be prepared, and why."""
    unused: int
    """Number of folders of cropped faces that belong to no video."""


def find(config: PrepareConfig) -> Found:
    """Find the videos to prepare.

    Raises:
        UserError: if a folder cannot be read, or there is no video.
    """
    inputs = _Inputs(config)
    if not inputs.videos and not inputs.sounds:
        raise UserError(f"--videos: {config.videos} holds no video ({', '.join(VIDEOS)}) and no {SOUND}.")
    tasks, failures = [], {}
    names = inputs.names()
    for name in names:
        try:
            _check_name(name, names, inputs)
            tasks.append(inputs.task(name))
        except UserError as error:
            failures[name] = str(error)
    return Found(tasks, failures, len(inputs.crops.keys() - set(names)))


def sound_beside(video: Path) -> Path | None:
    """Return the sound file that replaces the sound of ``video``, if there is one, as in :func:`find`.

    Raises:
        UserError: if there are two sound files, or the folder cannot be read.
    """
    sounds = (path for path in _entries(video.parent, "video") if path.suffix.lower() == SOUND)
    return _only(_grouped(sounds, lambda path: path.stem), layout.composed(video.stem))


class _Inputs:
    """Files of the input folders, by the names of videos."""

    def __init__(self, config: PrepareConfig) -> None:
        entries = _entries(config.videos, "videos")
        self.config = config
        self.videos = _grouped((p for p in entries if p.suffix.lower() in VIDEOS), lambda path: path.stem)
        self.sounds = _grouped((p for p in entries if p.suffix.lower() == SOUND), lambda path: path.stem)
        crops = [] if config.faces is None else _entries(config.faces, "faces")
        self.crops = _grouped((path for path in crops if path.is_dir()), lambda path: path.name)
        self.splits = {} if config.annotations is None else _splits(config.annotations)
        annotations = [p for f in self.splits for p in _entries(f, "annotations") if p.suffix.lower() in layout.TEXTS]
        self.annotations = _grouped(annotations, lambda path: path.stem)

    def names(self) -> list[str]:
        """Return the names of all faces: annotated ones, cropped ones with footage, and videos that have neither."""
        footage = self.videos.keys() | self.sounds.keys()
        found = self.annotations.keys() | {name for name in self.crops if self.recording(name) in footage}
        return sorted(found | (footage - {self.recording(name) for name in found}))

    def recording(self, name: str) -> str:
        """Return the name of the video file and its sound: without _left or _right, unless a file has it."""
        if name not in self.videos and name not in self.sounds:
            for side in SIDES:
                name = name.removesuffix(f"_{side}") if name.endswith(f"_{side}") else name
        return name

    def task(self, name: str) -> Task:
        """Return the task of a face; UserError if a file is missing or exists twice."""
        recording = self.recording(name)
        annotation = _only(self.annotations, name)
        video, sound = _only(self.videos, recording), _only(self.sounds, recording)
        crops = _only(self.crops, name)
        if video is None and sound is None:
            raise UserError(
                f"{annotation}: expected {recording}{VIDEOS[0]} or {recording}{SOUND} in --videos, got none."
            )
        if crops is None and (video is None or not self.config.detect):
            advice = "" if video is None else "; --detect true finds faces in the video"
            raise UserError(f"{video or sound}: expected cropped faces, {name}/ in --faces, got none{advice}.")
        side = next((side for side in SIDES if name == f"{recording}_{side}"), None)
        split = None if annotation is None else self.splits[annotation.parent]
        return Task(name, Source(video, sound, crops, side), annotation, split)


def _splits(root: Path) -> dict[Path, str]:
    """Return the folders of annotations and their splits."""
    _entries(root, "annotations")
    found = dict(layout.splits(root))
    if not found:
        raise UserError(
            f"--annotations: {root} holds no annotations; expected {{train,validate}}/<video>.txt in it, or "
            "VA_Estimation_Challenge/{Train_Set,Validation_Set}/<video>.txt."
        )
    return found


def _entries(folder: Path, option: str) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"--{option}: expected a folder, but {folder} cannot be read: {error.strerror}.") from error


def _grouped(paths: Iterable[Path], name: Callable[[Path], str]) -> Paths:
    groups: defaultdict[str, list[Path]] = defaultdict(list)
    for path in paths:
        groups[layout.composed(name(path))].append(path)
    return dict(groups)


def _only(paths: Paths, name: str) -> Path | None:
    """Return the only path of this name, or None; UserError if there are two."""
    found = paths.get(name, [])
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1]} are of the same video; remove or rename one.")
    return found[0] if found else None


def _check_name(name: str, names: list[str], inputs: _Inputs) -> None:
    """Refuse a name that the data folder could not hold, or not beside the other names."""
    recording = inputs.recording(name)
    places = (inputs.annotations.get(name), inputs.crops.get(name), inputs.videos.get(recording))
    path = next((place[0] for place in places if place), inputs.sounds.get(recording, [Path(name)])[0])
    layout.check_name(name, path)
    if layout.split_of(name):
        raise UserError(f"{path}: expected a name that does not mean a split, as {name!r} does; rename the video.")
    twin = next((other for other in names if other != name and other.casefold() == name.casefold()), None)
    if twin is not None:
        raise UserError(f"{path}: expected names that differ in more than case, got {name!r} and {twin!r}; rename one.")
