"""Worker processes, for DataLoader and multiprocessing.Pool.

They are spawned, because a fork of a process in which threads run (of gloo, say) can hang. They ignore Ctrl-C, which
reaches all processes of a terminal: the process that began them answers it.
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
    """Print a thread's exception, unless the thread was handing a tensor to a process that has ended."""
    if not issubclass(arguments.exc_type, ConnectionError | EOFError):
        threading.__excepthook__(arguments)


class Context(SpawnContext):
    """What DataLoader takes as ``multiprocessing_context``, and whose ``Pool`` is that of multiprocessing."""

    Process = _Process
