"""What a user can mend: the command line shows it as one sentence, everything else with a traceback."""


class UserError(ValueError):
    """Something outside the program is wrong. The message says what, where, what was expected, and what to do."""
