"""Worker processes, for DataLoader and multiprocessing.Pool.

They are spawned, because forking a process with running threads (gloo's, for example) can hang. They ignore Ctrl-C,
which reaches all processes of a terminal, and leave it to the process that started them.
"""

from __future__ import annotations

import signal
import threading
from multiprocessing.context import SpawnContext, SpawnProcess


class _Process(SpawnProcess):
    def start(self) -> None:
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().start()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the new process inherits the mask
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.excepthook = _excepthook
        super().run()


def _excepthook(arguments: threading.ExceptHookArgs) -> None:
    """Print a thread's exception, unless the thread was passing a tensor to a process that has ended."""
    if not issubclass(arguments.exc_type, ConnectionError | EOFError):
        threading.__excepthook__(arguments)


class Context(SpawnContext):
    """Context for DataLoader's ``multiprocessing_context`` and for ``Pool``."""

    Process = _Process
