"""The mismatch alarm on measured numbers: what it warns of, what stops a run, and its state."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from megatron_rlvr.config import Config
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.mismatch import FIRST_STEPS, MismatchAlarm


def record(kl: float = 1e-13, **changes: float) -> dict[str, float]:
    """The metrics of a step of the quickstart that the alarm reads, without a fault."""
    found = {
        "kl_rollout": kl,
        "tokens": 14_000.0,
        "entropy": 0.3,
        "mismatch/max": 1e-5,
        "mismatch/missing_mass": 0.0,
        "mismatch/missing_mass_standard_error": 1e-9,
        "mismatch/surprise": 0.004,
        "mismatch/surprise_standard_error": 0.0042,
        "mismatch/fresh_fraction": 1.0,
    }
    return found | {f"mismatch/{name}" if name != "tokens" else name: value for name, value in changes.items()}


def alarm(dtype: str = "float32", **rollout: Any) -> MismatchAlarm:
    config = Config()
    config.algorithm.epochs = 2
    config.rollout.mismatch_alarm = 1e-4 if dtype == "float32" else 0.01
    for name, value in rollout.items():
        setattr(config.rollout, name, value)
    return MismatchAlarm.build(config, True, True)


# Measured on the quickstart's model in float32, except for those that name a source.
FAULTS = {
    "other weights behind the right version": record(0.9),
    "fp8, as reported": record(0.06),
    "fp8 weights": record(6e-4),
    "one stale layer": record(1e-3),
    "temperature 0.9": record(1.2e-3),
    "top-p 0.99, log-probs of the cut distribution": record(
        6e-6, missing_mass=1.9e-3, missing_mass_standard_error=3e-5, surprise=-0.014
    ),
    "top-p 0.95, log-probs of the whole distribution": record(surprise=-0.0316, surprise_standard_error=0.0027),
    "temperature 0.9, log-probs at 1": record(surprise=-0.025, surprise_standard_error=0.0035),
    "temperature 1.1, log-probs at 1": record(surprise=0.0397, surprise_standard_error=0.006),
    "a log-prob of NaN": record(math.nan),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("before", [0, 1, 20])
def test_a_fault_rings_in_its_first_step(name: str, before: int, capsys: pytest.CaptureFixture[str]) -> None:
    watched = alarm()
    for step in range(before):
        assert watched.observe(step, record()) is None and not watched.warned
    watched.observe(before, FAULTS[name])
    assert watched.metrics() == {"mismatch/alarm": 1.0} and watched.detail == 20
    error = capsys.readouterr().err
    assert error.startswith("warning: ") and error.count("\n") == 1 and f"step {before}" in error


@pytest.mark.parametrize("name", ["other weights behind the right version", "fp8, as reported"])
def test_in_bfloat16_larger_differences_ring(name: str) -> None:
    watched = alarm("bfloat16")
    for step in range(9):
        watched.observe(step, record(1.2e-4 * (1 + step)))  # of a healthy run, growing as the policy sharpens
        assert not watched.warned
    watched.observe(9, FAULTS[name])
    assert watched.warned


def test_a_difference_that_grows_rings_below_the_threshold() -> None:
    watched = alarm("bfloat16")
    for step in range(FIRST_STEPS):
        watched.observe(step, record(1e-5))
    watched.observe(4, record(2e-4))
    assert not watched.warned and watched.first == [1e-5] * 4
    watched.observe(5, record(4e-4))
    assert watched.warned == 1
    assert alarm("bfloat16", mismatch_growth=0.0).observe(5, record(4e-4)) is None


def test_noise_of_few_tokens_and_drawn_groups_do_not_ring() -> None:
    noisy = record(surprise=0.2, surprise_standard_error=0.01, missing_mass=0.1, tokens=500.0)
    watched = alarm()
    watched.observe(0, noisy)
    watched.observe(1, record(surprise=0.005, surprise_standard_error=1e-4))  # certain, and too small to matter
    watched.observe(2, record(surprise=0.2, surprise_standard_error=0.01, fresh_fraction=0.01))
    assert not watched.warned
    half = alarm("bfloat16")
    half.observe(0, record(5e-3, surprise=0.012, surprise_standard_error=1e-4))  # rounding of logits flattens them
    assert not half.warned
    selected = alarm(dynamic_sampling=True)  # groups are chosen by their rewards, and so are their tokens
    selected.observe(0, record(surprise=0.05, surprise_standard_error=0.004))
    assert not selected.warned


def stale(kl_0: float, kl_1: float, kl_2: float) -> dict[str, float]:
    return record(kl_2, **{f"age_{age}/kl": kl for age, kl in enumerate((kl_0, kl_1, kl_2))}, fresh_fraction=0.1)


def test_what_the_updates_explain_does_not_ring(capsys: pytest.CaptureFixture[str]) -> None:
    watched = alarm(max_staleness=2)
    watched.observe_updates({"kl_update": 0.0027})  # measured with KL 0.0050 after one step and 0.0155 after two
    watched.observe_updates({"kl_update": 0.0027})
    watched.observe(2, stale(1e-13, 0.005, 0.0155))
    assert not watched.warned and watched.first == [1e-13]
    watched.observe(3, stale(1e-13, 0.005, 0.075))  # fp8 on top
    assert watched.warned == 1 and "weights 2 steps old, of which updates explain" in capsys.readouterr().err
    watched.observe(4, stale(1e-3, 0.005, 0.0155))  # tokens of the current weights differ
    assert watched.warned == 2


def test_without_a_measured_change_stale_tokens_have_the_limit_that_stops() -> None:
    watched = alarm(max_staleness=1)
    watched.seen_change = 0.0  # one update per rollout
    watched.observe_updates({"kl_update": 0.0})
    assert watched.changes == []
    watched.observe(1, record(0.09, **{"age_1/kl": 0.09}))
    assert not watched.warned
    watched.observe(2, record(0.9, **{"age_1/kl": 0.9}))
    assert watched.warned


def test_only_large_differences_stop_a_run_and_warnings_thin_out(capsys: pytest.CaptureFixture[str]) -> None:
    watched = alarm()
    assert all(watched.observe(step, record(0.06)) is None for step in range(20))
    assert capsys.readouterr().err.count("warning: ") == 5  # after 1, 2, 4, 8 and 16 steps
    problems = [watched.observe(step, record(0.2)) for step in (20, 21, 22)]
    assert problems[:2] == [None, None] and problems[2] is not None
    assert "this is step 3 in a row" in problems[2] and "rollout.mismatch_stop" in problems[2]


def test_a_replayed_rollout_is_not_watched() -> None:
    config = Config()
    config.rollout.mismatch_alarm = 1e-4
    replayed = MismatchAlarm.build(config, False, True)
    assert replayed.observe(0, record(0.9)) is None and not replayed.warned and replayed.detail == 0


def test_the_state_survives_a_checkpoint() -> None:
    whole, half = alarm(max_staleness=2), alarm(max_staleness=2)
    kls = [1e-6, 2e-6, 0.2, 0.2, 3e-6, 4e-6, 5e-6, 6e-6, 0.15, 0.15, 0.15]
    for step, kl in enumerate(kls):
        resumed = alarm(max_staleness=2)
        resumed.load_state_dict(json.loads(json.dumps(half.state_dict())))
        half = resumed
        assert half.observe(step, record(kl)) == whole.observe(step, record(kl))
        for each in (half, whole):
            each.observe_updates({"kl_update": kl})
        assert half == whole
    old = alarm()
    old.load_state_dict({})  # a checkpoint from before there was a state
    assert old == alarm()


@pytest.mark.parametrize(
    "stored", [None, [], {"in_a_row": -1}, {"in_a_row": 0, "warned": 0, "first": [None], "changes": []}, {"first": []}]
)
def test_a_state_of_another_kind_is_refused(stored: Any) -> None:
    with pytest.raises(UserError, match=r"run\.json of the checkpoint holds no state of this run"):
        alarm().load_state_dict({"mismatch": stored})
