"""What a user can mend: the command line shows it as one sentence, everything else with a traceback."""

import re


class UserError(ValueError):
    """Something outside the program is wrong. The message says what, where, what was expected, and what to do."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM has asked the process of a command to end."""


def printable(text: str) -> str:
    """``text`` with its control characters escaped. A file's name may hold some, and a terminal would obey them."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)
