"""The controlled experiments of examples/entropy_study/tabular.py, checked for each seed separately."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SEEDS = 10
FILE = Path(__file__).parents[3] / "examples" / "entropy_study" / "tabular.py"


@pytest.fixture(scope="module")
def tabular():
    spec = importlib.util.spec_from_file_location("tabular", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tabular"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["tabular"]


def test_each_region_moves_entropy_in_its_direction_on_every_seed(tabular):
    changes = tabular.region_experiment(SEEDS)
    assert changes.shape == (SEEDS, 4)
    assert (changes[:, [0, 3]] < 0).all(), changes
    assert (changes[:, [1, 2]] > 0).all(), changes


def test_under_random_rewards_the_thresholds_order_the_final_entropy_on_every_seed(tabular):
    final = tabular.random_reward_experiment(SEEDS)
    upper, higher = final["upper-dynamic"], final["clip-higher"]
    static, lower = final["static"], final["lower-dynamic"]
    assert len(upper) == SEEDS
    assert (upper > higher).all(), upper - higher
    assert (higher > static).all(), higher - static
    assert (static > lower).all(), static - lower


def test_the_predicted_entropy_change_is_the_measured_one_on_every_seed(tabular):
    correlation = tabular.prediction_experiment(SEEDS)
    assert len(correlation) == SEEDS
    assert (correlation > 0.95).all(), correlation


@pytest.fixture(scope="module")
def uncontrolled(tabular):
    """A run of each seed without control, which no curve influences."""
    return [tabular.tracking_experiment(tabular.Constant(), tabular.CURVES["constant"], seed) for seed in range(2)]


@pytest.mark.parametrize("name", ["rise-hold-fall", "constant", "linear-fall"])
def test_a_learning_policy_follows_the_curve(tabular, uncontrolled, name):
    curve = tabular.CURVES[name]
    for seed, free in enumerate(uncontrolled):
        run = tabular.tracking_experiment(tabular.TargetEntropy(60, curve=curve), curve, seed)
        assert run.error() < 0.05, (seed, run.error())
        assert run.measured[0] == free.measured[0]  # so that the curve is the same
        missed = replace(free, target=run.target).error()
        assert missed > 3 * run.error(), (seed, missed)  # without control the curve is missed by far
        assert run.reward[-1] > run.reward[0] + 0.15  # and the policy still learns
