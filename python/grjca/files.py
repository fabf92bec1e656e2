"""Files that are either whole or not there, whenever the process is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

PARTIAL = ".partial"
"""Ends the name of a file that is being written. One that a killed process has left can be deleted."""


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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write(path, lambda partial: save_file(contiguous, partial, dict(metadata)))


def remove_partial(folder: Path) -> None:
    """Delete what a killed process has left half-written in ``folder`` and below."""
    for partial in folder.rglob(f".*{PARTIAL}"):
        partial.unlink()
