"""From the output of the last pipeline stage to log-probs, entropies and scores of tokens."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr import ops
from megatron_rlvr.control.regions import entropy_change, gradient_norm
from megatron_rlvr.data.microbatch import Microbatch
from megatron_rlvr.megatron import collectives
from megatron_rlvr.megatron.model import PolicyModel


@dataclass
class TokenScores:
    """What the weights before a step's updates say about its rollout.

    All are float32 [T] on the CPU, in the batch's token order. They hold values on the last pipeline stage and zeros
    elsewhere: only sums of them leave the stage.
    """

    logprob: Tensor
    entropy: Tensor
    entropy_change: Tensor
    """First-order entropy change of each token's objective per unit of learning rate, in nats."""
    ascent: Tensor
    """First-order rise of each token's own objective per unit of learning rate."""

    @classmethod
    def zeros(cls, tokens: int) -> TokenScores:
        return cls(*(torch.zeros(tokens) for _ in fields(cls)))


@dataclass(frozen=True)
class Head:
    """Token statistics of the last stage's output: of logits, or fused with the vocabulary projection.

    Attributes:
        model: the model chunk whose weight projects; it returns hidden states instead of logits if `fused`.
        temperature: divides the logits.
        group: tensor-parallel group; None for one member.
        fused: form the logits a chunk of tokens at a time instead of all at once.
    """

    model: PolicyModel
    temperature: float
    group: dist.ProcessGroup | None
    fused: bool

    def statistics(self, output: Tensor, microbatch: Microbatch, second_moments: bool = False) -> ops.TokenStatistics:
        """Differentiable log-probs and entropies, float32 [T]. The backward pass overwrites the logits.

        Collective over the context-parallel group, whose ranks each hold the output of some of the tokens.
        """
        if microbatch.local_targets is None:
            return self._local_statistics(output, microbatch.targets.to(output.device), second_moments)
        local_targets = microbatch.targets[microbatch.local_targets].to(output.device)
        statistics = self._local_statistics(output, local_targets, second_moments)
        values = [value for field in fields(statistics) if (value := getattr(statistics, field.name)) is not None]
        index = microbatch.local_targets.to(output.device)
        shared = collectives.all_gather_tokens(torch.stack(values), index, len(microbatch.targets))
        return ops.TokenStatistics(*shared)

    def _local_statistics(self, output: Tensor, targets: Tensor, second_moments: bool) -> ops.TokenStatistics:
        settings: dict[str, Any] = {
            "temperature": self.temperature,
            "group": self.group,
            "second_moments": second_moments,
            "vocabulary": self.model.vocabulary,
        }
        if not self.fused:
            return ops.token_statistics(output, targets, **settings)
        operator = ops.fused_linear_token_statistics if torch.is_grad_enabled() else ops.fused_linear_statistics
        return operator(output, self.model.output_weight(), targets, **settings)

    def score(self, output: Tensor, microbatch: Microbatch, advantage: Tensor, scores: TokenScores) -> None:
        """Write the scores of a microbatch's tokens into `scores`; `advantage` is float32 [N], per sequence."""
        statistics = self.statistics(output, microbatch, second_moments=True)
        squared, squared_logprob = statistics.sum_squared_prob, statistics.sum_squared_prob_logprob
        assert squared is not None and squared_logprob is not None
        logprob, entropy = statistics.logprob, statistics.entropy
        token_advantage = advantage[microbatch.sequences][microbatch.sequence_index].to(output.device)
        change = entropy_change(logprob, entropy, token_advantage, squared, squared_logprob)
        scores.logprob[microbatch.token_index] = logprob.cpu()
        scores.entropy[microbatch.token_index] = entropy.cpu()
        scores.entropy_change[microbatch.token_index] = change.cpu()
        scores.ascent[microbatch.token_index] = gradient_norm(logprob, token_advantage, squared).cpu()
