"""Checks of the state that run.json of a checkpoint holds, before any of it is restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_rlvr.checked_input import InvalidInputError, checked
from megatron_rlvr.errors import UserError


@contextmanager
def run_state_errors() -> Iterator[None]:
    """Convert an InvalidInputError that the block raises to a UserError that says what to do with the checkpoint."""
    try:
        yield
    except InvalidInputError as error:
        raise UserError(
            f"run.json of the checkpoint holds no state of this run ({error}): remove this checkpoint to continue "
            "from the one before"
        ) from error


def check_alike(present: Any, saved: Any, name: str) -> None:
    """Raise InvalidInputError if a saved state lacks an entry of the present one, or has another type there."""
    if isinstance(present, dict):
        checked(saved, dict, name)
        for key, value in present.items():
            if key not in saved:
                raise InvalidInputError(f"no {key!r} in {name!r}")
            check_alike(value, saved[key], key)
    elif isinstance(present, list):
        if present and len(checked(saved, list, name)) != len(present):
            raise InvalidInputError(f"{name!r} has {len(saved)} entries instead of {len(present)}")
        for number, value in enumerate(checked(saved, list, name)):  # an empty list is filled when a filter starts
            check_alike(present[number] if present else [] if isinstance(value, list) else 0.0, value, name)
    elif present is not None:
        checked(saved, type(present) if isinstance(present, bool | str) else float, name)
    elif saved is not None:  # measured in the first steps of a run
        checked(saved, float, name)
