"""The model of a step: what its measurements are taken for."""

import random

import pytest

from megatron_rlvr.control import step_model
from megatron_rlvr.control.step_model import SHIFT_NOISE, StepModel

UPDATES = 8


def measured_step(model, shifts):
    """A step whose updates measure these shifts, the first of which is before any update and exactly 0."""
    for index, shift in enumerate(shifts):
        if index:
            model.measure(shift)
        model.advance(1)


def after_a_collapse(seed):
    """The model after five ordinary steps and one in which entropy falls to a seventh, and its noise before that."""
    rng, model = random.Random(seed), StepModel(clip_gain=0.01, steering_gain=0.2)
    model.updates = UPDATES
    for _ in range(5):
        measured_step(model, [rng.gauss(0.0, SHIFT_NOISE) for _ in range(UPDATES)])
        model.restart()
    before = model.shift_noise
    measured_step(model, [rng.gauss(-2.0 * (index >= 4), SHIFT_NOISE) for index in range(UPDATES - 1)])
    return model, before


@pytest.mark.parametrize("seed", range(5))
def test_a_collapse_is_believed_and_is_no_noise(seed, monkeypatch):
    model, before = after_a_collapse(seed)
    assert model.shift == pytest.approx(-2.0, abs=0.2)
    assert model.shift_noise < 2.0 * before
    monkeypatch.setattr(step_model, "LARGEST_SAMPLE", 1e9)
    model, before = after_a_collapse(seed)
    assert model.shift_noise > 5.0 * before  # what the limit prevents
