"""The loss of a minibatch, and statistics that are computed with it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_rlvr import ops
from megatron_rlvr.control.regions import REGIONS, classify
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.microbatch import Microbatch
from megatron_rlvr.megatron import device
from megatron_rlvr.objectives import TokenInputs, UpdateObjective
from megatron_rlvr.objectives.tokens import TokenOutputs, log_ratio_of, saturated
from megatron_rlvr.training.head import Head, TokenScores

LOSS_SUMS = (
    "loss",
    "active_tokens",
    "clipped_high",
    "clipped_low",
    *REGIONS,
    "entropy_drift",
    "old_entropy",
    "policy_change",
)
"""Names of the entries of `MinibatchLoss.sums`. All sums but the loss skip tokens whose advantage is 0."""


LARGEST_LOG_RATIO = 80.0
"""e^80 fits float32; only the estimate of the policy's change is cut here."""


@dataclass
class MinibatchLoss:
    """``-sum(token_weight * objective)`` over the tokens of a minibatch; called once per microbatch.

    Attributes:
        head: computes token statistics from the output of the last stage.
        batch: this rank's rollouts.
        advantage: float32 [N], advantage of each sequence.
        token_weight: float32 [N], aggregation weight of the tokens of each sequence.
        scores: token scores before the step's updates.
        objective: what this update maximises.
        backward_scale: factor by which the backward pass will multiply the loss (`LossScale.backward`).
        sums: float64 [len(LOSS_SUMS)], sums over the tokens so far.
        ratio_max: float32 [], the largest importance ratio so far.
    """

    head: Head
    batch: RolloutBatch
    advantage: Tensor
    token_weight: Tensor
    scores: TokenScores
    objective: UpdateObjective
    backward_scale: float
    sums: Tensor = field(
        default_factory=lambda: torch.zeros(len(LOSS_SUMS), dtype=torch.float64, device=device.device())
    )
    ratio_max: Tensor = field(default_factory=lambda: torch.zeros((), device=device.device()))

    def zero_if_finite(self) -> Tensor:
        """Return 0 if the loss so far is finite, and NaN otherwise: float64 []."""
        return self.sums[0] * 0.0

    def __call__(self, output: Tensor, microbatch: Microbatch) -> Tensor:
        """Return the loss of a microbatch, float32 [], from the output of the last stage; see `Head.statistics`."""

        def of_tokens(values: Tensor) -> Tensor:
            """The entries of a flat array of the rollout that belong to the microbatch's tokens, on the device."""
            return device.to_device(values[microbatch.token_index], output.device)

        def of_sequences(values: Tensor) -> Tensor:
            """The entry of the sequence of every token, on the device."""
            return device.to_device(values[microbatch.sequences][microbatch.sequence_index], output.device)

        advantage, weight = of_sequences(self.advantage), of_sequences(self.token_weight)
        old_logprob, old_entropy = of_tokens(self.scores.logprob), of_tokens(self.scores.entropy)
        steering, importance = None, None
        if self.objective.is_steered:
            steering = self.objective.steering_weights(of_tokens(self.scores.entropy_change))
        if self.objective.importance_weight is not None:
            importance = of_tokens(self.objective.importance_weight)
        # Context-parallel ranks exchange token statistics before the loss, so the loss cannot be part of the operator.
        if self.head.fused and self.objective.policy_objective.is_plain_clip and microbatch.local_targets is None:
            factor = importance if steering is None else steering
            if steering is not None and importance is not None:
                factor = steering * importance
            loss, logprob, entropy, outputs = self._fused(output, microbatch, old_logprob, advantage, weight, factor)
        else:
            statistics = self.head.statistics(output, microbatch)
            reference = self.batch.reference_logprob
            logprob, entropy = statistics.logprob, statistics.entropy
            outputs = self.objective.policy_objective(
                TokenInputs(
                    logprob=logprob,
                    entropy=entropy,
                    old_logprob=old_logprob,
                    advantage=advantage,
                    sequence_index=device.to_device(microbatch.sequence_index, output.device),
                    sequence_count=len(microbatch.sequences),
                    thresholds=self.objective.thresholds,
                    weight=steering,
                    rollout_logprob=of_tokens(self.batch.rollout_logprob),
                    importance_weight=importance,
                    reference_logprob=None if reference is None else of_tokens(reference),
                    old_entropy=old_entropy,
                )
            )
            loss = -(weight * outputs.objective).sum()
        self._count(loss, outputs, logprob.detach(), entropy.detach(), old_logprob, old_entropy, advantage)
        return loss

    def _fused(
        self,
        hidden: Tensor,
        microbatch: Microbatch,
        old_logprob: Tensor,
        advantage: Tensor,
        token_weight: Tensor,
        factor: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, TokenOutputs]:
        """Compute loss, log-probs, entropies and outputs of the clipped objective times `factor` from hidden states."""
        try:
            fused = ops.fused_linear_objective(
                hidden,
                self.head.model.output_weight(),
                device.to_device(microbatch.targets, hidden.device),
                old_logprob,
                advantage,
                self.objective.thresholds,
                token_weight=token_weight,
                steering_weight=factor,
                loss_scale=self.backward_scale,
                **self.head.settings(microbatch.kept, hidden.device),
            )
        except ops.NonFiniteLogitsError:
            nan = self.head.nan_statistics(hidden, microbatch.targets)
            clipped = torch.zeros_like(nan.logprob, dtype=torch.bool)
            return nan.logprob.sum(), nan.logprob, nan.entropy, TokenOutputs(nan.logprob, clipped, clipped)
        return fused.loss, fused.logprob, fused.entropy, TokenOutputs.of(fused)

    @torch.no_grad()
    def _count(
        self,
        loss: Tensor,
        outputs: TokenOutputs,
        logprob: Tensor,
        entropy: Tensor,
        old_logprob: Tensor,
        old_entropy: Tensor,
        advantage: Tensor,
    ) -> None:
        """Add the tokens of a microbatch to `sums` and `ratio_max`."""
        log_ratio = log_ratio_of(logprob, old_logprob)
        region = classify(old_logprob, old_entropy, advantage)
        active = region > 0
        counted = (
            active,
            outputs.clipped_high,
            outputs.clipped_low,
            *(region == r for r in (1, 2, 3, 4)),
            (entropy - old_entropy) * active,
            old_entropy * active,
            # The k3 estimate of KL(pi_old || pi), finite for any ratio.
            (log_ratio.clamp(max=LARGEST_LOG_RATIO).expm1() - log_ratio) * active,
        )
        self.sums += torch.stack([loss.double(), *(x.sum(dtype=torch.float64) for x in counted)])
        if len(logprob):
            largest = saturated(log_ratio.exp().max())
            self.ratio_max = torch.maximum(self.ratio_max, largest)
