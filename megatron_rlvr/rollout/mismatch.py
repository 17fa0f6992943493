"""The alarm for a mismatch between the policy that generated a rollout and the policy that trains on it."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rlvr.checked_input import checked, field
from megatron_rlvr.config import Config
from megatron_rlvr.training.mismatch_metrics import OLDEST
from megatron_rlvr.training.run_state import run_state_errors

FIRST_STEPS = 4
"""Steps whose largest KL is what later steps of a run are compared with."""
SMALLEST_BASELINE = 1e-6
"""KL in nats per token below which a run's own first steps are taken for exact: below it only rounding varies."""
MARGIN = 2.0
"""Factor on the KL that the updates explain, because it is extrapolated from their last epoch."""
STANDARD_ERRORS = 5.0
"""Deviations from the expected value that are smaller than this many standard errors may be chance."""
FEWEST_TOKENS = 1000
"""Tokens that a test of a mean needs: with fewer, rare tokens dominate it."""
SURPRISE = 0.02
"""Smallest surprise that counts, as a fraction of the entropy."""
EXPECTED_SURPRISE = 3.0
"""Surprise per KL that a healthy difference may cause: noise in the logits changes KL and entropy about as much."""
STORED_TOKENS = 20
"""Tokens that a step with a warning stores, to find out where engine and trainer differ."""
MISSING_MASS = 1e-3
"""Smallest share of the training policy's probability that counts as missing from the rollouts."""


@dataclass
class MismatchAlarm:
    """Warns if the rollouts of a step do not come from the policy that trains, and stops a run that is far off.

    It looks at four measurements (docs/mismatch.md): KL(rollout || train) against a threshold, the same against the
    run's own first steps, the surprise of the training policy, and the probability that the rollouts never sample.
    What the updates of the last steps explain is subtracted from the KL of tokens of older weights.

    Attributes:
        threshold: threshold of the k3 estimate of KL(rollout || train), in nats per token; 0 disables the alarm.
        patience: consecutive steps with a KL above `stop` after which the run stops.
        is_main: whether this process prints the warnings.
        in_a_row: consecutive steps with a KL above `stop` so far.
        stop: KL above which a step counts towards `patience`, in nats per token; at least `threshold`.
        growth: how many times the KL of the first steps a later one may have; 0 disables the comparison.
        tests_draws: whether tokens are drawn independently of rewards, so that their mean surprise is 0.
        seen_change: share of the KL by which a step's updates change the policy that ``kl_update`` shows; 0 if it shows
            nothing, because there is one update per rollout.
        oldest: largest age of a token (``rollout.max_staleness``).
        requested_detail: tokens of largest difference that every step stores (``telemetry.mismatch_detail``).
        first: KL of the run's first steps.
        changes: KL by which the updates of the last steps changed the policy, newest last.
        warned: consecutive steps with a warning so far.
    """

    threshold: float
    patience: int
    is_main: bool = True
    in_a_row: int = 0
    stop: float = 0.0
    growth: float = 0.0
    tests_draws: bool = True
    seen_change: float = 0.0
    oldest: int = 0
    requested_detail: int = 0
    first: list[float] = dataclasses.field(default_factory=list)
    changes: list[float] = dataclasses.field(default_factory=list)
    warned: int = 0

    @classmethod
    def build(cls, config: Config, draws_from_policy: bool, is_main: bool) -> MismatchAlarm:
        """Build the alarm of a run; it is disabled if the engine does not sample from the current policy."""
        rollout, algorithm = config.rollout, config.algorithm
        assert rollout.mismatch_alarm is not None  # resolved
        updates = algorithm.minibatches * algorithm.epochs
        last_epoch = range(updates - algorithm.minibatches, updates)
        return cls(
            rollout.mismatch_alarm if draws_from_policy else 0.0,
            rollout.mismatch_patience,
            is_main,
            stop=rollout.mismatch_stop,
            growth=rollout.mismatch_growth,
            tests_draws=not rollout.dynamic_sampling,
            # The policy moves away from its start, so that its KL grows about as the square of the updates.
            seen_change=sum((done / updates) ** 2 for done in last_epoch) / algorithm.minibatches,
            oldest=rollout.max_staleness,
            requested_detail=config.telemetry.mismatch_detail,
        )

    def observe(self, step: int, record: Mapping[str, float]) -> str | None:
        """Read ``kl_rollout`` and ``mismatch/*`` from a step's metrics; returns the reason to stop, if any."""
        if not self.threshold:
            return None
        by_age = {age: record[name] for age in range(OLDEST + 1) if (name := f"mismatch/age_{age}/kl") in record}
        by_age = by_age or {0: record["kl_rollout"]}
        kl, age, explained = self._unexplained(by_age)
        fresh = by_age.get(0, math.nan)
        limit = self.growth * max([SMALLEST_BASELINE, *self.first])
        findings = []
        described = f"KL(rollout || train) of step {step} is {kl:.3g} nats per token"
        if age:
            described += f" for tokens of weights {age} steps old, of which updates explain {explained:.2g}"
        if not kl - explained <= self.threshold:  # NaN is above every threshold
            findings.append(
                f"{described}, above rollout.mismatch_alarm={self.threshold:g}; the largest log-prob difference is "
                f"{record['mismatch/max']:.3g}"
            )
        elif self.growth and self.first and fresh > limit:
            findings.append(
                f"KL(rollout || train) of step {step} is {fresh:.3g} nats per token, more than rollout.mismatch_growth="
                f"{self.growth:g} times that of the run's first steps ({max(self.first):.2g})"
            )
        if not findings:
            findings += self._tests(step, record)
        if not findings and 0 in by_age and len(self.first) < FIRST_STEPS:
            self.first.append(fresh)
        self.warned = self.warned + 1 if findings else 0
        self.in_a_row = 0 if kl - explained <= max(self.stop, self.threshold) else self.in_a_row + 1
        if self.in_a_row >= self.patience:
            return (
                f"{findings[0]}; this is step {self.in_a_row} in a row: engine and trainer compute different policies; "
                "check rollout.sglang.weight_sync and dtypes, set algorithm.objective.importance, or raise "
                "rollout.mismatch_stop and rollout.mismatch_alarm"
            )
        # A warning that repeats itself is printed at ever larger distances: after 1, 2, 4, 8 ... steps with it.
        if findings and self.is_main and self.warned & (self.warned - 1) == 0:
            print(
                f"warning: {'; '.join(findings)}; mismatch/step_{step:06d}.jsonl in the run directory shows the tokens",
                file=sys.stderr,
            )
        return None

    def observe_updates(self, record: Mapping[str, float]) -> None:
        """Read ``kl_update`` from the metrics of a finished step: rollouts of weights before it may differ as much."""
        if self.seen_change:
            self.changes = [*self.changes, record["kl_update"] / self.seen_change][-OLDEST:]

    @property
    def detail(self) -> int:
        """How many of the step's tokens of largest difference to store."""
        return max(self.requested_detail, STORED_TOKENS) if self.warned else self.requested_detail

    def metrics(self) -> dict[str, float]:
        """``mismatch/alarm``: consecutive steps with a warning, this one included."""
        return {"mismatch/alarm": float(self.warned)}

    def _unexplained(self, by_age: Mapping[int, float]) -> tuple[float, int, float]:
        """Return KL, age, and the KL that updates explain, of the age whose KL is explained least."""
        found = [(kl, age, self._explained(age)) for age, kl in by_age.items()]
        return max(found, key=lambda each: math.inf if math.isnan(each[0]) else each[0] - each[2])

    def _explained(self, age: int) -> float:
        """Return the KL by which tokens of weights `age` steps old may differ; its root is like a distance."""
        if age == 0:
            return 0.0
        if not self.changes:  # one update per rollout shows no change: such tokens are compared with `stop` alone
            return max(0.0, self.stop - self.threshold)
        distance = sum(math.sqrt(max(0.0, change)) for change in self.changes[-age:])
        if age == OLDEST:  # and older
            distance *= max(1.0, self.oldest / OLDEST)
        return MARGIN * distance**2

    def _tests(self, step: int, record: Mapping[str, float]) -> list[str]:
        """Return the means over tokens that are too far from their expected value to be chance."""
        if record.get("tokens", 0) < FEWEST_TOKENS:
            return []
        findings = []
        missing, error = record["mismatch/missing_mass"], record["mismatch/missing_mass_standard_error"]
        if missing > max(MISSING_MASS, STANDARD_ERRORS * error):
            findings.append(
                f"the rollouts of step {step} never sample {missing:.2g} of the training policy's probability: the "
                "engine cuts its distribution, by a top-p or top-k that is not that of rollout.*"
            )
        surprise, error = record["mismatch/surprise"], record["mismatch/surprise_standard_error"]
        enough = self.tests_draws and record["mismatch/fresh_fraction"] * record["tokens"] >= FEWEST_TOKENS
        expected = max(SURPRISE * record["entropy"], EXPECTED_SURPRISE * record["kl_rollout"])
        if enough and abs(surprise) > max(expected, STANDARD_ERRORS * error):
            findings.append(
                f"the tokens of step {step} are {abs(surprise):.2g} nats {'more' if surprise < 0 else 'less'} likely "
                f"than samples of the training policy ({abs(surprise) / error:.0f} standard errors): the engine "
                "samples at another temperature, cuts its distribution, or has other weights"
            )
        return findings

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint must store."""
        stored = {"in_a_row": self.in_a_row, "warned": self.warned, "first": self.first, "changes": self.changes}
        return {"mismatch": stored}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state_dict`; older checkpoints have none.

        Raises:
            UserError: if it is not a state.
        """
        with run_state_errors():
            if stored := field(state, "mismatch", dict, default={}):
                self.in_a_row, self.warned = (field(stored, name, int, at_least=0) for name in ("in_a_row", "warned"))
                self.first, self.changes = (_numbers(stored, name) for name in ("first", "changes"))


def _numbers(stored: Mapping[str, Any], name: str) -> list[float]:
    return [checked(value, float, name, at_least=0) for value in field(stored, name, list)]
