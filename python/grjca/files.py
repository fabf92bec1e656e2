"""Files that are either whole or not there, whenever the process is killed, and reading that comes to an end."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from filelock import FileLock, Timeout

from grjca.errors import UserError

MOST = 1 << 26
"""Bytes of a file of text or JSON. Ten hours of annotations at 30 frames a second are a third of it."""

_PARTIAL = re.compile(r"\.grjca-[0-9a-f]{16}\.partial")

# ---- writing


def is_partial(path: Path) -> bool:
    """Whether this is the name of a file or folder that is being written, or that a killed process has left."""
    return _PARTIAL.fullmatch(path.name) is not None


def _partial(path: Path) -> Path:
    """Beside ``path``, at random: what somebody else has prepared or left there is not in the way."""
    return path.with_name(f".grjca-{secrets.token_hex(8)}.partial")


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Let ``fill`` write a new file beside ``path``, then put it in its place in one step. A link there is replaced."""
    partial = _partial(path)
    try:
        with open(partial, "xb") as file:  # x: never through a link
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        error.filename, error.filename2 = str(path), None  # of a full disk, the system says no name
        raise
    finally:
        partial.unlink(missing_ok=True)  # gone already unless something failed


def write_text(path: Path, text: str) -> None:
    """``text`` in UTF-8, with \\n at the end of lines on every system."""
    write(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """``value`` as JSON; NaN, which JSON does not have, is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """A line of JSON for each value."""
    write_text(path, "".join(json.dumps(value, allow_nan=False) + "\n" for value in values))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``folder`` at the end of the ``with`` block, or disappears if that fails.

    ``folder`` must not exist, or be empty.
    """
    folder = folder.resolve()
    partial = _partial(folder)
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rmdir()  # Windows renames onto nothing, not even an empty folder
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already unless something failed


def remove_partial(folder: Path) -> None:
    """Delete files that a killed process has left half-written in ``folder``, if there is one.

    The caller holds its lock: nobody else writes there. Folders are stepped over, for those may still be written to.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_partial(path) and (path.is_symlink() or not path.is_dir()):
            path.unlink()


def make_folder(folder: Path) -> None:
    """Make ``folder``, and those it is in, and see that files can be written there.

    Raises:
        UserError: if not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--out: {folder} cannot be made or written to ({error.strerror}); choose another folder."
        ) from error


def check_new_folder(folder: Path) -> None:
    """Refuse what :func:`whole_folder` cannot put in its place; UserError says why."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out: {folder} exists already; choose another, or delete it.")
    if os.path.ismount(folder):
        raise UserError(f"--out: {folder} is a mount point, and cannot appear as a whole; choose a folder in it.")
    make_folder(folder.absolute().parent)


# ---- one process at a time

LOCK = ".lock"


def lock(folder: Path) -> FileLock:
    """What the one process holds that writes to ``folder``; the system frees it when that process ends, however."""
    return FileLock(folder / LOCK, timeout=0)


def take(lock: FileLock, doing: str) -> None:
    """Acquire a :func:`lock`, and delete what its last holder may have left half-written.

    Raises:
        UserError: if another process holds it, which ``doing`` says: "trains".
    """
    folder = Path(lock.lock_file).parent
    if os.path.islink(lock.lock_file):
        raise UserError(f"{lock.lock_file}: expected no link, got one; remove it.")
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{folder}: another process {doing} there; wait for it, or choose another --out.") from error
    remove_partial(folder)


@contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """A ``with`` block in which no other process writes to ``folder``; see :func:`take`."""
    of_folder = lock(folder)
    take(of_folder, doing)
    try:
        yield
    finally:
        of_folder.release()


# ---- reading


def read_bytes(path: Path, most: int = MOST) -> bytes:
    """What is in a file of at most ``most`` bytes.

    Raises:
        UserError: for a larger one, and for what is no file, as a pipe or a device, that might never end.
        OSError: if it cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe would wait for a writer
    descriptor = os.open(path, flags)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{path}: expected a regular file, got a folder, a pipe, a socket or a device.")
    except BaseException:
        os.close(descriptor)
        raise
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(most + 1) or b""  # None of what has nothing to say, as some in /proc
    if len(content) > most:
        raise UserError(f"{path}: expected a file of at most {most} bytes, got {found.st_size}.")
    return content


def read_json(path: Path) -> Any:
    """The inverse of :func:`write_json`.

    Raises:
        UserError: if that is not what it holds.
        OSError: if it cannot be read.
    """
    return parse_json(path, read_bytes(path))


def parse_json(path: Path, text: str | bytes) -> Any:
    """What ``text``, of the file ``path``, says in JSON; UserError if nothing."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"it holds {constant}")

    def number(digits: str) -> float:
        return float(digits) if math.isfinite(float(digits)) else refuse(digits[:20])

    try:
        return json.loads(text, parse_constant=refuse, parse_float=number)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: expected JSON, got something else ({reason}).") from error
