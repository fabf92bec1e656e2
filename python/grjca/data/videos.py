"""Videos of a data folder: labels are in memory, features stay on disk."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar

import numpy as np
from tqdm import tqdm

from grjca.data import layout, reading
from grjca.data.layout import OFFICIAL, Source
from grjca.data.reading import ARRAYS, Form
from grjca.errors import UserError
from grjca.modalities import WIDTHS

MEND = 5
"""Number of frames by which lengths may differ. Decoders disagree by a frame or two at the end; a larger difference
means that a file belongs to another video."""

MOST_FRAMES = 1_000_000
"""Maximum number of frames of a video, nine hours at 30 frames per second. A sparse file may claim any number."""

DEPTH = 3
"""Depth of folders to which labels in the wrong place are searched for."""

Kind = Literal["features", "arrays"]
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Video:
    """One face of one video. It is pickled without its features, so that passing it to workers is cheap."""

    name: str
    length: int
    """N, the number of frames of the annotation, or of the first modality if there is no annotation"""
    labels: np.ndarray | None
    """[N, 2] float64, valence and arousal as annotated; None without annotation"""
    valid: np.ndarray
    """[N] bool, true where both labels are in [-1, 1]; all false without annotation"""
    notes: tuple[str, ...]
    """sentences on what was repaired"""
    files: dict[str, Path]
    """the file of each modality"""
    forms: dict[str, Form]
    """the content of each modality's file"""

    def read(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Read these frames of each modality, [stop - start, ...]: features in float32, arrays in their own dtype.

        If a file is shorter than the video, its last row is repeated.
        """
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"{self.name} has frames 0 to {self.length}, not {start} to {stop}.")
        frames = np.arange(start, stop)
        return {name: _rows(reading.rows(self.files[name], form), frames, form) for name, form in self.forms.items()}


@dataclass(frozen=True)
class SplitSummary:
    """Summary of one official split."""

    videos: int
    frames: int
    invalid_share: float
    """share of the annotated frames that are masked; 0 without annotation"""


@dataclass(frozen=True)
class Inspection:
    """Report on a data folder."""

    problems: list[str]
    """what :func:`load` would refuse"""
    notes: list[str]
    """what was repaired or ignored"""
    splits: dict[str, SplitSummary]
    """summaries over the videos without a problem"""
    folders: list[str]
    """where labels and features were found"""


def load(
    root: Path,
    split: str,
    *,
    fold: int = 0,
    widths: Mapping[str, int] = WIDTHS,
    kind: Kind = "features",
    progress: bool = False,
) -> list[Video]:
    """Load the videos of a split, sorted by name. Every file is read once and checked.

    Args:
        root: folder with annotations/ and features/ or npy_data/.
        split: train or validate of this fold, test (features without annotation), or all.
        widths: modalities and the widths of their features.
        kind: "features", or "arrays": the pictures and log-mel patches in npy_data/ that grjca prepare writes.
        progress: show a progress bar.

    Raises:
        UserError: for the first problem found, or if there are no such videos.
    """
    forms = ARRAYS if kind == "arrays" else _forms(widths)
    found = layout.find(Path(root))
    if found.problems:
        raise UserError(found.problems[0])
    videos = []
    for source in tqdm(
        layout.select(found, split, fold), f"checking {split}", leave=False, disable=None if progress else True
    ):
        video, errors = _read(source, forms)
        if video is None:
            raise errors[0]
        videos.append(video)
    return videos


def problems(
    root: Path, *, widths: Mapping[str, int] = WIDTHS, kind: Kind = "features", progress: bool = False
) -> Inspection:
    """Report what is wrong with a data folder, at most one problem per file, and how much it holds. Never raises."""
    forms = ARRAYS if kind == "arrays" else _forms(widths)
    try:
        found = layout.find(Path(root))
    except UserError as error:
        return Inspection([str(error)], [], {}, [])
    wrong, notes = [*found.problems, *_missing_parts(found), *_unused_labels(found)], _remarks(found)
    videos: dict[str, list[Video]] = {split: [] for split in (*OFFICIAL, "test")}
    for source in tqdm(found.sources, "checking", leave=False, disable=None if progress else True):
        video, errors = _read(source, forms)
        wrong += map(str, errors)
        if video is not None:
            notes += video.notes
            if source.split:
                videos[source.split].append(video)
    wrong += _unlabelled(videos)
    return Inspection(wrong, notes, {split: _summary(part) for split, part in videos.items()}, _folders(found))


def _forms(widths: Mapping[str, int]) -> dict[str, Form]:
    return {name: Form(name, (width,)) for name, width in widths.items()}


def _read(source: Source, forms: Mapping[str, Form]) -> tuple[Video | None, list[UserError]]:
    """Read a video; return it, or None and what is wrong with its files."""
    errors: list[UserError] = []
    try:
        layout.check_name(source.name, source.labels or source.folder)
    except UserError as error:
        return None, [error]
    labels = None
    if source.labels is not None:
        labels = _attempt(errors, reading.labels, source.labels)
    paths = {name: source.arrays(name) if forms is ARRAYS else source.features(name) for name in forms}
    length = None if labels is None else len(labels)
    counts: dict[Path, int] = {}
    if source.folder.is_dir():
        for name, form in forms.items():
            count = _attempt(errors, _checked_length, paths[name], form, length)
            if count is not None:
                counts[paths[name]] = count
                length = length or count
    else:
        expected = f"expected it to hold {' and '.join(path.name for path in paths.values())}"
        errors.append(UserError(f"{source.labels} has no features: the folder {source.folder} is missing; {expected}."))
    if errors or length is None:
        return None, errors
    notes = _attempt(errors, _mend, source, length, counts)
    if notes is None:
        return None, errors
    valid = np.zeros(length, bool) if labels is None else (np.abs(labels) <= 1).all(axis=1)
    return Video(source.name, length, labels, valid, notes, paths, dict(forms)), errors


def _mend(source: Source, length: int, rows_of: dict[Path, int]) -> tuple[str, ...]:
    """Say how features of other lengths are repaired; UserError if the lengths differ too much."""
    notes = []
    for path, rows in rows_of.items():
        if abs(rows - length) > MEND:
            raise UserError(
                f"{path} has {rows} frames, but {source.labels or next(iter(rows_of))} has {length}; a difference of "
                f"at most {MEND} is mended. Extract the features of this video again."
            )
        if rows != length:
            how = "the last row is repeated" if rows < length else "the last ones are left out"
            notes.append(f"{path} has {rows} frames instead of {length}: {how}.")
    return tuple(notes)


def _attempt(errors: list[UserError], read: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    try:
        return read(*args, **kwargs)
    except UserError as error:
        errors.append(error)
        return None


def _checked_length(path: Path, form: Form, length: int | None) -> int:
    """Check a file and return its number of frames. If that does not fit ``length``, the file is refused anyway, and
    its frames are not read."""
    array = reading.rows(path, form)
    if len(array) > MOST_FRAMES:
        raise UserError(f"{path} holds {len(array)} frames; expected at most {MOST_FRAMES}.")
    if array.dtype.kind == "f" and (length is None or abs(len(array) - length) <= MEND):
        reading.check_finite(array, path)
    return len(array)


def _rows(array: np.ndarray, frames: np.ndarray, form: Form) -> np.ndarray:
    return np.asarray(array[np.minimum(frames, len(array) - 1)], dtype=form.dtype)


def _unlabelled(videos: dict[str, list[Video]]) -> list[str]:
    """Report training and validation splits without a valid frame."""
    return [
        f"The {split} split has no frame with valid labels in {len(part)} videos; both have to be from -1 to 1."
        for split, part in videos.items()
        if split in OFFICIAL and part and not any(video.valid.any() for video in part)
    ]


def _missing_parts(found: layout.Layout) -> list[str]:
    """Report splits that :func:`load` would refuse as empty; a folder that is only for testing needs none."""
    if found.sources and all(source.split == "test" for source in found.sources):
        return []
    wrong = []
    for split in OFFICIAL:
        try:
            layout.select(found, split)
        except UserError as error:
            wrong.append(str(error))
    return wrong


def _unused_labels(found: layout.Layout) -> list[str]:
    """If a split has no labels, report files that look like labels but are not read, once per folder."""
    missing = [split for split in OFFICIAL if all(source.split != split for source in found.sources)]
    if not missing:
        return []
    folders: defaultdict[Path, list[Path]] = defaultdict(list)
    for path in _annotations_elsewhere(found):
        folders[path.parent].append(path)
    for source in found.sources:
        path = source.folder / layout.LABELS
        if source.labels is None and layout.split_of(source.folder.parent.name) != "test" and path.exists():
            folders[source.folder.parent].append(path)
    return [
        f"No video of {found.root} has labels for the {' or the '.join(missing)} split, but {folder} holds files that "
        f"look like labels and are not read ({len(paths)}, the first is {paths[0].relative_to(folder)}); expected "
        f"{layout.EXPECTED}. Move or rename the folder."
        for folder, paths in folders.items()
    ]


def _annotations_elsewhere(found: layout.Layout) -> Iterator[Path]:
    """Find files that begin like an annotation but are neither read nor predictions. The search is shallow, because
    there may be many images."""
    known = {source.name for source in found.sources} | {"predictions"}
    for name, inner, files in os.walk(found.root):
        folder = Path(name)
        if len(folder.relative_to(found.root).parts) == DEPTH:
            inner.clear()
        inner[:] = sorted(n for n in inner if layout.composed(n) not in known and layout.split_of(n) != "test")
        if folder not in found.annotated:
            texts = (folder / file for file in sorted(files) if file.lower().endswith(layout.TEXTS))
            yield from filter(reading.looks_annotated, texts)


def _folders(found: layout.Layout) -> list[str]:
    """Say where labels and features are."""
    labels = [(split, folder) for folder, split in found.annotated.items()]
    labels += [
        (source.split or "of no split", source.folder.parent)
        for source in found.sources
        if source.labels is not None and source.labels.parent == source.folder
    ]
    features = [source.folder.parent for source in found.sources if source.folder.is_dir()]
    return [
        *(f"Labels, {split}: {folder}" for split, folder in dict.fromkeys(labels)),
        *([] if labels else ["Labels: none"]),
        *(f"Features: {folder}" for folder in dict.fromkeys(features)),
    ]


def _remarks(found: layout.Layout) -> list[str]:
    notes = [f"{path} is ignored: neither an annotation nor a folder of features." for path in found.strays]
    test = [source.name for source in found.sources if source.split == "test"]
    if test:
        shown = ", ".join(test[:5]) + (", …" if len(test) > 5 else "")
        notes.append(f"Videos with features but no annotation, for testing only: {len(test)} ({shown}).")
    return notes


def _summary(videos: list[Video]) -> SplitSummary:
    frames = sum(video.length for video in videos)
    annotated = [video.valid for video in videos if video.labels is not None]
    invalid = float(1 - np.concatenate(annotated).mean()) if annotated else 0.0
    return SplitSummary(len(videos), frames, invalid)
