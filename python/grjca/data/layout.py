"""Where the files of a data folder are, and which video belongs to which split. Nothing here opens a file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from grjca.errors import UserError

OFFICIAL = ("train", "validate")
SPLITS = (*OFFICIAL, "test", "all")
FOLDS = 5
LABELS = "VA_continuous_label.npy"
EXPECTED = "annotations/{train,validate}/<video>.txt and features/<video>/{visual,audio}.npy, or npy_data/"


@dataclass(frozen=True)
class Source:
    """The files of one video; those of its features may turn out not to exist."""

    name: str
    split: str | None
    """train, validate or test as the folders say; None if it has labels and nothing says where it belongs."""
    labels: Path | None
    """.txt or .npy"""
    folder: Path
    visual: Path
    audio: Path


@dataclass(frozen=True)
class Layout:
    """What a data folder holds."""

    root: Path
    sources: list[Source]
    """by name"""
    problems: list[str]
    """names that are there twice"""
    strays: list[Path]
    """entries that are neither an annotation nor a folder of features"""


@dataclass(frozen=True)
class _Folder:
    """Features of one video."""

    path: Path
    part: str | None = None
    """Of npy_data/{train,validate,test}/<video>."""
    plain: bool = True


def find(root: Path) -> Layout:
    """Everything in ``root``; UserError if that is no data folder."""
    _check_root(root)
    strays: list[Path] = []
    annotations = list(_annotations(root, strays))
    folders = list(_folders(root, strays))
    features = {folder.path.name: folder for folder in folders}
    if (root / "annotations").is_dir():
        annotated = {path.stem: path for path in annotations}
        sources = [
            _source(name, path.parent.name, path, features.get(name) or _missing(root, name))
            for name, path in annotated.items()
        ]
        sources += [_source(name, "test", None, features[name]) for name in features.keys() - annotated.keys()]
    else:
        sources = [_unannotated(name, folder) for name, folder in features.items()]
    clashes = list(_clashes(annotations, [folder.path for folder in folders]))
    return Layout(root, sorted(sources, key=lambda source: source.name), clashes, strays)


def select(layout: Layout, split: str, fold: int = 0) -> list[Source]:
    """Videos of ``split``: train and validate of this fold, test, or all. UserError if there are none."""
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
    """Names to train on and to validate on, each sorted.

    Fold 0 is the official split. Fold f = 1 to 5 validates on chunk 5 - f of the sorted training names, whose
    boundaries are i n // 5, and trains on the others and the official validation part. As published, chunks may part
    the two faces of a video.

    Raises:
        UserError: there is no such fold, or there are too few videos for it.
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


def _check_root(root: Path) -> None:
    if not root.exists():
        raise UserError(f"The data folder {root} does not exist; expected {EXPECTED}.")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder; give the folder that holds {EXPECTED}.")
    there = [name for name in ("annotations", "features", "npy_data") if (root / name).is_dir()]
    if not there:
        raise UserError(f"{root} holds none of the folders annotations, features and npy_data; expected {EXPECTED}.")
    if there == ["annotations"]:
        raise UserError(f"{root} has annotations but no features: create features/<video>/{{visual,audio}}.npy beside.")


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, sorted, without hidden files; nothing if there is no such folder."""
    if not folder.is_dir():
        return []
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read: {error.strerror}.") from error


def _annotations(root: Path, strays: list[Path]) -> Iterator[Path]:
    for split in OFFICIAL:
        for path in _entries(root / "annotations" / split):
            if path.suffix.lower() == ".txt":
                yield path
            else:
                strays.append(path)


def _folders(root: Path, strays: list[Path]) -> Iterator[_Folder]:
    parts = {root / "npy_data" / part: part for part in (*OFFICIAL, "test")}
    found = [_Folder(path) for path in _entries(root / "features")]
    found += [_Folder(path, plain=False) for path in _entries(root / "npy_data") if path not in parts]
    found += [_Folder(path, part, plain=False) for base, part in parts.items() for path in _entries(base)]
    for folder in found:
        if folder.path.is_dir():
            yield folder
        else:
            strays.append(folder.path)


def _missing(root: Path, name: str) -> _Folder:
    """Where the features of an annotated video should have been."""
    plain = (root / "features").is_dir()
    return _Folder(root / ("features" if plain else "npy_data") / name, plain=plain)


def _source(name: str, split: str | None, labels: Path | None, folder: _Folder) -> Source:
    path = folder.path
    if folder.plain:
        return Source(name, split, labels, path, path / "visual.npy", path / "audio.npy")
    use_logmel = not (path / "vggish.npy").exists() and (path / "logmel.npy").exists()
    audio = path / ("logmel.npy" if use_logmel else "vggish.npy")
    return Source(name, split, labels, path, path / "video.npy", audio)


def _unannotated(name: str, folder: _Folder) -> Source:
    """A video where no annotations/ say anything: npy_data may."""
    labels = folder.path / LABELS
    if folder.part in OFFICIAL:
        return _source(name, folder.part, labels, folder)
    if folder.plain or folder.part == "test" or not labels.exists():
        return _source(name, "test", None, folder)
    return _source(name, None, labels, folder)


def _clashes(annotations: list[Path], folders: list[Path]) -> Iterator[str]:
    """Names that are there twice, also if they differ only in case: not every system tells those apart."""
    places: defaultdict[str, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    for path in annotations:
        places[path.stem.casefold()][0].append(path)
    for path in folders:
        places[path.name.casefold()][1].append(path)
    for _, (texts, features) in sorted(places.items()):
        for kind, paths in (("annotation", texts), ("features", features)):
            if len(paths) > 1:
                yield (
                    f"The same video is there twice, as {kind} {paths[0]} and {paths[1]}; "
                    "remove or rename one (upper and lower case count as equal)."
                )
        if texts and features and texts[0].stem != features[0].name:
            yield f"The names of {texts[0]} and {features[0]} differ in case; spell them alike."


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
