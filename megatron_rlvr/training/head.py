"""The last pipeline stage's end: from what the model returns to log-probs, entropies and the loss of a minibatch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlvr import ops
from megatron_rlvr.control import ClipThresholds, SteeringResponse
from megatron_rlvr.control.regions import classify, entropy_change, gradient_norm, steering_weights
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.microbatch import Microbatch
from megatron_rlvr.megatron import collectives
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.objectives import PolicyObjective, TokenInputs
from megatron_rlvr.objectives.tokens import TokenOutputs, beyond_bounds


@dataclass
class TokenScores:
    """What the training weights say of a rollout before its updates; flat [T] in the batch's token order.

    Known on the last pipeline stage, and zeros elsewhere: only sums leave it.
    """

    logprob: Tensor
    entropy: Tensor
    entropy_change: Tensor
    """First-order entropy change of each token's objective per unit of learning rate, in nats."""
    ascent: Tensor
    """First-order rise of each token's own objective per unit of learning rate."""


@dataclass(frozen=True)
class Head:
    """Token statistics of the last stage's output: of logits, or fused with the vocabulary projection.

    Attributes:
        model: whose weight projects; asked for hidden states instead of logits when `fused`.
        temperature: divides the logits.
        group: tensor-parallel group, None for one member.
        fused: form logits a chunk at a time instead of whole.
    """

    model: PolicyModel
    temperature: float
    group: dist.ProcessGroup | None
    fused: bool

    def statistics(self, output: Tensor, part: Microbatch, second_moments: bool = False) -> ops.TokenStatistics:
        """Differentiable log-probs and entropies, float32 [T]; overwrites logits in the backward pass.

        Collective over the context-parallel group, whose ranks each know the output of some tokens.
        """
        targets = part.targets if part.here is None else part.targets[part.here]
        found = self._own_statistics(output, targets.to(output.device), second_moments)
        if part.here is None:
            return found
        known = [getattr(found, f.name) for f in fields(found)]
        values = torch.stack([value for value in known if value is not None])
        return ops.TokenStatistics(
            *collectives.all_gather_tokens(values, part.here.to(output.device), len(part.targets))
        )

    def _own_statistics(self, output: Tensor, targets: Tensor, second_moments: bool) -> ops.TokenStatistics:
        settings: dict[str, Any] = {
            "temperature": self.temperature,
            "group": self.group,
            "second_moments": second_moments,
            "vocabulary": self.model.vocabulary,
        }
        if not self.fused:
            return ops.token_statistics(output, targets, **settings)
        form = ops.fused_linear_token_statistics if torch.is_grad_enabled() else ops.fused_linear_statistics
        return form(output, self.model.output_weight(), targets, **settings)

    def score(self, output: Tensor, part: Microbatch, advantage: Tensor, scores: TokenScores) -> None:
        """Fill in the scores of a microbatch's tokens; `advantage` is float32 [N]."""
        here = output.device
        statistics = self.statistics(output, part, second_moments=True)
        squared, squared_logprob = statistics.sum_squared_prob, statistics.sum_squared_prob_logprob
        assert squared is not None and squared_logprob is not None
        token_advantage = advantage[part.sequences][part.sequence_index].to(here)
        logprob, entropy = statistics.logprob, statistics.entropy
        scores.logprob[part.flat] = logprob.cpu()
        scores.entropy[part.flat] = entropy.cpu()
        scores.entropy_change[part.flat] = entropy_change(
            logprob, entropy, token_advantage, squared, squared_logprob
        ).cpu()
        scores.ascent[part.flat] = gradient_norm(logprob, token_advantage, squared).cpu()


LOSS_SUMS = (
    "loss",
    "active_tokens",
    "clipped_high",
    "clipped_low",
    "E1",
    "E2",
    "E3",
    "E4",
    "entropy_drift",
    "old_entropy",
)


@dataclass
class MinibatchLoss:
    """The loss of one minibatch, ``-sum(token_weight * objective)``, and what is counted on the way.

    Attributes:
        batch: this rank's rollouts.
        advantage, token_weight: float32 [N]; the aggregation weight of every token of each sequence.
        scores: of the old policy.
        thresholds, response, objective: of this step.
        gradient_scale: the number that backward will multiply the loss by.
        sums: float64 [len(LOSS_SUMS)], over the tokens seen so far; all but the loss count tokens with an advantage.
        ratio_max: float32 [], the largest importance ratio so far.
    """

    head: Head
    batch: RolloutBatch
    advantage: Tensor
    token_weight: Tensor
    scores: TokenScores
    thresholds: ClipThresholds
    response: SteeringResponse
    objective: PolicyObjective
    gradient_scale: float
    sums: Tensor
    ratio_max: Tensor

    def __call__(self, output: Tensor, part: Microbatch) -> Tensor:
        """The loss of a microbatch, 0-d float32."""
        here = output.device
        targets, flat, index = (x.to(here) for x in (part.targets, part.flat, part.sequence_index))
        advantage, weight = (x[part.sequences].to(here)[index] for x in (self.advantage, self.token_weight))
        old_logprob = self.scores.logprob.to(here)[flat]
        steering = None
        if self.thresholds.steering:
            change = self.scores.entropy_change.to(here)[flat]
            steering = steering_weights(change, self.thresholds.steering, self.response)
        # Context-parallel ranks share statistics before the loss, so there the loss is not part of the fused operator.
        if self.head.fused and self.objective.is_plain_clip and part.here is None:
            fused = ops.fused_linear_objective(
                output,
                self.head.model.output_weight(),
                targets,
                old_logprob,
                advantage,
                self.thresholds,
                token_weight=weight if steering is None else weight * steering,
                temperature=self.head.temperature,
                group=self.head.group,
                vocabulary=self.head.model.vocabulary,
                loss_scale=self.gradient_scale,
            )
            loss, logprob, entropy = fused.loss, fused.logprob, fused.entropy
            bounds = self.thresholds.ratio_bounds(old_logprob.exp())
            clipped = beyond_bounds((logprob - old_logprob).exp(), *bounds, advantage)
            outputs = TokenOutputs(fused.objective, *clipped)
        else:
            statistics = self.head.statistics(output, part)
            logprob, entropy = statistics.logprob, statistics.entropy
            outputs = self.objective(
                TokenInputs(
                    logprob=logprob,
                    entropy=entropy,
                    old_logprob=old_logprob,
                    advantage=advantage,
                    sequence_index=index,
                    sequence_count=len(part.sequences),
                    thresholds=self.thresholds,
                    weight=steering,
                    rollout_logprob=self.batch.rollout_logprob.to(here)[flat],
                )
            )
            loss = -(weight * outputs.objective).sum()
        self._count(loss, outputs, logprob.detach(), entropy.detach(), old_logprob, advantage, flat)
        return loss

    @torch.no_grad()
    def _count(
        self,
        loss: Tensor,
        outputs: TokenOutputs,
        logprob: Tensor,
        entropy: Tensor,
        old_logprob: Tensor,
        advantage: Tensor,
        flat: Tensor,
    ) -> None:
        old_entropy = self.scores.entropy.to(logprob.device)[flat]
        region = classify(old_logprob, old_entropy, advantage)
        active = region > 0
        counted = (
            active,
            outputs.clipped_high,
            outputs.clipped_low,
            *(region == r for r in (1, 2, 3, 4)),
            (entropy - old_entropy) * active,
            old_entropy * active,
        )
        self.sums += torch.stack([loss.double(), *(x.sum(dtype=torch.float64) for x in counted)])
        if len(flat):
            self.ratio_max = torch.maximum(self.ratio_max, (logprob - old_logprob).exp().max())
