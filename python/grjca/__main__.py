"""Entry point of ``grjca`` and ``python -m grjca``, with signal handling. :mod:`grjca.cli` defines the commands.

Ctrl-C and SIGTERM raise an exception, so that every ``with`` and ``finally`` cleans up, and the process exits with 130
or 143. It exits at once if a second signal arrives, if the first one arrives during an import, or if cleaning up takes
longer than ``PATIENCE``.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

from grjca.errors import Stopped

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
PATIENCE = 10.0  # seconds for cleaning up; docker stop waits equally long


def program() -> int:
    """Run the command in ``sys.argv`` and return the exit code."""
    code = 0  # the exit code of the first signal, once there is one

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal code
        if code:
            os._exit(code)
        code = CODES[signal.Signals(number)]
        if _imports(frame):
            os.write(2, b"grjca: interrupted.\n")
            _end(code)
        from threading import Timer

        last = Timer(PATIENCE, _end, [code])
        last.daemon = True
        last.start()
        raise Stopped

    def lost(unraisable: Any) -> None:  # Python calls this where it cannot raise, as in a finaliser
        if isinstance(unraisable.exc_value, Stopped):
            _end(code)
        sys.__unraisablehook__(unraisable)

    sys.unraisablehook = lost
    for number in CODES:
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup and in a shell's background
            signal.signal(number, stop)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a file's name need not be Unicode
    try:
        from grjca.cli import main

        done = main()
        return code or done
    except BaseException:
        if code:  # a library may have replaced Stopped by another exception
            return code
        raise
    finally:
        for number in CODES:  # a signal during shutdown would only print a traceback
            signal.signal(number, signal.SIG_IGN)


def _end(code: int) -> None:
    """End the process now, where no exception can unwind it, and leave no temporary files behind."""
    delete = getattr(sys.modules.get("grjca.files"), "delete_unfinished", None)
    if delete is not None:
        delete()
    os._exit(code)


def _imports(frame: FrameType | None) -> bool:
    """Return whether ``frame`` is inside an import. torch aborts if an exception interrupts its import."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


if __name__ == "__main__":
    sys.exit(program())
