"""Errors that a user can fix. The command line shows them as one sentence, and all others with a traceback."""

import re


class UserError(ValueError):
    """An error outside the program. The message says what is wrong and where, what was expected, and what to do."""


class Stopped(KeyboardInterrupt):
    """Raised when Ctrl-C or SIGTERM asks the process of a command to end."""


def printable(text: str) -> str:
    """Escape control characters in ``text``. A file's name may hold some, and a terminal would obey them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)
