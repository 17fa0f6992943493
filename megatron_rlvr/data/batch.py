"""Rollouts as tensors: a step's share of one data-parallel rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_rlvr.data.completion import Completion


@dataclass
class RolloutBatch:
    """What one data-parallel rank rolled out in one step: N sequences, T response tokens in all.

    Groups are consecutive: sequences ``g * G .. g * G + G - 1`` answer the rank's prompt g. Flat arrays hold response
    tokens in sequence order; those of sequence i begin at ``offsets[i]``.

    Attributes:
        tokens: int64 [N, S], prompt then response, padded on the right.
        prompt_lengths, response_lengths: int64 [N].
        rollout_logprob: float32 [T], as the engine sampled them.
        rewards: float32 [N].
        truncated: bool [N], stopped by the token limit.
        group_size: G.
        penalty: float32 [N], added to the rewards before advantages are formed (overlong shaping).
        slots: int64 [N / G], which of the step's P prompts the rank's are; None where prompts were not stratified.
        strata: float64 [N / G], the number by which each of these prompts was stratified; None likewise.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    rollout_logprob: Tensor
    rewards: Tensor
    truncated: Tensor
    group_size: int
    penalty: Tensor
    slots: Tensor | None = None
    strata: Tensor | None = None

    @classmethod
    def from_completions(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Completion],
        rewards: Sequence[float],
        padding: int,
    ) -> RolloutBatch:
        """Build from G completions for each of the prompts, prompt by prompt; `padding` is the pad token id."""
        group_size = len(completions) // len(prompts)
        lengths = np.array([len(c.token_ids) for c in completions])
        heads = [prompts[i // group_size] for i in range(len(completions))]
        prompt_lengths = np.array([len(h) for h in heads])
        tokens = np.full((len(completions), int((prompt_lengths + lengths).max())), padding, dtype=np.int64)
        for row, head, completion in zip(tokens, heads, completions, strict=True):
            row[: len(head)] = head
            row[len(head) : len(head) + len(completion.token_ids)] = completion.token_ids
        return cls(
            tokens=torch.from_numpy(tokens),
            prompt_lengths=torch.from_numpy(prompt_lengths),
            response_lengths=torch.from_numpy(lengths),
            rollout_logprob=torch.from_numpy(np.concatenate([np.asarray(c.logprobs, np.float32) for c in completions])),
            rewards=torch.tensor(rewards, dtype=torch.float32),
            truncated=torch.tensor([c.finish_reason == "length" for c in completions]),
            group_size=group_size,
            penalty=torch.zeros(len(rewards)),
        )

    @property
    def shaped_rewards(self) -> Tensor:
        """float32 [N / G, G]: the rewards from which advantages are formed, group by group."""
        return (self.rewards + self.penalty).view(-1, self.group_size)

    @property
    def offsets(self) -> Tensor:
        """int64 [N], where each sequence's response tokens begin in the flat arrays."""
        return self.response_lengths.cumsum(0) - self.response_lengths

    @property
    def token_count(self) -> int:
        """T, response tokens of this rank."""
        return int(self.response_lengths.sum())

    def sequence_of_token(self) -> Tensor:
        """int64 [T], the sequence each flat response token is of."""
        return torch.repeat_interleave(torch.arange(len(self.response_lengths)), self.response_lengths)

    def minibatches(self, count: int, only: Tensor | None = None) -> list[Tensor]:
        """Split the sequences into `count` minibatches of whole groups, in order: int64, N / count each.

        `only`, bool [N], leaves the other sequences out, but one: no forward pass goes without.
        """
        minibatches = torch.arange(len(self.tokens)).chunk(count)
        if only is None:
            return list(minibatches)
        kept = [sequences[only[sequences]] for sequences in minibatches]
        return [some if len(some) else whole[:1] for some, whole in zip(kept, minibatches, strict=True)]
