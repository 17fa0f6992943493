"""The error that a user can mend."""


class UserError(Exception):
    """Something the user can put right: a setting, a file, a data line.

    Its text is one line that says what was wrong, what was found and what to write instead. The command-line
    programs print that line to stderr without a traceback and exit with status 2.
    """
