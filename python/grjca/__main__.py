"""The process of a command: ``grjca``, or ``python -m grjca``. What the commands are is in :mod:`grjca.cli`.

Ctrl-C and SIGTERM raise an exception, so that every ``with`` and ``finally`` cleans up, and the process ends with 130
or 143. It ends at once if a second signal comes, if the first one comes while a module is imported, or if cleaning up
takes long.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

from grjca.errors import Stopped

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
PATIENCE = 10.0  # seconds for cleaning up; docker stop waits as long


def program() -> int:
    """Run the command of ``sys.argv``; the exit code."""
    code = 0  # the exit code of the first signal, once there is one

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

    def lost(unraisable: Any) -> None:  # Python calls this where it cannot raise: in a finaliser or a callback
        if isinstance(unraisable.exc_value, Stopped):
            os._exit(code)
        sys.__unraisablehook__(unraisable)

    sys.unraisablehook = lost
    for number in CODES:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup, and a shell in the background, have it ignored
            signal.signal(number, stop)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a file's name need not be Unicode
    try:
        from grjca.cli import main

        done = main()
        return code or done
    except BaseException:
        if code:  # libraries may have made another exception of it
            return code
        raise
    finally:
        for number in CODES:  # a signal from here on would only make the ending interpreter print a traceback
            signal.signal(number, signal.SIG_IGN)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported in ``frame``. torch aborts where an exception comes into its import."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


if __name__ == "__main__":
    sys.exit(program())
