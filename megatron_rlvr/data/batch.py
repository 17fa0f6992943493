"""The rollouts that one data-parallel rank trains on in a step, as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.data.routes import BatchRoutes
from megatron_rlvr.ops import KeptSets


@dataclass
class RolloutBatch:
    """The rollouts of one data-parallel rank in one step: N sequences with T response tokens in total.

    Groups of G sequences are consecutive: sequences ``g * G .. g * G + G - 1`` answer the rank's prompt g. Flat arrays
    hold response tokens in the order of the sequences; the tokens of sequence i begin at ``offsets[i]``.

    Attributes:
        tokens: int64 [N, S], prompt and response, padded on the right.
        prompt_lengths, response_lengths: int64 [N], in tokens.
        rollout_logprob: float32 [T], log-prob of each response token when the engine sampled it.
        rewards: float32 [N].
        truncated: bool [N], whether the sequence ended at the maximum length.
        group_size: G, sequences per prompt.
        penalty: float32 [N], added to the rewards before advantages are computed (overlong shaping).
        slots: int64 [N / G], the places of the rank's prompts in the step; None if they are not known.
        strata: float64 [N / G], the number by which each prompt is stratified; None unless prompts are stratified.
        sampled_fraction: of the prompts of the data, the fraction that the step samples; 0 if that is not known.
        age: int64 [T], how many training steps the weights that drew each token are behind those of the step; None if
            that is not known.
        kept: kept sets of the T response tokens, to which the policy is restricted; None if it is not.
        routes: the experts that the rollout used, to be replayed; None if there are none.
        reference_logprob: float32 [T], log-prob of each response token under the reference policy, on the last pipeline
            stage, and zeros on other stages; None without a reference.
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
    sampled_fraction: float = 0.0
    age: Tensor | None = None
    kept: KeptSets | None = None
    routes: BatchRoutes | None = None
    reference_logprob: Tensor | None = None

    @classmethod
    def from_completions(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Completion],
        rewards: Sequence[float],
        padding: int,
        routers: Sequence[int] | None = None,
    ) -> RolloutBatch:
        """Build a batch from G completions per prompt.

        Args:
            prompts: token ids of each prompt.
            completions: prompt by prompt, with the same number for each prompt.
            rewards: one per completion.
            padding: token id that pads `tokens` on the right.
            routers: numbers of the routers whose routes the batch needs; None keeps those of all.
        """
        group_size = len(completions) // len(prompts)
        response_lengths = np.array([len(c.token_ids) for c in completions])
        repeated_prompts = [prompts[i // group_size] for i in range(len(completions))]
        prompt_lengths = np.array([len(prompt) for prompt in repeated_prompts])
        tokens = np.full((len(completions), int((prompt_lengths + response_lengths).max())), padding, dtype=np.int64)
        for row, prompt, completion in zip(tokens, repeated_prompts, completions, strict=True):
            row[: len(prompt)] = prompt
            row[len(prompt) : len(prompt) + len(completion.token_ids)] = completion.token_ids
        return cls(
            tokens=torch.from_numpy(tokens),
            prompt_lengths=torch.from_numpy(prompt_lengths),
            response_lengths=torch.from_numpy(response_lengths),
            rollout_logprob=torch.from_numpy(np.concatenate([np.asarray(c.logprobs, np.float32) for c in completions])),
            rewards=torch.tensor(rewards, dtype=torch.float32),
            truncated=torch.tensor([c.finish_reason == "length" for c in completions]),
            group_size=group_size,
            penalty=torch.zeros(len(rewards)),
            kept=_kept_sets(completions),
            routes=_routes(completions, routers),
        )

    @property
    def shaped_rewards(self) -> Tensor:
        """float32 [N / G, G], the rewards from which advantages are computed, group by group."""
        return (self.rewards + self.penalty).view(-1, self.group_size)

    @property
    def offsets(self) -> Tensor:
        """int64 [N], where the response tokens of each sequence begin in the flat arrays."""
        return self.response_lengths.cumsum(0) - self.response_lengths

    @property
    def token_count(self) -> int:
        """T, the response tokens of this rank."""
        return int(self.response_lengths.sum())

    def sequence_of_token(self) -> Tensor:
        """int64 [T], the index of the sequence of each flat response token."""
        return torch.repeat_interleave(torch.arange(len(self.response_lengths)), self.response_lengths)

    def minibatches(self, count: int, only: Tensor | None = None) -> list[Tensor]:
        """Split the sequences into minibatches of whole groups, in order.

        Args:
            count: number of minibatches.
            only: bool [N], which sequences to keep; None keeps all. Each minibatch keeps at least one sequence, because
                every rank must take part in every forward pass.

        Returns:
            the sequences of each minibatch, as int64 indices; N / count of them without `only`.
        """
        minibatches = torch.arange(len(self.tokens)).chunk(count)
        if only is None:
            return list(minibatches)
        kept = [sequences[only[sequences]] for sequences in minibatches]
        return [some if len(some) else sequences[:1] for some, sequences in zip(kept, minibatches, strict=True)]


def _kept_sets(completions: Sequence[Completion]) -> KeptSets | None:
    """Return the kept sets of all tokens; None if they were drawn from the whole vocabulary."""
    sets = [completion.kept for completion in completions if completion.kept is not None]
    if not sets:
        return None
    if len(sets) < len(completions):
        raise ValueError(f"{len(sets)} of {len(completions)} completions have kept sets; one policy drew all of them")
    counts, ids = (np.concatenate([getattr(kept, name) for kept in sets]) for name in ("counts", "ids"))
    return KeptSets.of(torch.from_numpy(counts), torch.from_numpy(ids))


def _routes(completions: Sequence[Completion], routers: Sequence[int] | None) -> BatchRoutes | None:
    """Return the routes of all completions for `routers`; None if they have none."""
    routes = [completion.routes for completion in completions if completion.routes is not None]
    if not routes:
        return None
    if len(routes) < len(completions):
        raise ValueError(f"{len(routes)} of {len(completions)} completions have routes; one engine generated all")
    return BatchRoutes.of(routes, routers)
