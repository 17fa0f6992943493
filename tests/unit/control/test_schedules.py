"""Schedules compared with their formulas, written here with lambda = 1 - 2 k / T and pairs of numbers."""

import pytest

from megatron_rlvr.control import (
    Constant,
    DecreaseIncreaseDecrease,
    IncreaseThenDecrease,
    OscillatoryDecay,
    build_schedule,
    schedule_parameters,
)
from megatron_rlvr.control.build import SCHEDULES

EPS, H, M = (0.2, 0.0), (0.5, -0.25), (0.3, -0.13)  # (intercept, slope)
TOTALS = [1, 2, 3, 10, 400]


def pair(threshold):
    return (threshold.intercept, threshold.slope)


def mix(weight, x, other_weight, y):
    return tuple(weight * a + other_weight * b for a, b in zip(x, y, strict=True))


def expected_id(k, total):
    lam = 1 - 2 * (k / total)
    if 2 * k <= total:
        return EPS, mix(lam, H, 1 - lam, EPS)
    return mix(1 + lam, M, -lam, EPS), EPS


def expected_did(k, total):
    lam = 1 - 2 * (k / total)
    if 2 * k <= total:
        return EPS, mix(lam, EPS, 1 - lam, H)
    return mix(1 + lam, M, -lam, EPS), H


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize(
    ("schedule_class", "expected"), [(IncreaseThenDecrease, expected_id), (DecreaseIncreaseDecrease, expected_did)]
)
def test_two_phase_schedules_equal_their_formulas_exactly(schedule_class, expected, total):
    schedule = schedule_class(total_steps=total)
    for k in range(total + 1):
        got = schedule.thresholds(k)
        assert (pair(got.lower), pair(got.upper)) == expected(k, total), k
    assert schedule.thresholds(total + 7) == schedule.thresholds(total)


@pytest.mark.parametrize("total", [2, 10, 400])
def test_both_ends_and_the_split(total):
    schedule = IncreaseThenDecrease(total_steps=total)
    assert (pair(schedule.thresholds(0).lower), pair(schedule.thresholds(0).upper)) == (EPS, H)
    assert (pair(schedule.thresholds(total // 2).lower), pair(schedule.thresholds(total // 2).upper)) == (EPS, EPS)
    assert (pair(schedule.thresholds(total).lower), pair(schedule.thresholds(total).upper)) == (EPS, EPS)
    schedule = DecreaseIncreaseDecrease(total_steps=total)
    assert (pair(schedule.thresholds(0).lower), pair(schedule.thresholds(0).upper)) == (EPS, EPS)
    assert (pair(schedule.thresholds(total // 2).lower), pair(schedule.thresholds(total // 2).upper)) == (EPS, H)
    assert (pair(schedule.thresholds(total).lower), pair(schedule.thresholds(total).upper)) == (EPS, H)


@pytest.mark.parametrize("split", [0.1, 0.3, 0.6, 0.7])
@pytest.mark.parametrize("total", [10, 400])
def test_lambda_runs_one_to_zero_to_minus_one_for_any_split(split, total):
    schedule = IncreaseThenDecrease(total_steps=total, split=split)
    border = round(split * total)
    assert schedule.phase(0) == (True, 1.0)
    assert schedule.phase(border) == (True, 0.0)  # the step at the split belongs to the first phase
    assert schedule.phase(total) == (False, -1.0)
    assert pair(schedule.thresholds(border).lower) == EPS
    # The second phase begins close to M.
    assert pair(schedule.thresholds(border + 1).lower) == pytest.approx(
        mix(1 - 1 / (total - border), M, 1 / (total - border), EPS)
    )
    for k in range(1, border):
        assert schedule.phase(k) == (True, pytest.approx(1 - k / border))
    for k in range(border + 1, total):
        assert schedule.phase(k) == (False, pytest.approx(-(k - border) / (total - border)))


def test_progress_by_tokens_equals_progress_by_steps():
    by_step, by_token = IncreaseThenDecrease(10), IncreaseThenDecrease(10, total_tokens=5000)
    for k in range(11):
        by_token.observe(0, 1.0, tokens=500 * k)
        assert by_token.thresholds(0) == by_step.thresholds(k)
    with pytest.raises(ValueError, match="tokens"):
        by_token.observe(0, 1.0)
    resumed = IncreaseThenDecrease(10, total_tokens=5000)
    with pytest.raises(ValueError, match="observe"):
        resumed.thresholds(3)
    resumed.load_state_dict(by_token.state_dict())
    assert resumed.thresholds(0) == by_token.thresholds(0)


@pytest.mark.parametrize("total", TOTALS)
def test_oscillatory_decay_is_the_hysteresis_of_its_definition(total):
    entropies = [1.0, 0.9, 0.21, 0.2, 0.15, 0.5, 0.7, 0.95, 0.3, 0.1, 0.25, 0.2000001]
    schedule, state = OscillatoryDecay(total_steps=total), 0
    for k in range(total):
        entropy = entropies[k % len(entropies)]
        schedule.observe(k, entropy)
        tau_high = 0.2 * 1.0 + (1.0 - 0.2 * 1.0) * (1 - k / total)
        state = 1 if entropy <= 0.2 else 0 if entropy > tau_high else state
        got = schedule.thresholds(k)
        assert (pair(got.lower), pair(got.upper)) == ((EPS, H) if state else (M, EPS)), k


def test_oscillatory_decay_keeps_its_state_inside_the_band_and_in_a_checkpoint():
    schedule = OscillatoryDecay(total_steps=100)
    for k, (entropy, raising) in enumerate([(1.0, 0), (0.2, 1), (0.6, 1), (0.97, 1), (0.98, 0), (0.3, 0)]):
        schedule.observe(k, entropy)
        assert schedule.metrics()["control/raising"] == raising, (k, entropy)
        resumed = OscillatoryDecay(total_steps=100)
        resumed.load_state_dict(schedule.state_dict())
        assert resumed.thresholds(k + 1) == schedule.thresholds(k + 1)
    with pytest.raises(ValueError, match="step 0"):
        OscillatoryDecay(total_steps=100).observe(3, 1.0)
    schedule_with_initial = OscillatoryDecay(total_steps=100, initial_entropy=2.0)
    schedule_with_initial.observe(3, 0.4)
    assert schedule_with_initial.metrics()["control/raising"] == 1.0


def test_a_checkpoint_of_another_schedule_is_refused():
    with pytest.raises(ValueError, match="'constant'"):
        IncreaseThenDecrease(10).load_state_dict(Constant().state_dict())


def test_build_schedule_makes_every_named_schedule_and_reports_its_parameters():
    for name in SCHEDULES:
        assert schedule_parameters(name)[0] == "total_steps"
    assert build_schedule({"name": "increase-then-decrease", "split": 0.3}, 40) == IncreaseThenDecrease(40, split=0.3)
    assert build_schedule({"name": "constant"}, 40) == Constant()
    assert pair(build_schedule({"name": "clip-higher"}, 40).thresholds(0).upper) == (0.28, 0.0)
    steep = build_schedule({"name": "constant", "upper_slope": -2.8, "upper_intercept": 3.0}, 40)
    assert pair(steep.thresholds(0).upper) == (3.0, -2.8)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["no name", "constant"]),
        ({"name": "increase"}, ["'increase'", "increase-then-decrease", "oscillatory-decay"]),
        ({"name": "constant", "upper_slop": 0.1}, ["'upper_slop'", "did you mean 'upper_slope'", "lower_intercept"]),
        ({"name": "constant", "split": 0.5}, ["'split'", "upper_slope"]),
        ({"name": "increase-then-decrease", "split": 1.0}, ["split", "in (0, 1)"]),
        ({"name": "increase-then-decrease", "split": "half"}, ["split", "'half'"]),
        ({"name": "increase-then-decrease", "total_tokens": 0}, ["total_tokens", "0"]),
        ({"name": "constant", "lower_intercept": 1.5}, ["schedule constant", "lower", "1.5"]),
        ({"name": "increase-then-decrease", "upper_slope": -0.5}, ["upper", "stay above 0"]),
        ({"name": "increase-then-decrease", "eps": 0.0}, ["eps", "0"]),
        ({"name": "oscillatory-decay", "floor": 1.5}, ["floor", "1.5"]),
        ({"name": "oscillatory-decay", "initial_entropy": 0.0}, ["initial_entropy", "0.0"]),
    ],
)
def test_bad_configurations_are_refused_in_one_line_with_the_valid_choices(config, words):
    with pytest.raises(ValueError) as error:
        build_schedule(config, 40)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize("entropy", [float("nan"), float("inf"), -0.1])
def test_an_impossible_entropy_is_refused(entropy):
    for schedule in (Constant(), IncreaseThenDecrease(4), OscillatoryDecay(4)):
        with pytest.raises(ValueError, match="entropy"):
            schedule.observe(0, entropy)
    with pytest.raises(ValueError, match="step"):
        Constant().thresholds(-1)


@pytest.mark.parametrize("name", ["increase-then-decrease", "decrease-increase-decrease", "target-entropy", "entropic"])
def test_thresholds_are_clamped_on_request(name):
    steep = {"name": name, "upper_intercept": 3.0, "upper_slope": -2.8, "lower_intercept": 0.9, "eps": 0.02}
    limits = {"smallest_threshold": 0.05, "largest_threshold": 0.6}
    free, clamped = build_schedule(steep, 20), build_schedule(steep | limits, 20)
    assert (pair(free.upper), pair(free.static)) == ((3.0, -2.8), (0.02, 0.0))
    assert pair(clamped.upper) == pytest.approx((0.6, -0.4))
    assert pair(clamped.lower) == pytest.approx((0.6, 0.0))
    assert pair(clamped.static) == (0.05, 0.0)
    if name.endswith("decrease"):  # every mixture stays within the limits, too
        thresholds = [clamped.thresholds(k) for k in range(21)]
        ends = [t(p) for each in thresholds for t in (each.lower, each.upper) for p in (0.0, 1.0)]
        assert min(ends) >= 0.05 - 1e-12
        assert max(ends) <= 0.6 + 1e-12
    with pytest.raises(ValueError, match="must be at most largest_threshold, found 0"):
        build_schedule({"name": name, "smallest_threshold": 0.3, "largest_threshold": 0.2}, 20)
