"""Files of tensors, in the format of safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from grjca import files
from grjca.errors import UserError

ABOUT = "grjca"
"""The one entry of a file's metadata."""


def write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors, and ``about`` for :func:`read_about`. Equal content gives equal bytes."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    metadata = {ABOUT: json.dumps(about, allow_nan=False)}  # one entry, because the order of several is random
    # Not save_file, whose own temporary file a killed process would leave behind.
    files.write(path, lambda file: file.write(save(contiguous, metadata)))


def read(path: Path) -> dict[str, Tensor]:
    """Read the tensors, mapped from the file.

    Raises:
        OSError, SafetensorError: if the file cannot be read, or is in another format.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file")
    return load_file(path)


def read_about(path: Path) -> dict[str, Any]:
    """Read the ``about`` of :func:`write`; an empty dict for a file that another program has written.

    Raises:
        UserError: if ``about`` is not a JSON object.
    """
    with safe_open(path, "pt") as file:
        about = files.parse_json(path, (file.metadata() or {}).get(ABOUT, "{}"))
    if not isinstance(about, dict):
        raise UserError(f"{path}: expected a table of names and values in its metadata, got {about!r:.60}.")
    return about
