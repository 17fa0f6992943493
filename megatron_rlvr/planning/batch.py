"""How many sequences and tokens a rank processes at once."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlvr.config import Config


def longest_sequence(config: Config) -> int:
    """Tokens of the longest prompt with the longest response."""
    return config.data.max_prompt_tokens + config.rollout.max_tokens


@dataclass(frozen=True)
class Microbatches:
    """How one data-parallel rank splits a minibatch.

    Attributes:
        sequences: sequences per microbatch if all of them have the greatest length that the configuration allows.
        count: microbatches per minibatch.
        tokens: tokens per microbatch, including padding.
    """

    sequences: int
    count: int
    tokens: int


def microbatches(config: Config, data_parallel: int) -> Microbatches:
    """The microbatches of a configuration with `data_parallel` data-parallel ranks."""
    rollout, parallel, longest = config.rollout, config.parallel, longest_sequence(config)
    completions = rollout.prompts_per_step * rollout.samples_per_prompt
    of_minibatch = completions // (config.algorithm.minibatches * data_parallel)
    if parallel.microbatch_tokens:
        sequences = max(1, min(of_minibatch, parallel.microbatch_tokens // longest))
    else:
        sequences = min(parallel.microbatch_sequences or of_minibatch, of_minibatch)
    step = parallel.width_step or 1
    width = -(-(parallel.microbatch_tokens or longest) // step) * step
    tokens = width if parallel.microbatch_tokens else sequences * width
    return Microbatches(sequences, -(-of_minibatch // sequences), tokens)


def local_batch(config: Config, data_parallel: int) -> int:
    """Sequences that the local engine generates at once on one data-parallel rank."""
    rollout = config.rollout
    completions = rollout.prompts_per_step * rollout.samples_per_prompt
    return min(rollout.local_batch, completions // data_parallel)
