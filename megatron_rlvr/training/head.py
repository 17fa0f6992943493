"""Log-probs, entropies and scores of tokens, computed from the output of the last pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr import ops
from megatron_rlvr.control.regions import entropy_change, gradient_norm
from megatron_rlvr.data.microbatch import Microbatch
from megatron_rlvr.megatron import collectives, device
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.objectives.tokens import saturated


@dataclass
class TokenScores:
    """Scores of the tokens of a rollout under the weights before the step's updates.

    All are float32 [T] on the CPU, in the token order of the batch. They are computed on the last pipeline stage and
    are zeros on other stages.
    """

    logprob: Tensor
    """Log-prob of each token, in nats."""
    entropy: Tensor
    """Exact entropy of the distribution from which each token was sampled, in nats."""
    entropy_change: Tensor
    """First-order entropy change of each token's objective per unit of learning rate, in nats."""
    ascent: Tensor
    """First-order increase of each token's objective per unit of learning rate."""

    @classmethod
    def zeros(cls, tokens: int) -> TokenScores:
        """Return zero scores for `tokens` tokens."""
        return cls(*(torch.zeros(tokens) for _ in fields(cls)))

    def under(self, advantage: Tensor) -> TokenScores:
        """Return scores that were computed for advantage 1 under other advantages of the tokens, float32 [T].

        The entropy change is linear in the advantage and the ascent quadratic, so that the result equals, bit for bit,
        that of scoring with these advantages.
        """
        wide = advantage.double()
        change, ascent = wide * self.entropy_change, wide.square() * self.ascent
        return replace(self, entropy_change=saturated(change, torch.float32), ascent=saturated(ascent, torch.float32))


@dataclass(frozen=True)
class Head:
    """Computes token statistics from the output of the last stage: logits, or hidden states if `fused`.

    Attributes:
        model: model chunk with the vocabulary projection.
        temperature: divisor of the logits.
        group: tensor-parallel group; None if it has one member.
        fused: compute the logits from hidden states in chunks of tokens instead of all at once.
    """

    model: PolicyModel
    temperature: float
    group: dist.ProcessGroup | None
    fused: bool

    def statistics(self, output: Tensor, microbatch: Microbatch, second_moments: bool = False) -> ops.TokenStatistics:
        """Compute differentiable log-probs and entropies, float32 [T]. The backward pass overwrites the logits.

        Collective over the context-parallel group, each rank of which has the output of some tokens.

        Args:
            output: logits [R, V / tp] or hidden states [R, h] of the predictors of this rank.
            microbatch: the microbatch.
            second_moments: also compute the sums that the scores need.
        """
        if microbatch.local_targets is None:
            return self._local_statistics(output, microbatch.targets, microbatch.kept, second_moments)
        local_targets = microbatch.targets[microbatch.local_targets]
        statistics = self._local_statistics(output, local_targets, microbatch.kept, second_moments)
        values = [value for field in fields(statistics) if (value := getattr(statistics, field.name)) is not None]
        index = device.to_device(microbatch.local_targets, output.device)
        shared = collectives.all_gather_tokens(torch.stack(values), index, len(microbatch.targets))
        return ops.TokenStatistics(*shared)

    def _local_statistics(
        self, output: Tensor, targets: Tensor, kept: ops.KeptSets | None, second_moments: bool
    ) -> ops.TokenStatistics:
        targets = device.to_device(targets, output.device)
        settings = self.settings(kept, output.device) | {"second_moments": second_moments}
        try:
            if not self.fused:
                return ops.token_statistics(output, targets, **settings)
            operator = ops.fused_linear_token_statistics if torch.is_grad_enabled() else ops.fused_linear_statistics
            return operator(output, self.model.output_weight(), targets, **settings)
        except ops.NonFiniteLogitsError:  # other ranks wait in the pipeline and in the reduction of the gradients
            return self.nan_statistics(output, targets, second_moments)

    def settings(self, kept: ops.KeptSets | None, place: torch.device) -> dict[str, Any]:
        """Return the arguments that say of which distribution operators compute statistics, with `kept` on a device."""
        return {
            "temperature": self.temperature,
            "group": self.group,
            "vocabulary": self.model.vocabulary,
            "kept": None if kept is None else kept.to(place),
        }

    @staticmethod
    def nan_statistics(output: Tensor, targets: Tensor, second_moments: bool = False) -> ops.TokenStatistics:
        """Return what the operators return on a GPU for logits that are not finite: NaN, also in the gradient."""
        nan = (output.float().sum() * torch.nan).expand(len(targets))
        return ops.TokenStatistics(nan, nan, *([nan.detach()] * 2 if second_moments else [None, None]))

    def score(self, output: Tensor, microbatch: Microbatch, advantage: Tensor, scores: TokenScores) -> None:
        """Write the scores of a microbatch's tokens into `scores`.

        Args:
            output: see `statistics`.
            microbatch: the microbatch.
            advantage: float32 [N], advantage of each sequence of the batch.
            scores: scores of the batch, changed in place.
        """
        statistics = self.statistics(output, microbatch, second_moments=True)
        squared, squared_logprob = statistics.sum_squared_prob, statistics.sum_squared_prob_logprob
        assert squared is not None and squared_logprob is not None
        logprob, entropy = statistics.logprob, statistics.entropy
        token_advantage = device.to_device(advantage[microbatch.sequences][microbatch.sequence_index], output.device)
        change = entropy_change(logprob, entropy, token_advantage, squared, squared_logprob)
        ascent = gradient_norm(logprob, token_advantage, squared)
        # One copy, because each of them waits for the GPU.
        values = torch.stack([logprob, entropy, change, ascent]).cpu()
        for scored, value in zip(fields(scores), values, strict=True):
            getattr(scores, scored.name)[microbatch.token_index] = value
