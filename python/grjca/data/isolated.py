"""Calls in separate processes, so that a crash, as of a library on a damaged file, affects only one call."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from multiprocessing import connection, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from grjca.errors import UserError
from grjca.training.processes import Context

Key = TypeVar("Key")


def each(function: Callable[..., Any], calls: Mapping[Key, tuple[Any, ...]], jobs: int) -> Iterator[tuple[Key, Any]]:
    """Yield the result of ``function(*calls[key])`` for every key, as calls finish, or the UserError that it raises.

    An OSError or a crash of the process becomes a UserError. If the caller stops or dies, the calls end.

    Args:
        function: a function from a module that is quick to import; it and its arguments are pickled.
        jobs: number of calls at the same time.
    """
    waiting = iter(calls.items())
    running: dict[Any, tuple[Key, BaseProcess]] = {}
    try:
        while True:
            for key, arguments in islice(waiting, jobs - len(running)):
                ours, theirs = Context().Pipe(duplex=False)
                process: BaseProcess = Context().Process(target=_call, args=(theirs, function, arguments), daemon=True)
                process.start()
                theirs.close()
                running[ours] = key, process
            if not running:
                return
            for ready in connection.wait(list(running)):
                key, process = running[ready]
                outcome = _outcome(ready, process)
                del running[ready]
                yield key, outcome
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join()


def _outcome(end: Any, process: BaseProcess) -> Any:
    try:
        outcome = end.recv()
    except EOFError:
        outcome = None
    process.join()
    if outcome is not None:
        return outcome
    return UserError(f"The process that made it ended unexpectedly (exit code {process.exitcode}); try it by itself.")


def _call(end: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        outcome = function(*arguments)
    except (UserError, OSError) as error:
        outcome = UserError(str(error))
    end.send(outcome)


def _end_with_parent() -> None:
    """End this process when its parent dies, because a killed parent cannot end its children."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
