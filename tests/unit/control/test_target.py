"""TargetEntropy on a scalar plant with known parameters: tracking, filtering, saturation, the floor, checkpoints."""

import copy
import itertools
import json
import math
import random
import statistics

import pytest

from megatron_rlvr.control import EntropyCurve, SteeringResponse, TargetEntropy, build_schedule

CURVES = {
    "rise-hold-fall": EntropyCurve("piecewise", points=[[0.0, 1.0], [0.4, 1.3], [0.6, 1.3], [1.0, 0.5]]),
    "constant": EntropyCurve(),
    "linear-fall": EntropyCurve("linear", end=0.4),
}


class Plant:
    """ln H moves by ``drift`` + gain * drive + clip_gain * position + noise per step, and is measured with noise."""

    def __init__(self, seed, gain=0.2, clip_gain=0.004, drift=-0.02, process=0.015, measurement=0.02, imbalance=-0.1):
        self.random = random.Random(seed)
        self.gain, self.clip_gain, self.drift = gain, clip_gain, drift
        self.process, self.measurement, self.imbalance = process, measurement, imbalance
        self.log_entropy = math.log(0.4)

    def measure(self):
        return math.exp(self.log_entropy + self.random.gauss(0, self.measurement))

    def response(self):
        natural = -0.1 + self.random.gauss(0, 0.03)  # the drive of the step without steering
        return SteeringResponse(change=0.02 * natural, slope=0.02, ascent=0.1, ascent_slope=0.1 * self.imbalance)

    def apply(self, thresholds, response, position, rate=1.0):
        change = self.drift + self.gain * response.drive(thresholds.steering) + self.clip_gain * position
        self.log_entropy += rate * change + self.random.gauss(0, self.process)


def follow(schedule, curve, plant, steps, feed_forward=True):
    """Returns (measured, target, steering) of every step."""
    measured, target, steering = [], [], []
    for step in range(steps):
        entropy, response = plant.measure(), plant.response()
        schedule.observe(step, entropy, response=response if feed_forward else None)
        thresholds = schedule.thresholds(step)
        measured.append(entropy)
        target.append(curve.value(step / steps, measured[0]))
        steering.append(thresholds.steering)
        plant.apply(thresholds, response, schedule.metrics()["control/clip_position"])
    return measured, target, steering


def rms(measured, target, skip=0.1):
    start = math.ceil(skip * len(target))
    errors = [m / t - 1 for m, t in zip(measured[start:], target[start:], strict=True)]
    return math.sqrt(sum(e * e for e in errors) / len(errors))


@pytest.mark.parametrize("feed_forward", [True, False])
@pytest.mark.parametrize("name", CURVES)
def test_it_follows_the_curve_within_five_percent_on_every_seed(name, feed_forward):
    for seed in range(10):
        schedule = TargetEntropy(100, curve=CURVES[name])
        measured, target, _ = follow(schedule, CURVES[name], Plant(seed), 100, feed_forward)
        assert rms(measured, target) < 0.05, (seed, rms(measured, target))


@pytest.mark.parametrize("gain", [0.05, 0.1, 0.4])
def test_the_initial_gain_may_be_wrong_by_a_factor(gain):
    for seed in range(5):
        schedule = TargetEntropy(100, curve=EntropyCurve())
        measured, target, _ = follow(schedule, EntropyCurve(), Plant(seed, gain=gain), 100)
        assert rms(measured, target) < 0.055, (seed, rms(measured, target))
        if gain > 0.05:  # at 0.05, the noise of 100 steps hides the gain
            assert gain / 3 < schedule.metrics()["control/steering_gain"] < gain * 3


def test_a_known_drift_is_corrected_at_once_and_a_wrong_estimate_of_it_is_unlearned():
    curve, early, late = EntropyCurve(), {}, {}
    for estimate in (-0.05, 0.0, 0.05):
        early[estimate], late[estimate] = [], []
        for seed in range(20):
            schedule = TargetEntropy(40, curve=curve, drift=estimate)
            measured, target, _ = follow(schedule, curve, Plant(seed, drift=-0.05), 40)
            early[estimate].append(
                statistics.mean(m / t - 1.0 for m, t in list(zip(measured, target, strict=True))[1:4])
            )
            late[estimate].append(rms(measured, target, skip=0.5))
    assert abs(statistics.mean(early[-0.05])) < 0.01
    assert statistics.mean(early[0.0]) < -0.04 and statistics.mean(early[0.05]) < -0.08
    assert max(late[0.05]) < 0.05
    with pytest.raises(ValueError, match="drift must be in"):
        TargetEntropy(10, drift=-1.0)


def test_a_reported_learning_rate_is_not_mistaken_for_a_changed_gain():
    """Warm-up over 10 steps, then a cosine down to a tenth. With the rate reported, the filter keeps the true gain."""
    errors = {True: [], False: []}
    for seed in range(8):
        for reported in (True, False):
            schedule, plant, curve = TargetEntropy(60, curve=EntropyCurve()), Plant(seed), EntropyCurve()
            measured = []
            for step in range(60):
                rate = min(1.0, (step + 1) / 10) * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 59)))
                entropy, response = plant.measure(), plant.response()
                schedule.observe(step, entropy, response=response, rate=rate if reported else 1.0)
                measured.append(entropy)
                plant.apply(schedule.thresholds(step), response, schedule.metrics()["control/clip_position"], rate)
            errors[reported].append(rms(measured, [curve.value(0, measured[0])] * 60))
            if reported:
                assert 0.1 < schedule.metrics()["control/steering_gain"] < 0.35
    assert sum(errors[True]) < sum(errors[False])
    assert max(errors[True]) < 0.05
    with pytest.raises(ValueError, match="relative to its peak"):
        TargetEntropy(10).observe(0, 0.5, rate=1e-4 * 1e6)


def test_without_noise_the_error_dies_out():
    plant = Plant(0, process=0.0, measurement=0.0)
    measured, target, _ = follow(TargetEntropy(60, curve=EntropyCurve()), EntropyCurve(), plant, 60)
    assert rms(measured, target, skip=0.5) < 0.01


def test_saturation_is_reported_and_causes_no_windup():
    # For 30 steps the target is out of reach and u stays at its limit. Then the target returns to where H is.
    curve = EntropyCurve("piecewise", points=[[0.0, 1.0], [0.1, 4.0], [0.5, 4.0], [0.52, 1.0], [1.0, 1.0]])
    schedule, plant = TargetEntropy(60, curve=curve), Plant(3, gain=0.12, drift=-0.08, process=0.0)
    saturated = []
    for step in range(60):
        response = plant.response()
        schedule.observe(step, plant.measure(), response=response)
        thresholds = schedule.thresholds(step)
        saturated.append(schedule.metrics()["control/saturated"])
        assert abs(thresholds.steering) <= 0.9
        plant.apply(thresholds, response, schedule.metrics()["control/clip_position"])
        if step == 18:  # later, the controller prepares for the return of the target, which it knows of
            assert thresholds.steering == 0.9
            assert schedule.metrics()["control/actuator"] == 2.0
    assert saturated[18] == 2.0
    # Once the target is reachable again, steering leaves its limit, and the error vanishes within a few steps.
    assert schedule.metrics()["control/saturated"] < 2.0
    assert abs(math.exp(plant.log_entropy) / curve.value(1.0, schedule.initial_entropy) - 1) < 0.08


def test_the_thresholds_are_used_first_and_stay_within_their_limits():
    schedule = TargetEntropy(100, curve=EntropyCurve(), clip_gain=0.05)
    plant = Plant(1, clip_gain=0.05, drift=0.0, process=0.0, measurement=0.005)
    actuators = []
    for step in range(100):
        response = SteeringResponse(change=-0.001, slope=0.02, ascent=0.1, ascent_slope=0.0)
        schedule.observe(step, plant.measure(), response=response)
        thresholds, metrics = schedule.thresholds(step), schedule.metrics()
        actuators.append(metrics["control/actuator"])
        if metrics["control/actuator"] < 2:
            assert thresholds.steering == 0.0
        if thresholds.steering:
            assert abs(metrics["control/clip_position"]) == 1.0
        upper, lower = thresholds.upper, thresholds.lower
        assert 0.2 <= upper.intercept <= 0.5
        assert -0.25 <= upper.slope <= 0.0
        assert 0.2 <= lower.intercept <= 0.3
        assert -0.13 <= lower.slope <= 0.0
        assert (upper.intercept, lower.intercept).count(0.2) >= 1
        plant.apply(thresholds, response, metrics["control/clip_position"])
    assert actuators[20:].count(1.0) > 60


@pytest.mark.parametrize("direction", [1, -1])
def test_the_thresholds_are_the_mixture_at_their_position(direction):
    curve = EntropyCurve("linear", end=1.0 + 0.3 * direction)
    schedule = TargetEntropy(10, curve=curve, clip_gain=0.1, horizon=1.0)
    schedule.observe(0, 0.5)
    thresholds, position = schedule.thresholds(0), schedule.metrics()["control/clip_position"]
    assert position == pytest.approx(math.log(1.0 + 0.03 * direction) / 0.1)  # the curve's next step over the gain
    moved = abs(position)
    dynamic, static = (thresholds.upper, thresholds.lower) if direction > 0 else (thresholds.lower, thresholds.upper)
    intercept, slope = (0.5, -0.25) if direction > 0 else (0.3, -0.13)
    assert dynamic.intercept == pytest.approx(0.2 + moved * (intercept - 0.2))
    assert dynamic.slope == pytest.approx(moved * slope)
    assert (static.intercept, static.slope) == (0.2, 0.0)


def test_thresholds_alone_never_steer():
    schedule = TargetEntropy(50, curve=EntropyCurve(), steering_limit=0.0)
    _, _, steering = follow(schedule, EntropyCurve(), Plant(0), 50)
    assert set(steering) == {0.0}


def test_the_floor_intervenes_only_below_it():
    floor = EntropyCurve(start=0.7)
    for seed in range(5):
        schedule, plant = TargetEntropy(120, curve=floor, floor_only=True), Plant(seed, drift=-0.01, process=0.01)
        measured, target, steering, position = [], [], [], []
        for step in range(120):
            entropy, response = plant.measure(), plant.response()
            schedule.observe(step, entropy, response=response)
            measured.append(entropy)
            target.append(0.7 * measured[0])
            steering.append(schedule.thresholds(step).steering)
            position.append(schedule.metrics()["control/clip_position"])
            plant.apply(schedule.thresholds(step), response, position[-1])
        first = next(i for i, u in enumerate(steering) if u != 0.0)
        assert all(m > t for m, t in zip(measured[: first - 3], target, strict=False))  # free while well above
        assert min(steering) >= 0.0
        assert min(position) >= 0.0
        assert set(position[:5]) == {0.0}
        assert min(m / t for m, t in zip(measured, target, strict=True)) > 0.87
        held = [m / t for m, t in zip(measured[60:], target[60:], strict=True)]
        assert abs(sum(held) / len(held) - 1.0) < 0.05


def test_inside_the_dead_band_nothing_is_done():
    schedule = TargetEntropy(50, curve=EntropyCurve(), dead_band=0.2)
    plant = Plant(0, drift=0.02, process=0.0, measurement=0.005)  # cancels the drive without steering
    _, _, steering = follow(schedule, EntropyCurve(), plant, 50)
    assert set(steering) == {0.0}
    assert schedule.metrics()["control/actuator"] == 0.0


@pytest.mark.parametrize("stop", [1, 7, 25])
def test_a_run_resumed_from_its_checkpoint_repeats_the_uninterrupted_one(stop):
    curve = CURVES["rise-hold-fall"]
    observations = [(Plant(k).measure(), Plant(k).response()) for k in range(40)]
    uninterrupted = TargetEntropy(40, curve=curve)
    expected = []
    for step, (entropy, response) in enumerate(observations):
        uninterrupted.observe(step, entropy, response=response)
        expected.append(uninterrupted.thresholds(step))
    first = TargetEntropy(40, curve=curve)
    for step, (entropy, response) in enumerate(observations[:stop]):
        first.observe(step, entropy, response=response)
    second = TargetEntropy(40, curve=curve)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step, (entropy, response) in enumerate(observations[stop:], start=stop):
        second.observe(step, entropy, response=response)
        assert second.thresholds(step) == expected[step]


def test_progress_by_tokens_gives_the_same_targets():
    curve = EntropyCurve("linear", end=0.5)
    by_step, by_token = TargetEntropy(10, curve=curve), TargetEntropy(10, curve=curve, total_tokens=1000)
    for step in range(10):
        by_step.observe(step, 0.5)
        by_token.observe(step, 0.5, tokens=100 * step)
        assert by_token.metrics()["control/target"] == pytest.approx(by_step.metrics()["control/target"])


def test_misuse_is_refused():
    schedule = TargetEntropy(10)
    with pytest.raises(ValueError, match=r"call observe\(\) for step 0 first; it was last called for no step"):
        schedule.thresholds(0)
    schedule.observe(0, 0.5)
    with pytest.raises(ValueError, match="once per step"):
        schedule.observe(0, 0.5)
    with pytest.raises(ValueError, match="step 0"):
        TargetEntropy(10).observe(4, 0.5)
    with pytest.raises(ValueError, match="standard error"):
        TargetEntropy(10).observe(0, 0.5, standard_error=float("nan"))


def test_a_collapsed_policy_does_not_stop_the_run():
    schedule = TargetEntropy(10)
    schedule.observe(0, 0.5)
    schedule.observe(1, 0.0, response=SteeringResponse(0.0, 0.0, 0.0, 0.0))
    assert schedule.thresholds(1).steering == 0.0  # no token has a gradient, so steering has no effect
    schedule.observe(2, 0.0)
    assert 0.0 < schedule.thresholds(2).steering <= 0.9


def test_built_from_a_flat_configuration():
    schedule = build_schedule({"name": "target-entropy", "curve": "linear", "end": 0.4, "horizon": 2.0}, 30)
    assert schedule == TargetEntropy(30, curve=EntropyCurve("linear", end=0.4), horizon=2.0)
    floor = build_schedule({"name": "entropy-floor", "start": 0.5}, 30)
    assert floor == TargetEntropy(30, curve=EntropyCurve(start=0.5), floor_only=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"curve": "line"}, "valid: constant"),
        ({"curves": "linear"}, "did you mean 'curve'"),
        ({"steering_limit": 1.0}, "steering_limit"),
        ({"steering_limit": 0.0, "clip_gain": 0.0}, "no actuator"),
        ({"steering_rate": 0.0}, "steering_rate"),
        ({"horizon": 0.5}, "horizon"),
        ({"measurement_noise": 0.0}, "measurement_noise"),
        ({"dead_band": -0.1}, "dead_band"),
    ],
)
def test_bad_configurations_are_refused_in_one_line(config, message):
    with pytest.raises(ValueError) as error:
        build_schedule({"name": "target-entropy", **config}, 30)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def follow_updates(schedule, curve, seed, steps=60, updates=16, reports=True, noise=0.01, resume_at=None):
    """A plant with erratic updates: the gain and drift change at every step, as much as those of a language model.

    Returns (measured, target, steering of every update).
    """
    rng = random.Random(seed)
    log_entropy, measured, target, steering = math.log(0.4), [], [], []
    for step in range(steps):
        if step == resume_at:
            state = json.loads(json.dumps(schedule.state_dict()))
            schedule = TargetEntropy(steps, curve=curve)
            schedule.load_state_dict(state)
        measured.append(math.exp(log_entropy + rng.gauss(0, 0.01)))
        target.append(curve.value(step / steps, measured[0]))
        response = SteeringResponse(change=0.02 * rng.gauss(-0.1, 0.03), slope=0.02, ascent=0.1, ascent_slope=-0.01)
        schedule.observe(step, measured[-1], response=response, standard_error=0.01 * measured[-1])
        gain, drift, shift = 0.3 * math.exp(rng.gauss(0, 0.4)), rng.gauss(0.0, 0.06), 0.0
        for index in range(updates):
            steering.append(schedule.thresholds(step).steering)
            seen = shift + rng.gauss(0, noise) if index else 0.0
            shift += (drift + gain * response.drive(steering[-1])) / updates
            if reports:
                schedule.observe_update(step, index, updates, seen)
        log_entropy += 1.1 * shift + 0.01
    return measured, target, steering


@pytest.mark.parametrize("name", CURVES)
def test_reported_updates_halve_the_error(name):
    errors = {
        reports: [
            rms(*follow_updates(TargetEntropy(60, curve=CURVES[name]), CURVES[name], seed, reports=reports)[:2])
            for seed in range(6)
        ]
        for reports in (True, False)
    }
    assert max(errors[True]) < 0.045
    assert sum(errors[True]) < 0.55 * sum(errors[False])


def test_steering_moves_within_a_step_and_within_its_limits():
    curve = CURVES["rise-hold-fall"]
    schedule = TargetEntropy(60, curve=curve, steering_limit=0.7, steering_rate=0.35)
    _, _, steering = follow_updates(schedule, curve, 1)
    steps = [steering[i : i + 16] for i in range(0, len(steering), 16)]
    assert sum(len(set(step)) > 8 for step in steps) > 50
    assert max(abs(u) for u in steering) <= 0.7
    for step in steps:
        # Away from 0 by small moves only: four times steering_rate over all updates of a step.
        assert all(abs(b) <= abs(a) + 4 * 0.35 / 16 + 1e-12 for a, b in itertools.pairwise(step) if a * b > 0)
    assert schedule.metrics()["control/steering"] == pytest.approx(sum(steps[-1]) / 16)


def test_a_floor_never_pushes_down_within_a_step():
    floor = EntropyCurve(start=0.8)
    for seed in range(4):
        measured, target, steering = follow_updates(TargetEntropy(60, curve=floor, floor_only=True), floor, seed)
        assert min(steering) >= 0.0
        assert max(steering) > 0.0
        assert min(m / t for m, t in zip(measured, target, strict=True)) > 0.9


@pytest.mark.parametrize("stop", [1, 9, 41])
def test_a_run_with_reported_updates_resumes_exactly(stop):
    curve = CURVES["rise-hold-fall"]
    uninterrupted = follow_updates(TargetEntropy(60, curve=curve), curve, 2)
    assert follow_updates(TargetEntropy(60, curve=curve), curve, 2, resume_at=stop) == uninterrupted


def test_misreported_updates_are_refused():
    schedule = TargetEntropy(10)
    schedule.observe(0, 0.5)
    with pytest.raises(ValueError, match=r"call observe\(\) for step 1 first; it was last called for step 0"):
        schedule.observe_update(1, 0, 4, 0.0)
    with pytest.raises(ValueError, match="must be from 0 to 3, found 4"):
        schedule.observe_update(0, 4, 4, 0.0)
    with pytest.raises(ValueError, match="must be finite"):
        schedule.observe_update(0, 1, 4, math.nan)
    schedule.observe_update(0, 0, 4, None)  # an update without active tokens
    constant = build_schedule({"name": "constant"}, 10)
    assert not constant.wants_updates
    constant.observe_update(0, 0, 4, 0.1)
    assert constant.thresholds(0).steering == 0.0


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_an_observation_that_is_not_finite_changes_no_state(broken):
    schedule = TargetEntropy(total_steps=10)
    schedule.observe(0, 1.0, response=SteeringResponse(0.1, 0.2, 0.3, 0.0), standard_error=0.01)
    before = copy.deepcopy(schedule.state_dict())
    for arguments in (
        {"entropy": broken},
        {"entropy": 1.0, "standard_error": broken},
        {"entropy": 1.0, "response": SteeringResponse(broken, 0.2, 0.3, 0.0)},
    ):
        with pytest.raises(ValueError, match="must be finite"):
            schedule.observe(1, **arguments)
        assert schedule.state_dict() == before
