"""Preview against exhaustive search, and its floor."""

import itertools
import math

import pytest

from megatron_rlvr.control.preview import Reach, first_move


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
    move = first_move(0.0, targets, reach, reach)
    rest = [first_move(move, targets[1:], reach, reach)]
    assert reach.low <= move <= reach.high
    assert move == pytest.approx(best[0], abs=0.025)
    assert rest[0] == pytest.approx(best[1], abs=0.04)


def test_a_curve_within_reach_is_met_exactly():
    assert first_move(0.1, [0.15, 0.2, 0.1], Reach(-0.2, 0.2), Reach(-0.2, 0.2)) == pytest.approx(0.05)


def test_a_floor_is_left_alone_until_it_would_be_broken():
    reach = Reach(-0.1, 0.1)
    assert first_move(0.5, [0.0] * 5, reach, reach, free=-0.02) == -0.02
    assert first_move(0.01, [0.0] * 5, reach, reach, free=-0.05) == pytest.approx(-0.01, abs=1e-3)
    # A floor that rises by more than a step can do is prepared for.
    assert first_move(0.0, [0.0, 0.0, 0.25, 0.25], reach, reach, free=-0.05) > 0.02
