"""Files that are either whole or not there, whenever the process is killed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

PARTIAL = ".partial"
"""Ends the name of a file that is being written. One that a killed process has left can be deleted."""
ABOUT = "grjca"
"""Metadata entry of a safetensors file."""


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a file beside ``path``, then put it in its place in one step."""
    partial = path.with_name(f".{path.name}{PARTIAL}")
    fill(partial)
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """``text`` in UTF-8, with \\n at the end of lines on every system."""
    write(path, lambda partial: partial.write_bytes(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """``value`` as JSON; NaN, which JSON does not have, is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """A line of JSON for each value."""
    write_text(path, "".join(json.dumps(value, allow_nan=False) + "\n" for value in values))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """A safetensors file; equal content gives equal bytes. ``about`` is what :func:`read_about` returns."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {ABOUT: json.dumps(about, allow_nan=False)}  # in one entry: of several, the order changes at random
    # Not save_file: that has a temporary file of its own, which a killed process would leave under a random name.
    write(path, lambda partial: partial.write_bytes(save(contiguous, metadata)))


def read_about(path: Path) -> dict[str, Any]:
    """What :func:`write_tensors` has noted; nothing if the file is of another origin."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get(ABOUT, "{}"))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``folder`` at the end of the ``with`` block, or disappears if that fails.

    ``folder`` must not exist, or be empty.
    """
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}{PARTIAL}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rmdir()  # Windows renames onto nothing, not even an empty folder
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already unless something failed


def remove_partial(folder: Path) -> None:
    """Delete what a killed process has left half-written in ``folder`` and below."""
    for partial in folder.rglob(f".*{PARTIAL}"):
        partial.unlink()
