"""What a user can mend: the command line shows it as one sentence, everything else with a traceback."""

import re


class UserError(ValueError):
    """Something outside the program is wrong. The message says what, where, what was expected, and what to do."""


class Stopped(KeyboardInterrupt):
    """The process of a command was asked to end, by Ctrl-C or SIGTERM."""


def printable(text: str) -> str:
    """``text`` with control characters, which a file's name may hold, escaped: they would command the terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)
