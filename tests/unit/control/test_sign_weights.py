"""Entrocraft and EntroPIC: their weights, step by step, from the formulas of their papers."""

import math

import pytest

from megatron_rlvr.control import build_schedule
from megatron_rlvr.control.build import SCHEDULES
from megatron_rlvr.control.thresholds import AffineThreshold, ClipThresholds

STATIC = ClipThresholds(AffineThreshold(0.2), AffineThreshold(0.2))
ENTROPIES = [0.5, 0.47, 0.38, 0.31, 0.36, 0.46, 0.53, 0.30, 0.1, 0.0]


def weights_of(schedule, entropies=ENTROPIES, first=0):
    found = []
    for step, entropy in enumerate(entropies, first):
        schedule.observe(step, entropy)
        assert schedule.thresholds(step) == STATIC
        found.append(schedule.advantage_weights(step))
    return found


def test_entrocraft_rejects_one_sign_outside_of_its_band():
    schedule = build_schedule({"name": "entrocraft", "curve": "linear", "end": 0.5, "band": 0.06}, 10)
    for step, (entropy, weights) in enumerate(zip(ENTROPIES, weights_of(schedule), strict=True)):
        target = 0.5 * (1.0 - 0.5 * step / 10)
        m = (entropy > target + 0.03) - (entropy < target - 0.03)  # algorithm 1: a sample is kept if m A >= 0
        assert weights == (float(m >= 0), float(m <= 0))
    assert schedule.metrics() == {
        "control/target": pytest.approx(0.275),
        "control/positive_weight": 0.0,
        "control/negative_weight": 1.0,
    }


def test_entropic_is_a_proportional_integral_controller():
    config = {"name": "entropic", "curve": "constant", "start": 0.9, "proportional": 2.0, "integral": 0.3}
    found, target = weights_of(build_schedule(config, 10)), 0.9 * 0.5
    for step, weights in enumerate(found):
        earlier = sum(entropy - target for entropy in ENTROPIES[:step])
        alpha = 2.0 * (ENTROPIES[step] - target) + 0.3 * earlier
        assert weights == pytest.approx((1 + max(-1.0, min(1.0, alpha)), 1 - max(-1.0, min(1.0, alpha))))
    assert min(min(weights) for weights in found) == 0.0  # entropy 0 is more than one nat's worth too low


@pytest.mark.parametrize("name", ["entrocraft", "entropic"])
def test_a_resumed_schedule_repeats_the_uninterrupted_one(name):
    config = {"name": name, "curve": "piecewise", "points": [[0, 1], [1, 0.4]]}
    whole = weights_of(build_schedule(config, 10))
    first, second = build_schedule(config, 10), build_schedule(config, 10)
    weights_of(first, ENTROPIES[:4])
    second.load_state_dict(first.state_dict())
    assert weights_of(second, ENTROPIES[4:], first=4) == whole[4:]


def test_other_schedules_weigh_both_signs_alike():
    for name in SCHEDULES:
        schedule = build_schedule({"name": name}, 10)
        schedule.observe(0, 0.5)
        assert schedule.advantage_weights(0) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"name": "entrocraft", "band": 0}, "band"),
        ({"name": "entrocraft", "proportional": 1.0}, "unknown parameter"),
        ({"name": "entropic", "integral": -1}, "integral"),
        ({"name": "entropic", "proportional": math.nan}, "proportional"),
    ],
)
def test_impossible_values(config, expected):
    with pytest.raises(ValueError, match=expected):
        build_schedule(config, 10)
