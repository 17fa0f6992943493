"""The objective of a run, a token objective with importance weights and an entropy bonus, and that of one update."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from megatron_rlvr.control import ClipThresholds, SteeringResponse
from megatron_rlvr.control.regions import steering_weights
from megatron_rlvr.control.steering import NEUTRAL
from megatron_rlvr.objectives.clip import Clip
from megatron_rlvr.objectives.covariance import CovarianceClip, CovarianceKL
from megatron_rlvr.objectives.entropy_bonus import EntropyBonus
from megatron_rlvr.objectives.importance import ImportanceWeights, SampledTokens
from megatron_rlvr.objectives.reference_kl import ReferenceKL
from megatron_rlvr.objectives.tokens import TokenInputs, TokenObjective, TokenOutputs


@dataclass
class PolicyObjective:
    """A token objective with importance weights, an entropy bonus and a KL penalty, which combine with any of them.

    The importance weights multiply the policy term. Bonus and penalty are added without them.
    """

    token_objective: TokenObjective
    importance: ImportanceWeights | None = None
    entropy_bonus: EntropyBonus | None = None
    reference_kl: ReferenceKL | None = None

    def __call__(self, inputs: TokenInputs) -> TokenOutputs:
        if self.importance is not None:
            inputs = _with_importance(inputs, self.importance)
        outputs = self.token_objective(inputs)
        objective = outputs.objective
        if self.entropy_bonus is not None:
            objective = objective + self.entropy_bonus.current * inputs.entropy
        if self.reference_kl is not None and self.penalizes_kl:
            objective = objective + self.reference_kl.objective(inputs)
        return TokenOutputs(objective, outputs.clipped_high, outputs.clipped_low)

    @property
    def penalizes_kl(self) -> bool:
        """Whether KL to the reference is a term of the loss."""
        return self.reference_kl is not None and self.reference_kl.place == "loss"

    @property
    def is_plain_clip(self) -> bool:
        """Whether this is the clipped objective times weights that are known before an update.

        ``ops.fused_linear_objective`` can compute it.
        """
        plain = isinstance(self.token_objective, Clip) and self.token_objective.dual_clip is None
        return (
            plain
            and self.entropy_bonus is None
            and not self.penalizes_kl
            and not (self.importance and self.importance.follow_updates)
        )

    @property
    def ignores_zero_advantage(self) -> bool:
        """Whether tokens of advantage 0 change neither the loss nor its gradient, so that a trainer may skip them."""
        compares_tokens = isinstance(self.token_objective, CovarianceClip | CovarianceKL)  # each with all others
        return self.entropy_bonus is None and not self.penalizes_kl and not compares_tokens

    def observe(self, step: int, entropy: float) -> None:
        """Begin ``step``. Call it once, before the step's updates, with the entropy before them in nats per token."""
        if isinstance(self.token_objective, CovarianceClip):
            self.token_objective.start_step(step)
        if self.entropy_bonus is not None:
            self.entropy_bonus.observe(entropy)

    def metrics(self) -> dict[str, float]:
        """``objective/entropy_coefficient``, if there is a bonus."""
        return {} if self.entropy_bonus is None else {"objective/entropy_coefficient": self.entropy_bonus.current}

    def state_dict(self) -> dict[str, Any]:
        """The state that a checkpoint must store."""
        return {} if self.entropy_bonus is None else {"entropy_bonus": self.entropy_bonus.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from :meth:`state_dict`. Raises ValueError if its run had no entropy bonus but this has."""
        if self.entropy_bonus is None:
            return
        if "entropy_bonus" not in state:
            raise ValueError(
                "objective state: this run has an entropy bonus, but the checkpoint stores none; start a new run"
            )
        self.entropy_bonus.load_state_dict(state["entropy_bonus"])


def _with_importance(inputs: TokenInputs, importance: ImportanceWeights) -> TokenInputs:
    """``inputs`` with the importance weights in their ``weight``."""
    if inputs.rollout_logprob is None:
        raise ValueError("importance weights: rollout_logprob is None; pass the log-probs of the sampling engine")

    def seen_by(logprob: Tensor) -> SampledTokens:
        rollout = inputs.rollout_logprob
        assert rollout is not None
        return SampledTokens(logprob, rollout, inputs.advantage, inputs.sequence_index, inputs.sequence_count)

    weight = inputs.importance_weight
    if weight is None:
        weight = importance.before_updates(seen_by(inputs.old_logprob)).weight
    if importance.follow_updates:
        weight = weight * importance.during_update(seen_by(inputs.logprob)).weight
    return replace(inputs, weight=inputs.weighted(weight))


@dataclass(frozen=True)
class UpdateObjective:
    """What one optimizer step maximises: a policy objective under the clip thresholds of this update.

    Attributes:
        policy_objective: the same in every update of a run.
        thresholds: clip thresholds and region steering of this update.
        response: how the step's tokens respond to region steering.
        importance_weight: float32 [T], weight of each token of the rollout, from the corrections that do not follow
            updates; None for 1.
    """

    policy_objective: PolicyObjective
    thresholds: ClipThresholds
    response: SteeringResponse = NEUTRAL
    importance_weight: Tensor | None = None

    @property
    def is_steered(self) -> bool:
        """Whether region steering weighs the tokens."""
        return self.thresholds.steering != 0

    def steering_weights(self, entropy_change: Tensor) -> Tensor:
        """Return the weight of each token's objective, [T], from the first-order entropy changes [T]."""
        return steering_weights(entropy_change, self.thresholds.steering, self.response)
