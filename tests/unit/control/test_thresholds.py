"""Thresholds: the closed form compared with the implicit definition, and the refusal of impossible values."""

import pytest
import torch

from megatron_rlvr.control import AffineThreshold, ClipThresholds

PAPER = ClipThresholds(AffineThreshold(0.3, -0.13), AffineThreshold(0.5, -0.25))
STEEP = ClipThresholds(AffineThreshold(0.2), AffineThreshold(3.0, -2.8))


@pytest.mark.parametrize("thresholds", [PAPER, STEEP, ClipThresholds()])
@pytest.mark.parametrize("old_prob", [0.0, 1e-6, 0.01, 0.3, 0.7, 1.0])
def test_closed_form_is_the_threshold_read_at_the_current_probability(thresholds, old_prob):
    low, high = thresholds.ratio_bounds(old_prob)
    # At a bound, the ratio is exactly one threshold away from 1, and the threshold is that of p = r * old_prob.
    assert high == pytest.approx(1 + thresholds.upper(high * old_prob), abs=1e-14)
    assert low == pytest.approx(1 - thresholds.lower(low * old_prob), abs=1e-14)
    assert 0 < low < 1 < high


def test_paper_bounds_at_both_ends():
    assert PAPER.ratio_bounds(0.0) == pytest.approx((0.70, 1.5))
    assert PAPER.ratio_bounds(1.0) == pytest.approx((0.7 / 0.87, 1.2))


def test_bounds_of_tensors_equal_those_of_floats():
    prob = torch.rand(2, 5, dtype=torch.float64)
    low, high = PAPER.ratio_bounds(prob)
    for i in range(2):
        for j in range(5):
            bounds = (low[i, j].item(), high[i, j].item())
            assert bounds == pytest.approx(PAPER.ratio_bounds(prob[i, j].item()), rel=1e-15)


@pytest.mark.parametrize(
    ("lower", "upper", "said"),
    [
        ((0.0, 0.0), (0.2, 0.0), "lower"),
        ((0.1, -0.2), (0.2, 0.0), "lower"),
        ((0.3, 0.7), (0.2, 0.0), "lower"),
        ((1.2, -0.5), (0.2, 0.0), "lower"),
        ((0.2, 0.0), (0.0, 0.0), "upper"),
        ((0.2, 0.0), (0.2, -0.2), "upper"),
        ((0.2, 0.0), (-0.1, 0.5), "upper"),
        ((0.2, 0.0), (0.2, 1.0), "slope"),
    ],
)
def test_impossible_thresholds_are_refused_in_one_line(lower, upper, said):
    with pytest.raises(ValueError, match=said) as error:
        ClipThresholds(AffineThreshold(*lower), AffineThreshold(*upper))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "0.2", True, None])
def test_parameters_must_be_numbers(bad):
    with pytest.raises(ValueError, match="finite number"):
        AffineThreshold(intercept=bad)


@pytest.mark.parametrize("steering", [-1.0, 1.0, 2.0, float("nan")])
def test_steering_outside_its_range_is_refused(steering):
    with pytest.raises(ValueError, match="steering"):
        ClipThresholds(steering=steering)


def test_scalars_round_trip_and_metrics_carry_their_names():
    thresholds = ClipThresholds(PAPER.lower, PAPER.upper, steering=0.25)
    assert thresholds.scalars() == (-0.25, 0.5, -0.13, 0.3, 0.25)
    assert ClipThresholds.from_scalars(thresholds.scalars()) == thresholds
    assert thresholds.metrics() == {
        "clip/upper_slope": -0.25,
        "clip/upper_intercept": 0.5,
        "clip/lower_slope": -0.13,
        "clip/lower_intercept": 0.3,
    }


@pytest.mark.parametrize("slope", [-2.8, -0.25, 0.0, 0.3])
def test_a_clamped_threshold_is_affine_and_stays_within_its_limits(slope):
    wide = AffineThreshold(0.4 - 0.5 * slope, slope)
    clamped = wide.within(0.05, 0.6)
    for p in (0.0, 0.3, 0.7, 1.0):
        assert 0.05 <= clamped(p) <= 0.6 + 1e-12
    assert clamped(0.0) == min(max(wide(0.0), 0.05), 0.6)
    assert clamped(1.0) == pytest.approx(min(max(wide(1.0), 0.05), 0.6))
    assert PAPER.upper.within(0.05, 0.6) == PAPER.upper
