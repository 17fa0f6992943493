"""Preview against exhaustive search, and its floor."""

import itertools
import math

import pytest

from megatron_rlvr.control.preview import EFFORT, Reach, Shares, StepAhead, first_control

AT_ONCE = Shares(carried=0.0, own=1.0, kept=0.0)


def first_move(log_entropy, targets, reach, free=None):
    """The first change of ln entropy without momentum, which is the control itself."""
    steps = [StepAhead(target, 0.0, reach, AT_ONCE) for target in targets]
    control, change = first_control(log_entropy, 0.0, steps, free)
    assert change == control
    return control


def cost(moves, start, targets):
    level, total = start, 0.0
    for move, target in zip(moves, targets, strict=True):
        level += move
        total += (math.exp(level - target) - 1.0) ** 2
    return total


@pytest.mark.parametrize(
    "targets", [[0.0, 0.0, -0.5, -0.5], [0.3, -0.3, 0.3, -0.3], [-0.1, -0.2, 0.4, 0.4], [0.0, 0.6, 0.0, 0.0]]
)
def test_the_first_move_is_that_of_the_best_path(targets):
    reach = Reach(-0.12, 0.2)
    grid = [reach.low + (reach.high - reach.low) * i / 16 for i in range(17)]
    best = min(itertools.product(grid, repeat=4), key=lambda moves: cost(moves, 0.0, targets))
    move = first_move(0.0, targets, reach)
    rest = [first_move(move, targets[1:], reach)]
    assert reach.low <= move <= reach.high
    assert move == pytest.approx(best[0], abs=0.025)
    assert rest[0] == pytest.approx(best[1], abs=0.04)


def test_a_curve_within_reach_is_met_exactly():
    assert first_move(0.1, [0.15, 0.2, 0.1], Reach(-0.2, 0.2)) == pytest.approx(0.05)


def test_a_floor_is_left_alone_until_it_would_be_broken():
    reach = Reach(-0.1, 0.1)
    assert first_move(0.5, [0.0] * 5, reach, free=-0.02) == -0.02
    assert first_move(0.01, [0.0] * 5, reach, free=-0.05) == pytest.approx(-0.01, abs=1e-3)
    # A floor that rises by more than a step can do is prepared for.
    assert first_move(0.0, [0.0, 0.0, 0.25, 0.25], reach, free=-0.05) > 0.02


def under_momentum(controls, beta, updates):
    """The levels after each step of so many updates, each of which follows an average of the controls so far."""
    levels, level, average = [], 0.0, 0.1
    for control in controls:
        for _ in range(updates):
            average = beta * average + (1.0 - beta) * control
            level += average / updates
        levels.append(level)
    return levels


@pytest.mark.parametrize("updates", [1, 4, 16])
def test_under_momentum_the_first_control_is_that_of_the_best_path(updates):
    targets, reach = [0.0, -0.1, -0.3, -0.3], Reach(-0.4, 0.3)
    shares = Shares.of_updates([0.9] * updates, updates)
    steps = [StepAhead(target, 0.0, reach, shares) for target in targets]

    def total(controls):
        levels = under_momentum(controls, 0.9, updates)
        errors = sum((math.exp(level - target) - 1.0) ** 2 for level, target in zip(levels, targets, strict=True))
        changes = sum((b - a) ** 2 for a, b in itertools.pairwise([0.1, *controls]))
        return errors + EFFORT * changes

    grid = [reach.low + (reach.high - reach.low) * i / 14 for i in range(15)]
    best = min(itertools.product(grid, repeat=4), key=total)
    control, change = first_control(0.0, 0.1, steps)
    assert control == pytest.approx(best[0], abs=0.05)
    assert change == pytest.approx(under_momentum([control], 0.9, updates)[0])
