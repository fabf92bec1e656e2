"""The process of a command: ``grjca``, or ``python -m grjca``. What the commands are is in :mod:`grjca.cli`.

A signal to stop is raised as an exception, by which everything cleans up behind itself, and the process ends with 130
after Ctrl-C, or 143 after SIGTERM. It ends at once by a second one, by one that comes while a module is imported, and
when cleaning up takes long.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

from grjca.errors import Stopped

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
PATIENCE = 10.0  # seconds to clean up in, as docker stop gives


def program() -> int:
    """Run the command of ``sys.argv``; the exit code."""
    code = 0  # once there is a signal, its own

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal code
        if code:
            os._exit(code)
        code = CODES[signal.Signals(number)]
        if _imports(frame):
            os.write(2, b"grjca: interrupted.\n")
            os._exit(code)
        from threading import Timer

        last = Timer(PATIENCE, os._exit, [code])
        last.daemon = True
        last.start()
        raise Stopped

    def lost(unraisable: Any) -> None:  # of a finaliser or a callback, where nothing can be raised
        if isinstance(unraisable.exc_value, Stopped):
            os._exit(code)
        sys.__unraisablehook__(unraisable)

    sys.unraisablehook = lost
    for number in CODES:
        if signal.getsignal(number) != signal.SIG_IGN:  # as it is after nohup, and where a shell does not wait
            signal.signal(number, stop)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a name need not be Unicode
    try:
        from grjca.cli import main

        done = main()
        return code or done
    except BaseException:
        if code:  # whatever became of it, on its way through the libraries
            return code
        raise
    finally:
        for number in CODES:  # the interpreter is about to end, and would show a traceback
            signal.signal(number, signal.SIG_IGN)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported there. An exception would be one of C++ too many for some, as for torch."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


if __name__ == "__main__":
    sys.exit(program())
