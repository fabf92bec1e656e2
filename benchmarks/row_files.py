"""Rows of a processor: a JSON file for each machine, whole whenever it is read; and of which sources they are."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import VARYING, provenance

ROOT = Path(__file__).parents[1]

Row = dict[str, Any]


def file_of(folder: Path, about: Row) -> Path:
    """The file of the machine of ``about``, a row or what benchmarks.cases.provenance tells."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{about['device']} {about['threads']} threads".lower()).strip("-")
    return folder / f"{name}.json"


def read(path: Path) -> list[Row]:
    return json.loads(path.read_text()) if path.exists() else []


def write(path: Path, rows: Sequence[Row]) -> None:
    """A line for each row. Whoever kills this leaves the file as it was."""
    from grjca import files  # here, because it takes safetensors, and reading rows does not

    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in rows) + "\n]\n")


def state_of(globs: Iterable[str], root: Path = ROOT) -> str:
    """A short name for the state of these sources: a row that is written makes the tree dirty, and so has no commit."""
    digest = hashlib.sha256()
    for path in sorted({path for glob in globs for path in root.glob(glob) if path.is_file()}):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def keep(path: Path, row: Row) -> None:
    """Write ``row``, in the place of an older one of its name; whoever kills this leaves the file as it was."""
    rows = read(path)
    place = next((i for i, other in enumerate(rows) if other["row"] == row["row"]), len(rows))
    write(path, [*rows[:place], row, *rows[place + 1 :]])


def remove(path: Path, name: str) -> None:
    rows = read(path)
    if any(row["row"] == name for row in rows):
        write(path, [row for row in rows if row["row"] != name])


def is_known(rows: Sequence[Row], place: Row) -> bool:
    """Whether what ``place`` describes has been measured with these sources, settings and versions."""
    about = provenance()
    # A row that is written makes the tree dirty, so that the sources, not the commit, have to be the same.
    wanted = {**place, **{name: about[name] for name in about if name not in VARYING}}
    return any(wanted.items() <= row.items() for row in rows)
