"""Errors that the user can correct."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class UserError(Exception):
    """Something that the user can correct: a setting, a file, a line of data.

    Its text is one line that says what was wrong, what was found and what to write instead. The command-line programs
    print this line to stderr without a traceback and exit with `exit_status`.
    """

    exit_status: ClassVar[int] = 2


@contextmanager
def as_user_error() -> Iterator[None]:
    """Convert a ValueError that the block raises to a UserError.

    `control`, `ops` and `objectives` raise ValueError, because other trainers use them without this package's errors.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
