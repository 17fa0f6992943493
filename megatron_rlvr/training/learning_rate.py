"""The learning rate over the steps of a run."""

from __future__ import annotations

import math

from megatron_rlvr.megatron.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then constant or cosine decay to `min_learning_rate`.

    Args:
        config: section ``optimizer`` of the configuration.
        step: the step, from 0.
        total_steps: steps over which the rate decays, unless ``decay_steps`` says otherwise. Later steps keep the
            minimum.
    """
    warm_up = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.min_learning_rate is None:
        return config.learning_rate * warm_up
    progress = min(1.0, step / max(1, (config.decay_steps or total_steps) - 1))
    low = config.min_learning_rate
    return warm_up * (low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * progress)))
