"""Readers of single files. They refuse anything unexpected, naming the file and the line or frame, and never
unpickle."""

from __future__ import annotations

import math
from array import array as packed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grjca import files
from grjca.errors import UserError

HEADER = "valence,arousal"
CHUNK = 4096  # rows checked at a time: 8 MB for 512 features

LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Form:
    """Format of a modality's file: [N, *row] of one of ``dtypes``."""

    what: str
    """for messages"""
    row: tuple[int, ...]
    dtypes: tuple[str, ...] = ("float16", "float32", "float64")

    def __str__(self) -> str:
        *some, last = self.dtypes
        return f"{self.what} {['N', *self.row]} of {', '.join(some)}{' or ' * bool(some)}{last}".replace("'", "")

    @property
    def dtype(self) -> np.dtype:
        """Dtype after reading: float32 where any precision is accepted."""
        return np.dtype(np.float32 if len(self.dtypes) > 1 else self.dtypes[0])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row after reading."""
        return math.prod(self.row) * self.dtype.itemsize


ARRAYS = {
    "visual": Form("pictures", (48, 48, 3), ("uint8",)),
    "audio": Form("log-mel patches", (96, 64), ("float16",)),
}
"""Formats of the arrays that the face and voice networks read."""


def labels(path: Path) -> np.ndarray:
    """Read valence and arousal, [N, 2] float64, from a text annotation or VA_continuous_label.npy."""
    if path.suffix == ".npy":
        values = rows(path, Form("labels", (2,)))
        check_finite(values, path)
        return np.array(values, dtype=np.float64)
    return annotation(path)


def annotation(path: Path) -> np.ndarray:
    """Read a text with the header ``valence,arousal`` and two finite numbers per line: [N, 2] float64, N > 0.

    Numbers outside [-1, 1] are kept: -5 marks an invalid frame. A byte order mark, any line ends and empty lines at
    the end are accepted.
    """
    # Read line by line: library readers skip empty lines and comments, which would shift all later frames.
    header, *lines = _text(path).rstrip("\n").split("\n")
    if header != HEADER:
        raise UserError(f"{path}, line 1: expected the header {HEADER}, got {_quote(header)}.")
    if not lines:
        raise UserError(f"{path} has a header but no frames; expected a row per frame below it.")
    values = packed("d")
    for number, line in enumerate(lines, start=2):
        cells = [_number(cell) for cell in line.split(",")]
        if len(cells) != 2 or not all(abs(cell) <= LARGEST for cell in cells):
            raise UserError(f"{path}, line {number}: expected two numbers, valence,arousal, got {_quote(line)}.")
        values.extend(cells)
    return np.array(values).reshape(-1, 2)


def looks_annotated(path: Path) -> bool:
    """Return whether a text begins like an annotation rather than like a challenge file."""
    try:
        line = files.read_start(path, 100).decode("utf-8-sig", errors="replace").partition("\n")[0]
    except (OSError, UserError):
        return False
    columns = {cell.strip() for cell in line.lower().split(",")}
    return {*HEADER.split(",")} <= columns and "image_location" not in columns


def rows(path: Path, form: Form) -> np.memmap:
    """Map the rows of a file, [N, *row], N > 0."""
    expected = f"expected {form}"
    if not path.is_file():
        raise UserError(f"{path} is missing; {expected}.")
    try:
        # Unlike np.load, this cannot unpickle. NumPy does not document what it raises for a broken header.
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} is no readable .npy file of numbers ({reason}); {expected}. Write it again."
        ) from error
    shape = list(array.shape)
    if array.shape[1:] != form.row:
        advice = ""
        if len(form.row) == 1 and array.ndim > 2:
            advice = " A face or voice network makes features of pictures or log-mel patches: grjca extract."
        elif shape[:1] == [*form.row] and array.ndim == 2:
            advice = " Transpose the array, so that frames come first."
        raise UserError(f"{path} holds {shape}; {expected}.{advice}")
    if array.dtype.newbyteorder("=") not in map(np.dtype, form.dtypes):
        raise UserError(f"{path} holds {array.dtype} numbers; {expected}.")
    if not len(array):
        raise UserError(f"{path} holds no frames; {expected}.")
    surplus = path.stat().st_size - array.offset - array.nbytes
    if surplus:
        raise UserError(f"{path} holds {surplus} bytes more than its header says; {expected}. Write it again.")
    return array


def check_finite(array: np.ndarray, path: Path) -> None:
    """Raise a UserError that names the first frame, from 0, with a number that is not finite in float32."""
    array = array.reshape(len(array), -1)
    for start in range(0, len(array), CHUNK):
        with np.errstate(over="ignore"):
            finite = np.isfinite(array[start : start + CHUNK].astype(np.float32, copy=False))
        if not finite.all():
            frame, column = np.argwhere(~finite)[0]
            raise UserError(
                f"{path}, frame {start + frame} (counted from 0): column {column} holds "
                f"{array[start + frame, column]}; expected finite float32 numbers. Compute these features again."
            )


def _text(path: Path) -> str:
    try:
        text = files.read_bytes(path).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; expected {HEADER} and numbers.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _number(cell: str) -> float:
    """Parse a number, NaN if it is none; float() would also accept 0_5."""
    try:
        return math.nan if "_" in cell else float(cell)
    except ValueError:
        return math.nan


def _quote(line: str) -> str:
    return repr(line if len(line) <= 40 else line[:40] + "…")
