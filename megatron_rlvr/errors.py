"""User errors: what the user can correct."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can put right: a setting, a file, a data line.

    Its text is one line that says what was wrong, what was found and what to write instead. The command-line
    programs print that line to stderr without a traceback and exit with status 2.
    """


@contextmanager
def as_user_error() -> Iterator[None]:
    """Raise a ValueError from inside as a UserError: for `control` and `objectives`, which know nothing of ours."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
