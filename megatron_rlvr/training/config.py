"""The sections ``algorithm``, ``reference``, ``checkpoint`` and ``resume`` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch

from megatron_rlvr.config_schema import Bounds, ByName, NonNegativeFloat, NonNegativeInt, PositiveInt
from megatron_rlvr.control import SCHEDULE_PARAMETERS, ScheduleParameters
from megatron_rlvr.errors import UserError, as_user_error
from megatron_rlvr.objectives import (
    OBJECTIVE_PARAMETERS,
    Advantage,
    Aggregation,
    KLEstimator,
    KLPlace,
    ObjectiveParameters,
    ReferenceKL,
    build_objective,
)


@dataclass
class AlgorithmConfig:
    """Advantages, token objective, schedule of clip thresholds, and updates per rollout."""

    advantage: Advantage = "grpo"
    """How rewards of a group become advantages: ``grpo``, ``grpo-no-std`` (Dr. GRPO) or ``rloo``."""
    aggregation: Aggregation = "token-mean"
    """How token objectives are averaged: ``token-mean`` (DAPO), ``sequence-mean`` (GRPO) or ``constant`` (Dr. GRPO)."""
    objective: Annotated[ObjectiveParameters, ByName(OBJECTIVE_PARAMETERS)] = field(
        default_factory=OBJECTIVE_PARAMETERS["clip"]
    )
    """Token objective: its ``name`` and its parameters."""
    schedule: Annotated[ScheduleParameters, ByName(SCHEDULE_PARAMETERS)] = field(
        default_factory=SCHEDULE_PARAMETERS["constant"]
    )
    """Schedule of clip thresholds: its ``name`` and its parameters."""
    old_policy: Literal["recomputed", "rollout"] = "recomputed"
    """Policy from which the importance ratio starts and around which it is clipped. ``recomputed``: the weights before
    the step, whose log-probs are computed for every rollout, however old it is (the decoupled objective of AReaL, with
    the weights of `objective.importance`). ``rollout``: the policy that sampled, by the engine's log-probs, so that
    clipping also bounds what staleness and engine change."""
    minibatches: Annotated[int, Bounds(above=0, cap=2**20)] = 8
    """Minibatches that each pass over a rollout is divided into, with one optimizer step each."""
    epochs: Annotated[int, Bounds(above=0, cap=2**16)] = 1
    """Passes over each rollout."""
    fused_linear: bool = False
    """Compute logits in chunks inside the loss instead of storing them."""
    drop_zero_advantage: bool = True
    """Exclude groups whose rewards are all equal from updates, because their gradient is zero."""
    kl_coefficient: Annotated[float, Bounds(at_least=0, cap=1e6)] = 0.0
    """Weight of a penalty on KL(policy, reference); 0 needs no reference. `reference` says which policy that is."""
    kl_in: KLPlace = "loss"
    """Where the penalty applies: ``loss``, to the objective of every token, or ``reward``: the reward of a completion
    is reduced by the sum over its tokens."""
    kl_estimator: KLEstimator | None = None
    """Estimate of the KL from the sampled tokens: ``k1``, ``k2`` or ``k3``, by Schulman's names; null is k3 in the loss
    and k1 in the reward. [reference_kl.md](reference_kl.md) compares their gradients."""
    kl_importance_weight: bool = True
    """In the loss, weigh the estimate of a token by its importance ratio, so that its gradient is that of
    KL(policy, reference) in every update on a rollout; false with k3 is the penalty of GRPO."""

    def check(self) -> None:
        """Refuse combinations of keys that cannot work."""
        with as_user_error():
            importance = build_objective(self.objective).importance
            self._reference_kl()
        if self.old_policy == "rollout" and importance is not None and importance.weigh:
            raise UserError(
                "algorithm.old_policy=rollout already weighs every token by pi / pi_rollout, and so would "
                f"algorithm.objective.importance={self.objective.importance or 'tis'}: use corrections that only leave "
                "tokens out (geometric, k3, opsm), or algorithm.old_policy=recomputed"
            )

    def reference_kl(self) -> ReferenceKL | None:
        """Return the penalty on KL to the reference; None if its coefficient is 0."""
        return self._reference_kl() if self.kl_coefficient else None

    def _reference_kl(self) -> ReferenceKL:
        return ReferenceKL(self.kl_coefficient, self.kl_estimator, self.kl_in, self.kl_importance_weight)


@dataclass
class ReferenceConfig:
    """The reference policy of ``algorithm.kl_coefficient``."""

    path: str | None = None
    """Hugging Face folder of the reference, a model with the architecture of the policy; null is the model that the run
    starts from: ``model.path``, or a copy of ``checkpoint.start_from`` that the run keeps in its ``reference/``."""
    weights: Literal["device", "host", "disk"] = "host"
    """Where its weights are while it is not scored: on the ``device`` of the policy, in ``host`` memory, or only on
    ``disk``, from where every rollout loads them again. They are on the device while a rollout is scored."""


@dataclass
class ResumeConfig:
    """What a resumed run may change."""

    allow: list[str] = field(default_factory=list)
    """Keys or sections, such as ``[optimizer.learning_rate, verifier]``, that a resumed run may change although they
    determine what it trains. It applies to one start and is not kept in the run's config.yaml. Every change is recorded
    in ``config_history.jsonl``."""


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every: NonNegativeInt = 50
    """Steps between checkpoints; 0 writes one only at the end. The last step is always saved."""
    keep: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_hours: NonNegativeFloat = 0.0
    """Also keep one of the older checkpoints per this many hours; 0 keeps none of them."""
    keep_best: str | None = None
    """Also keep the checkpoint with the largest value of this metric, such as ``reward`` or ``evaluation/pass@1``."""
    asynchronous: bool = False
    """Continue training while a checkpoint is written from a copy in host memory."""
    start_from: str | None = None
    """Folder with the weights, and the optimizer state if there is any, that a new run begins with instead of the
    weights of ``model.path``: the directory of another run, one of its ``checkpoints/step_N``, or the output of
    ``tools/convert_checkpoint.py to-megatron``; with ``lora.rank`` above 0, also a folder of adapters in PEFT's format.
    A run that has checkpoints of its own resumes from them instead."""
    start_optimizer: bool = True
    """Also begin with the optimizer state in `start_from`; otherwise the optimizer starts anew."""
    export_huggingface: bool = True
    """Write the final policy as a Hugging Face folder, ``huggingface/`` in the run directory."""
    export_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the exported weights, which the folder's config.json names. ``auto`` is ``model.dtype``: these weights
    are the policy that was trained and rolled out. From a bfloat16 policy, ``float32`` gives the same weights in twice
    the space; the optimizer's float32 master weights stay in the checkpoint. ``bfloat16`` rounds a float32 policy."""

    def export_torch_dtype(self) -> torch.dtype | None:
        """Return `export_dtype` as a dtype; None for ``auto``."""
        return None if self.export_dtype == "auto" else getattr(torch, self.export_dtype)
