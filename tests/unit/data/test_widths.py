"""How many widths the microbatches of a rollout have, and what else padding to a step changes: nothing."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_rlvr.config import Config, resolve
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.data.microbatch import MicrobatchConfig, build_microbatch, partition

LONGEST = 1000


def rollout(seed: int) -> RolloutBatch:
    """64 sequences of 10 to 1,000 tokens."""
    draw = random.Random(seed)
    prompts = [[5] * draw.randint(5, 300) for _ in range(16)]
    responses = [[draw.randint(1, 90) for _ in range(draw.randint(5, LONGEST - 300))] for _ in range(64)]
    completions = [Completion(r, [-1.0] * len(r), "stop", 0) for r in responses]
    return RolloutBatch.from_completions(prompts, completions, [0.0] * 64, padding=0)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "config",
    [
        MicrobatchConfig(sequences=1),
        MicrobatchConfig(sequences=2, width_multiple=3),
        MicrobatchConfig(sequences=1, context_size=2),
        MicrobatchConfig(tokens=1200),
        MicrobatchConfig(tokens=1200, context_size=2, width_multiple=2),
    ],
    ids=["padded", "padded-tp3", "padded-cp2", "packed", "packed-cp2"],
)
def test_few_widths_occur(seed: int, config: MicrobatchConfig) -> None:
    batch, every = rollout(seed), torch.arange(64)
    widths: dict[int, set[int]] = {}
    longest: set[int | None] = set()
    for step in (1, 128):
        stepped = MicrobatchConfig(**{**vars(config), "width_step": step})
        widths[step] = set()
        for members in partition(batch, every, stepped):
            microbatch = build_microbatch(batch, members, stepped)
            width = microbatch.tokens.size(1) * config.context_size
            assert width % config.width_multiple == 0 and width % step == 0
            widths[step].add(width)
            if step > 1:
                longest.add(microbatch.longest)
                plain = build_microbatch(batch, members, config)
                assert torch.equal(microbatch.targets, plain.targets)
                assert torch.equal(microbatch.token_index, plain.token_index)
                if config.context_size == 1:  # otherwise the ranks' shares differ
                    flat = microbatch.tokens.T.flatten()
                    assert torch.equal(flat[microbatch.rows], plain.tokens.T.flatten()[plain.rows])
                if microbatch.boundaries is not None:
                    assert microbatch.longest is not None
                    assert int(microbatch.boundaries.diff().max()) <= microbatch.longest
    multiples = -(-1200 // 128) if config.tokens else -(-LONGEST // 128)
    assert len(widths[128]) <= multiples + 2 and len(widths[128]) < len(widths[1])
    assert len(longest) <= multiples + 2


def test_the_step_is_128_on_gpus_and_none_on_a_cpu() -> None:
    assert resolve(Config(), on_gpu=True).parallel.width_step == 128
    assert resolve(Config(), on_gpu=False).parallel.width_step == 1
    config = Config()
    config.parallel.width_step = 256
    assert resolve(config, on_gpu=True).parallel.width_step == 256
