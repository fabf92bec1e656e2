"""Layout of a data folder: where its files are and which split each video belongs to. Nothing here opens a file."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grjca.errors import UserError

OFFICIAL = ("train", "validate")
SPLITS = (*OFFICIAL, "test", "all")
FOLDS = 5
LABELS = "VA_continuous_label.npy"
LONGEST_NAME = 245
"""Maximum length of a video's name, in bytes of UTF-8. File systems allow 255, and the longest file name made from it
is video_<name>.png."""
EXPECTED = "annotations/{train,validate}/<video>.txt and features/<video>/{visual,audio}.npy, or npy_data/"
TEXTS = (".txt", ".csv")
"""Suffixes of annotation files."""
PICTURES_AND_PATCHES = {"visual": "video.npy", "audio": "logmel.npy"}
"""Files in npy_data/<video>/ that the networks read."""

_IN_NPY_DATA = {"visual": "video.npy", "audio": "vggish.npy"}
"""Names of feature files in npy_data/<video>/ that differ from the name of the modality."""

_HOLDERS = ("annotations", "vaestimationchallenge", "va")
"""Folders, nested or not, that hold the folders of the splits, as :func:`_plain` spells them."""
_SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validate", "validation", "valid", "val"), "validate"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True)
class Source:
    """Locations of the files of one video; its feature files may not exist."""

    name: str
    split: str | None
    """train, validate or test according to the folders; None if it has labels but the folders name no split"""
    labels: Path | None
    """.txt, .csv or .npy file"""
    folder: Path
    plain: bool
    """true for a folder in features/, false for one in npy_data/, where files have other names"""

    def features(self, modality: str) -> Path:
        """Return the file of a modality's features."""
        usual = f"{modality}.npy"
        path = self.folder / (usual if self.plain else _IN_NPY_DATA.get(modality, usual))
        if modality == "audio" and not self.plain and not path.exists():
            logmel = self.folder / "logmel.npy"  # some give VGGish features this name
            return logmel if logmel.exists() else path
        return path

    def arrays(self, modality: str) -> Path:
        """Return the file that a modality's network reads: pictures or log-mel patches."""
        return self.folder / PICTURES_AND_PATCHES[modality]


@dataclass(frozen=True)
class Layout:
    """Content of a data folder."""

    root: Path
    sources: list[Source]
    """videos, sorted by name"""
    problems: list[str]
    """names that exist twice, and annotations in formats that are not read"""
    strays: list[Path]
    """entries that are neither an annotation nor a folder of features"""
    annotated: dict[Path, str]
    """folders of annotations and their splits"""


@dataclass(frozen=True)
class _Folder:
    """Folder with the features of one video."""

    path: Path
    part: str | None = None
    """Split in the path npy_data/{train,validate,test}/<video>."""
    plain: bool = True


def find(root: Path) -> Layout:
    """Find everything in ``root``; UserError if it is not a data folder."""
    parts = _check_root(root)
    annotations, others = _annotations(parts)
    strays: list[Path] = []
    folders = list(_folders(root, strays))
    features = {composed(folder.path.name): folder for folder in folders}
    annotated = {composed(path.stem): path for path in annotations}
    if annotated:
        sources = [
            _source(name, parts[path.parent], path, features.get(name) or _missing(root, name))
            for name, path in annotated.items()
        ]
        sources += [_source(name, "test", None, features[name]) for name in features.keys() - annotated.keys()]
    else:
        sources = [_unannotated(name, folder) for name, folder in features.items()]
    lost = [path for path in others if composed(path.stem) in features.keys() - annotated.keys()]
    problems = [*_clashes(annotations, [folder.path for folder in folders]), *map(_not_read, lost)]
    strays = [path for path in others if path not in lost] + strays
    return Layout(root, sorted(sources, key=lambda source: source.name), problems, strays, parts)


def composed(name: str) -> str:
    """Normalise a name to Unicode NFC: systems differ in whether an accented letter is one character or two."""
    return unicodedata.normalize("NFC", name)


def check_name(name: str, path: Path) -> None:
    """Refuse a name that cannot be part of a file name or of a line in the challenge file.

    Raises:
        UserError: if it is refused; the message names the folder of ``path``, which holds the video's labels or
            features.
    """
    odd = [c for c in name if c in ',"\\' or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    got = ""
    if odd:
        got = f"one with {odd[0]!r}"
    elif name != name.strip():
        got = "one that begins or ends with a space"
    elif len(name.encode()) > LONGEST_NAME:
        got = f"one of {len(name.encode())} bytes"
    if got:
        raise UserError(
            f"{str(path.parent)!r} holds the video {name[:60]!r}: expected a name of at most {LONGEST_NAME} bytes "
            f"without commas, quotes, backslashes, line breaks, control characters and spaces around it, got {got}. "
            "Its predictions could not be written; rename its files."
        )


def split_of(name: str) -> str | None:
    """Return the split that a folder's name means, as in validate, Validation_Set or val; or None."""
    return _SPLIT_NAMES.get(_plain(name))


def select(layout: Layout, split: str, fold: int = 0) -> list[Source]:
    """Select the videos of ``split``: train or validate of this fold, test, or all. UserError if there are none."""
    if split not in SPLITS:
        raise UserError(f"There is no split {split!r}: expected one of {', '.join(SPLITS)}.")
    names = {part: [source.name for source in layout.sources if source.split == part] for part in (*OFFICIAL, "test")}
    if split in OFFICIAL and fold:
        if not names["train"]:
            raise UserError(_nothing(layout, "train"))
        names["train"], names["validate"] = folds(names["train"], names["validate"], fold)
    chosen = [source for source in layout.sources if split == "all" or source.name in names[split]]
    if not chosen:
        raise UserError(_nothing(layout, split))
    return chosen


def folds(train: Sequence[str], validate: Sequence[str], fold: int) -> tuple[list[str], list[str]]:
    """Return the names to train on and to validate on, each sorted.

    Fold 0 is the official split. Fold f = 1 to 5 validates on chunk 5 - f of the sorted training names, whose
    boundaries are i n // 5, and trains on the others and the official validation part. As published, chunks may
    separate the two faces of a video.

    Raises:
        UserError: if there is no such fold, or too few videos for it.
    """
    if not 0 <= fold <= FOLDS:
        raise UserError(f"There is no fold {fold}: expected 0 for the official split, or 1 to {FOLDS}.")
    train, validate = sorted(train), sorted(validate)
    if fold == 0:
        return train, validate
    if len(train) < FOLDS:
        raise UserError(f"Fold {fold} needs at least {FOLDS} training videos, there are {len(train)}; use fold 0.")
    start, stop = ((FOLDS - fold + i) * len(train) // FOLDS for i in (0, 1))
    return sorted(train[:start] + train[stop:] + validate), train[start:stop]


def _entries(folder: Path) -> list[Path]:
    """List a folder, sorted, without hidden files; an empty list if there is no such folder."""
    if not folder.is_dir():
        return []
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read: {error.strerror}.") from error


def _check_root(root: Path) -> dict[Path, str]:
    """Check ``root`` and return its folders of annotations and their splits."""
    if not root.exists():
        raise UserError(f"The data folder {root} does not exist; expected {EXPECTED}.")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give the folder that holds {EXPECTED}.")
    found = dict(splits(root))
    if not any((root / name).is_dir() for name in ("features", "npy_data")):
        if found or (root / "annotations").is_dir():
            raise UserError(
                f"{root} has annotations but no features: create features/<video>/{{visual,audio}}.npy beside."
            )
        raise UserError(f"{root} holds none of the folders annotations, features and npy_data; expected {EXPECTED}.")
    return found


def splits(folder: Path, depth: int = 0) -> Iterator[tuple[Path, str]]:
    """Yield folders of annotations below ``folder`` and their splits. Directly in a data folder, "train" may hold other
    things."""
    for path in _entries(folder):
        split = split_of(path.name)
        if split in OFFICIAL and path.is_dir() and (depth or any(map(_is_text, _entries(path)))):
            yield path, split
        elif depth < len(_HOLDERS) and _plain(path.name) in _HOLDERS:
            yield from splits(path, depth + 1)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold()).removesuffix("set")


def _is_text(path: Path) -> bool:
    return path.suffix.lower() in TEXTS


def _annotations(folders: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Return the annotations, and the other entries of their folders."""
    paths = [path for folder in folders for path in _entries(folder)]
    return [path for path in paths if _is_text(path)], [path for path in paths if not _is_text(path)]


def _folders(root: Path, strays: list[Path]) -> Iterator[_Folder]:
    found = [_Folder(path) for path in _entries(root / "features")]
    for path in _entries(root / "npy_data"):
        part = split_of(path.name) if path.is_dir() else None
        found += [_Folder(inner, part, plain=False) for inner in (_entries(path) if part else [path])]
    for folder in found:
        if folder.path.is_dir():
            yield folder
        else:
            strays.append(folder.path)


def _missing(root: Path, name: str) -> _Folder:
    """Return the folder in which the features of an annotated video are missing."""
    plain = (root / "features").is_dir()
    return _Folder(root / ("features" if plain else "npy_data") / name, plain=plain)


def _source(name: str, split: str | None, labels: Path | None, folder: _Folder) -> Source:
    return Source(name, split, labels, folder.path, folder.plain)


def _unannotated(name: str, folder: _Folder) -> Source:
    """Return a video that annotations/ does not list; npy_data may hold its labels."""
    labels = folder.path / LABELS
    if folder.part in OFFICIAL:
        return _source(name, folder.part, labels, folder)
    if folder.plain or folder.part == "test" or not labels.exists():
        return _source(name, "test", None, folder)
    return _source(name, None, labels, folder)


def _clashes(annotations: list[Path], folders: list[Path]) -> Iterator[str]:
    """Report names that exist twice, or differ only in case, which not every system distinguishes."""
    places: defaultdict[str, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    for path in annotations:
        places[composed(path.stem).casefold()][0].append(path)
    for path in folders:
        places[composed(path.name).casefold()][1].append(path)
    for _, (texts, features) in sorted(places.items()):
        for kind, paths in (("annotation", texts), ("features", features)):
            if len(paths) > 1:
                yield (
                    f"The same video is there twice, as {kind} {paths[0]} and {paths[1]}; remove or rename one (upper "
                    "and lower case count as equal, and so do the ways in which Unicode writes an accented letter)."
                )
        if texts and features and composed(texts[0].stem) != composed(features[0].name):
            yield f"The names of {texts[0]} and {features[0]} differ in case; spell them alike."


def _not_read(path: Path) -> str:
    """Say what to do with a file that looks like an annotation but is not read."""
    got = "a folder" if path.is_dir() else f"a file that ends in {path.suffix or 'nothing'}"
    return (
        f"{path} is not read, so that {path.stem} would count as a video without labels: expected an annotation that "
        f"ends in {' or '.join(TEXTS)}, got {got}. Write it as text, with the header valence,arousal and a row per "
        "frame, or move it away."
    )


def _nothing(layout: Layout, split: str) -> str:
    root = layout.root
    if not layout.sources or split == "all":
        return f"There is no video in {root}; expected {EXPECTED}."
    if split == "test":
        return f"Every video in {root} has labels, so there is none to test on; use train, validate or all."
    advice = f"create annotations/{split}/<video>.txt, with the header valence,arousal and a row per frame"
    if (root / "npy_data").is_dir() and not (root / "annotations").is_dir():
        advice += f", or move videos with their {LABELS} into npy_data/{split}/"
    return f"The {split} split of {root} is empty: {advice}."
