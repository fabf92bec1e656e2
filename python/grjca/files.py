"""Atomic writing of files and folders, locks, and reading that cannot block or grow without limit."""

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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from filelock import FileLock, Timeout

from grjca.errors import UserError

MOST = 1 << 26
"""Maximum size of a text or JSON file, in bytes; three times that of ten hours of annotations at 30 frames per second.
"""

_PARTIAL = re.compile(r"\.grjca-[0-9a-f]{16}\.partial")
_UNFINISHED: set[Path] = set()
TRIES = 100

# ---- writing


def is_partial(path: Path) -> bool:
    """Return whether ``path`` is a temporary file or folder of this module, in use or left by a killed process."""
    return _PARTIAL.fullmatch(path.name) is not None


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """Yield a random name beside ``path``, so that no planted or leftover file is in the way; delete it at the end."""
    partial = path.with_name(f".grjca-{secrets.token_hex(8)}.partial")
    _UNFINISHED.add(partial)
    try:
        yield partial
    finally:
        _delete(partial)
        _UNFINISHED.discard(partial)


def _delete(partial: Path) -> None:
    """Delete a temporary file or folder; it is gone already unless something failed."""
    shutil.rmtree(partial, ignore_errors=True)
    with suppress(OSError):
        partial.unlink(missing_ok=True)


def delete_unfinished() -> None:
    """Delete all temporary files and folders of this process, which is about to end without cleaning up."""
    for partial in list(_UNFINISHED):
        for _ in range(TRIES):  # another thread may still be writing there
            _delete(partial)
            if not os.path.lexists(partial):
                break


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Let ``fill`` write a new file beside ``path``, then move it there in one step. A link at ``path`` is replaced."""
    with _partial(path) as partial:
        try:
            with open(partial, "xb") as file:  # x refuses existing files, and so never follows a link
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            error.filename, error.filename2 = str(path), None  # the system does not name the file when a disk is full
            raise


def write_text(path: Path, text: str) -> None:
    """Write ``text`` in UTF-8, with \\n at the end of lines on every system."""
    write(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON; NaN, which JSON does not have, is refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write a line of JSON for each value."""
    write_text(path, "".join(json.dumps(value, allow_nan=False) + "\n" for value in values))


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes ``folder`` at the end of the ``with`` block, or is deleted if that fails.

    ``folder`` must be empty or not exist.
    """
    folder = folder.resolve()
    with _partial(folder) as partial:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rmdir()  # Windows cannot rename onto a folder, even an empty one
        os.replace(partial, folder)


def remove_partial(folder: Path) -> None:
    """Delete the files that a killed process has left incomplete in ``folder``, which need not exist.

    The caller holds the lock of the folder, so that no other process writes files there. Folders are left alone,
    because ``predict``, which holds no lock, may be filling one.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_partial(path) and (path.is_symlink() or not path.is_dir()):
            path.unlink()


def make_folder(folder: Path) -> None:
    """Make ``folder`` and its parents, and check that files can be written there.

    Raises:
        UserError: if the system refuses either.
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
    """Raise UserError if :func:`whole_folder` could not put a folder in this place."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out: {folder} exists already; choose another, or delete it.")
    if os.path.ismount(folder):
        raise UserError(f"--out: {folder} is a mount point, and cannot appear as a whole; choose a folder in it.")
    make_folder(folder.absolute().parent)


# ---- one process at a time

LOCK = ".lock"


def lock(folder: Path) -> FileLock:
    """Return the lock of the one process that writes to ``folder``. The system frees it when the process ends."""
    return FileLock(folder / LOCK, timeout=0)


def take(held: FileLock, doing: str) -> None:
    """Acquire a :func:`lock`, and delete what its last holder may have left incomplete.

    Raises:
        UserError: if another process holds it. ``doing`` says what such a process does, for example "trains".
    """
    folder = Path(held.lock_file).parent
    if os.path.islink(held.lock_file):
        raise UserError(f"{held.lock_file}: expected no link, got one; remove it.")
    try:
        held.acquire()
    except Timeout as error:
        raise UserError(f"{folder}: another process {doing} there; wait for it, or choose another --out.") from error
    remove_partial(folder)


@contextmanager
def alone(folder: Path, doing: str) -> Iterator[None]:
    """Hold the :func:`lock` of ``folder`` within a ``with`` block; see :func:`take`."""
    held = lock(folder)
    take(held, doing)
    try:
        yield
    finally:
        held.release()


# ---- reading


def read_start(path: Path, count: int) -> bytes:
    """Read the first ``count`` bytes of a file.

    Raises:
        UserError: for a pipe, a socket or a device, which may never end.
        OSError: if it cannot be read.
    """

    def at_once(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # otherwise opening a pipe waits for a writer

    with open(path, "rb", opener=at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise UserError(f"{path}: expected a regular file, got a pipe, a socket or a device.")
        return file.read(count) or b""  # some files in /proc give None while they are empty


def read_bytes(path: Path, most: int = MOST) -> bytes:
    """Read a file of at most ``most`` bytes.

    Raises:
        UserError: for a larger file, or as :func:`read_start`.
        OSError: if it cannot be read.
    """
    content = read_start(path, most + 1)
    if len(content) > most:
        raise UserError(f"{path}: expected a file of at most {most} bytes, got a larger one.")
    return content


def read_json(path: Path) -> Any:
    """Read what :func:`write_json` has written.

    Raises:
        UserError: if the file holds anything else.
        OSError: if it cannot be read.
    """
    return parse_json(path, read_bytes(path))


def parse_json(path: Path, text: str | bytes) -> Any:
    """Parse ``text`` as JSON; a UserError that names ``path`` if it is not JSON or has numbers that are not finite."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"it holds {constant}")

    def number(digits: str) -> float:
        return float(digits) if math.isfinite(float(digits)) else refuse(digits[:20])

    try:
        return json.loads(text, parse_constant=refuse, parse_float=number)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: expected JSON, got something else ({reason}).") from error
