"""Bounds of numeric parameters, declared next to the parameter: ``split: Annotated[float, Within(0.0, 1.0)] = 0.5``."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Within:
    """The numbers between ``low`` and ``high``, without the two; with ``low`` itself if ``includes_low``.

    Numbers above ``cap`` are not meant by anyone, and would overflow somewhere.
    """

    low: float
    high: float = math.inf
    includes_low: bool = False
    cap: float = 1e6

    def allow(self, value: float) -> bool:
        """Whether ``value`` is within the bounds; NaN is not."""
        return value <= self.cap and (self.low < value < self.high or (self.includes_low and value == self.low))

    def requirement(self, value: float) -> str:
        """Complete "must be ..." for a ``value`` that is not allowed."""
        return f"at most {self.cap:g}" if self.cap < value <= self.high else str(self)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'at least' if self.includes_low else 'greater than'} {self.low:g}"
        return f"in {'[' if self.includes_low else '('}{self.low:g}, {self.high:g})"


def check_bounds(parameters: Any, subject: str) -> None:
    """Check every field of the dataclass ``parameters`` that is annotated with Within; None passes.

    Raises ValueError, which starts with ``subject``, for a value that is not a number or not within its bounds.
    """
    owner: type = type(parameters)
    for name, (number, within) in _bounds(owner).items():
        value = getattr(parameters, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int if number is int else int | float):
            kind = "a whole number" if number is int else "a number"
            raise ValueError(f"{subject}: {name} must be {kind} {within}, found {value!r}")
        if not within.allow(value):
            raise ValueError(f"{subject}: {name} must be {within.requirement(value)}, found {value!r}")


ThresholdParameter = Annotated[float, Within(-1e6)]
"""Slope or intercept of a clip threshold; a large one disables the threshold."""


@functools.cache
def _bounds(owner: Any) -> dict[str, tuple[type, Within]]:
    """The number type (int or float) and the bounds of each bounded field."""
    bounds = {}
    for name, annotation in get_type_hints(owner, include_extras=True).items():
        for part in (annotation, *get_args(annotation)):  # an optional number has its bounds inside a union
            if get_origin(part) is Annotated:
                number, mark = get_args(part)
                if isinstance(mark, Within):
                    bounds[name] = number, mark
    return bounds
