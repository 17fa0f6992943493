"""Target curves: the entropy that a run should have, over its progress."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, get_args

from megatron_rlvr.control.bounds import Within, check_bounds

CurveName = Literal["constant", "linear", "cosine", "piecewise", "file"]
CURVES: tuple[str, ...] = get_args(CurveName)


CurveNumber = Annotated[float, Within(0.0, includes_low=True)]


@dataclass(frozen=True)
class EntropyCurve:
    """A target entropy over progress x from 0 to 1, in multiples of the entropy at step 0 or in nats per token.

    Raises ValueError for an unknown name, a missing or unused parameter, a value not above 0, or a bad file (with the
    line number).
    """

    curve: CurveName = "constant"
    """The form of the target curve: ``constant`` (``start`` throughout), ``linear`` or ``cosine`` (from ``start`` to
    ``end``, on a straight line or half a cosine), ``piecewise`` (straight lines through ``points``), or ``file`` (the
    same through the points in ``file``)."""
    start: Annotated[float, Within(0.0)] = 1.0
    """Target at the start of the run."""
    end: Annotated[float, Within(0.0)] | None = None
    """Target at the end of the run, for ``linear`` and ``cosine``."""
    points: Sequence[Sequence[CurveNumber]] | None = None
    """Pairs [progress, entropy] for ``piecewise``, with increasing progress from 0 to 1. The target is constant before
    the first and after the last."""
    file: str | None = None
    """CSV file for ``file``, with the header line ``progress,entropy`` and one point per line."""
    relative: bool = True
    """Whether targets are multiples of the initial entropy; otherwise they are in nats per token."""

    def __post_init__(self) -> None:
        if self.curve not in CURVES:
            raise ValueError(f"target curve: unknown name {self.curve!r}; valid: {', '.join(CURVES)}")
        for parameter, curves in (("end", ("linear", "cosine")), ("points", ("piecewise",)), ("file", ("file",))):
            is_set = getattr(self, parameter) is not None
            if is_set != (self.curve in curves):
                if is_set:
                    raise ValueError(
                        f"target curve: {self.curve} takes no {parameter}; remove it or choose {' or '.join(curves)}"
                    )
                raise ValueError(f"target curve: {self.curve} needs {parameter}")
        points = read_points(self.file) if self.file is not None else self.points
        if points is not None:
            object.__setattr__(self, "points", _checked(points))
        check_bounds(self, "target curve")

    def value(self, progress: float, initial_entropy: float) -> float:
        """The target at ``progress`` (clamped to [0, 1]) in nats. ``initial_entropy`` is the entropy at step 0."""
        x = min(max(progress, 0.0), 1.0)
        return self._shape(x) * (initial_entropy if self.relative else 1.0)

    def _shape(self, x: float) -> float:
        if self.points is not None:
            return _interpolate(self.points, x)
        if self.end is None:
            return self.start
        if self.curve == "cosine":
            x = 0.5 - 0.5 * math.cos(math.pi * x)
        return self.start + (self.end - self.start) * x


def read_points(file: str) -> list[tuple[float, float]]:
    """Read the points (progress, entropy) from a CSV file with the header ``progress,entropy``.

    Raises ValueError for a missing file, another header or a line that is not two numbers.
    """
    if not os.path.isfile(file):  # noqa: PTH113, Path.is_file raises for a name that is too long
        raise ValueError(f"target curve: no such file: {file}")
    try:
        with Path(file).open(newline="", encoding="utf-8") as lines:
            rows = list(csv.reader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"target curve: {file} cannot be read as CSV: {error}") from error
    if not rows or [cell.strip() for cell in rows[0]] != ["progress", "entropy"]:
        found = ",".join(rows[0])[:100] if rows else ""
        raise ValueError(f"target curve: {file}, line 1: expected 'progress,entropy', found {found!r}")
    points = []
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        try:
            progress, entropy = (float(cell) for cell in row)
        except ValueError as error:
            found = str(row)[:100]
            raise ValueError(f"target curve: {file}, line {number}: expected two numbers, found {found}") from error
        points.append((progress, entropy))
    return points


def _checked(points: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    if len(points) == 0:
        raise ValueError("target curve: no points given; write at least one pair [progress, entropy]")
    for point in points:
        if len(point) != 2 or not _number(point[0]) or not 0.0 <= point[0] <= 1.0 or not _positive(point[1]):
            raise ValueError(
                f"target curve: a point must be [progress in 0 to 1, entropy above 0], found {list(point)!r}"
            )
    checked = tuple((float(x), float(y)) for x, y in points)
    for (left, _), (right, _) in pairwise(checked):
        if not left < right:
            raise ValueError(f"target curve: the points' progress must increase, found {left:g} before {right:g}")
    return checked


def _interpolate(points: Sequence[Sequence[float]], x: float) -> float:
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e6


def _positive(value: object) -> bool:
    return _number(value) and value > 0  # type: ignore[operator]
