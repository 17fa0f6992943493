"""Requests of rollout engines for tests, and their completions as one list."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.rollout.engines.base import GroupRequest, OnGroup, RolloutEngine
from megatron_rlvr.rollout.sampling import SamplingSettings


def group_requests(prompts: Sequence[Sequence[int]], samples: int, first_seed: int = 0) -> list[GroupRequest]:
    """One request per prompt; the seeds of all their completions count up from `first_seed`."""
    starts = range(first_seed, first_seed + len(prompts) * samples, samples)
    return [GroupRequest(prompt, range(start, start + samples)) for prompt, start in zip(prompts, starts, strict=True)]


def generate(
    engine: RolloutEngine,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    on_group: OnGroup | None = None,
    first_seed: int = 0,
) -> list[Completion]:
    """The completions of an engine, prompt by prompt."""
    groups = engine.generate(group_requests(prompts, sampling.samples, first_seed), sampling, on_group)
    return [completion for group in groups for completion in group]
