"""Errors that the user can correct, and the text of errors on one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class UserError(Exception):
    """Something that the user can correct: a setting, a file, a line of data.

    Its text is one line that says what was wrong, what was found and what to write instead. The command-line programs
    print this line to stderr without a traceback and exit with `exit_status`. Characters that cannot be printed become
    spaces: a text from a file or from another program could break the line, or change a terminal.
    """

    exit_status: ClassVar[int] = 2

    def __str__(self) -> str:
        return "".join(character if character.isprintable() else " " for character in super().__str__())


def truncated(text: str, length: int) -> str:
    """Return a text of at most `length` characters; a longer one is cut and ends in three dots."""
    return text if len(text) <= length else text[: length - 3] + "..."


def first_line(error: BaseException) -> str:
    """Return the first line of the text of an error; its class if it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def as_user_error() -> Iterator[None]:
    """Convert a ValueError that the block raises to a UserError.

    `control`, `ops` and `objectives` raise ValueError, because other trainers use them without this package's errors.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
