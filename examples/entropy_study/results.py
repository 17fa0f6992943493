"""The measured values of a run, and comparisons of strategies over the same seeds."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rlvr.control import EntropyCurve
from megatron_rlvr.telemetry.metrics import Record

KS = (1, 2, 4, 8, 16, 32, 64)
# Two-sided 95 percent quantiles of Student's t by degrees of freedom. A comparison of n seeds has n - 1.
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


@dataclass(frozen=True)
class Run:
    """One finished run: its training steps and its evaluations on held-out prompts."""

    strategy: str
    seed: int
    steps: list[Record]
    evaluations: list[Record]

    def mean(self, name: str, last: int = 0) -> float:
        """Mean of a metric over all steps, or over the ``last`` few."""
        return statistics.mean(record[name] for record in self.steps[-last:])

    @property
    def entropy_kept(self) -> float:
        """Mean entropy of the last three steps divided by the entropy of the first step."""
        return self.mean("entropy", 3) / self.steps[0]["entropy"]

    @property
    def entropy_halfway(self) -> float:
        """Mean entropy of the three steps around half of the run divided by the entropy of the first step."""
        half = len(self.steps) // 2
        return statistics.mean(r["entropy"] for r in self.steps[half - 1 : half + 2]) / self.steps[0]["entropy"]

    @property
    def noise_floor(self) -> float:
        """Root mean square of the relative standard error of a step's entropy, over the steps of `tracking_error`."""
        return _rms(r["entropy_standard_error"] / r["entropy"] for r in self.steps[self._counted :])

    def tracking_error(self, curve: EntropyCurve) -> float:
        """Root mean square of measured / target - 1 after the first tenth of the steps."""
        start, total = self.steps[0]["entropy"], len(self.steps)
        return _rms(r["entropy"] / curve.value(r["step"] / total, start) - 1.0 for r in self.steps[self._counted :])

    @property
    def _counted(self) -> int:
        return math.ceil(len(self.steps) / 10)

    def pass_at(self, k: int, step: int) -> float:
        """pass@k of the policy after ``step`` steps; nan if it was not evaluated then."""
        return next((e.get(f"pass@{k}", math.nan) for e in self.evaluations if e["step"] == step), math.nan)

    @property
    def prediction_correlation(self) -> float:
        """Correlation over steps of the first-order entropy change with the one measured at the same states."""
        predicted = [r["entropy_change/predicted"] * r["lr"] for r in self.steps]
        return statistics.correlation(predicted, [r["entropy_change/measured"] for r in self.steps])


Runs = dict[str, dict[int, Run]]
"""strategy -> seed -> run."""


@dataclass(frozen=True)
class Difference:
    """One strategy minus another over the seeds that both have; the standard error is nan for fewer than two seeds."""

    mean: float
    standard_error: float
    seeds: int

    @classmethod
    def of(cls, each: Sequence[float]) -> Difference:
        """From the paired differences, one per seed."""
        error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        return cls(statistics.mean(each) if each else math.nan, error, len(each))

    @property
    def sign(self) -> int:
        """1 or -1 if the 95 percent interval excludes 0, else 0; always 0 for fewer than three seeds."""
        if self.seeds < 3 or not abs(self.mean) > STUDENT.get(self.seeds - 1, 2.2) * self.standard_error:
            return 0
        return 1 if self.mean > 0 else -1

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 3) -> str:
        """Mean ± standard error; bold if `sign` is not 0."""
        if self.seeds < 2:
            return f"{self.mean:+.{digits}f}" if self.seeds else ""
        text = f"{self.mean:+.{digits}f} ± {self.standard_error:.{digits}f}"
        return f"**{text}**" if self.sign else text


def difference(runs: Runs, strategy: str, other: str, value: Callable[[Run], float]) -> Difference:
    """``value`` of ``strategy`` minus that of ``other``, paired by seed (the same order of the data)."""
    shared = sorted(set(runs.get(strategy, {})) & set(runs.get(other, {})))
    each = [value(runs[strategy][seed]) - value(runs[other][seed]) for seed in shared]
    return Difference.of([x for x in each if math.isfinite(x)])


def tracking_errors(of_seed: dict[int, Run], curve: EntropyCurve) -> list[float]:
    """`Run.tracking_error` of each seed, in the order of seeds."""
    return [run.tracking_error(curve) for _, run in sorted(of_seed.items())]


def percents(values: Iterable[float]) -> str:
    """``1.0, 2.5`` for 0.01 and 0.025."""
    return ", ".join(f"{100 * value:.1f}" for value in values)


def count(number: int, noun: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Mean ± standard deviation of the finite values."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return ""
    deviation = f" ± {statistics.stdev(finite):.{digits}f}" if len(finite) > 1 else ""
    return f"{statistics.mean(finite):.{digits}f}{deviation}"


def above_course(run: Run, course: Sequence[tuple[float, float]], total: int) -> float:
    """How far the final pass@16 of ``run`` lies above another run's course in the (pass@1, pass@16) plane.

    ``course`` is a list of (pass@1, pass@16) points of the other run, from its start to its end. Between two points it
    is interpolated linearly; outside their range of pass@1, the nearest point counts.
    """
    at, height = run.pass_at(1, total), run.pass_at(16, total)
    points = sorted(course)
    if at <= points[0][0]:
        return height - points[0][1]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):  # noqa: RUF007
        if x0 <= at <= x1:
            share = (at - x0) / (x1 - x0) if x1 > x0 else 1.0
            return height - (y0 + share * (y1 - y0))
    return height - points[-1][1]


def above_courses(runs: Runs, strategy: str, other: str, total: int) -> Difference:
    """`above_course` of ``strategy`` over ``other``, paired by seed. The course is start, middle and end."""
    heights = []
    for seed in sorted(set(runs.get(strategy, {})) & set(runs.get(other, {}))):
        course = [(runs[other][seed].pass_at(1, s), runs[other][seed].pass_at(16, s)) for s in (0, total // 2, total)]
        heights.append(above_course(runs[strategy][seed], course, total))
    return Difference.of(heights)


def write_csv(path: Path, runs: Runs, curves: dict[str, EntropyCurve]) -> None:
    """Write one line per run with every value that the report's tables use."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        scalars = ["entropy_first", "entropy_kept", "reward", "grad_norm", "clipped_high", "clipped_low"]
        scalars += ["tracking_error", "noise_floor", "prediction_correlation"]
        names = [f"pass@{k}@{when}" for when in ("start", "middle", "end") for k in KS]
        writer.writerow(["strategy", "seed", *scalars, *names])
        for strategy, of_seed in runs.items():
            for seed, run in sorted(of_seed.items()):
                curve, total = curves.get(strategy), len(run.steps)
                values = [
                    run.steps[0]["entropy"],
                    run.entropy_kept,
                    run.mean("reward", 3),
                    run.mean("grad_norm", 3),
                    run.mean("clip/fraction_high"),
                    run.mean("clip/fraction_low"),
                    math.nan if curve is None else run.tracking_error(curve),
                    run.noise_floor,
                    run.prediction_correlation,
                    *(run.pass_at(k, step) for step in (0, total // 2, total) for k in KS),
                ]
                writer.writerow([strategy, seed, *("" if math.isnan(v) else f"{v:.4f}" for v in values)])


def _rms(values: Iterable[float]) -> float:
    return math.sqrt(statistics.mean(v * v for v in values))
