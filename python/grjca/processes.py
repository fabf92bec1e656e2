"""Processes that work for this one. They begin anew, for a fork of a process in which threads run (of gloo, say) can
hang; and they leave Ctrl-C, which reaches all processes of a terminal, to the one that began them."""

from __future__ import annotations

import signal
import threading
from multiprocessing.context import SpawnContext, SpawnProcess


class _Process(SpawnProcess):
    def start(self) -> None:
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().start()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # which a new process inherits
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self) -> None:
        threading.excepthook = _unless_left
        super().run()


def _unless_left(arguments: threading.ExceptHookArgs) -> None:
    """Of a thread that hands over what nobody takes any more, nothing is said."""
    if not issubclass(arguments.exc_type, ConnectionError | EOFError):
        threading.__excepthook__(arguments)


class Context(SpawnContext):
    """For DataLoader and multiprocessing.Pool."""

    Process = _Process
