"""Token objectives, advantages and aggregation: everything between token statistics and the loss.

An objective is a callable ``TokenInputs -> TokenOutputs`` over flat token tensors; the loss of a minibatch is
``-(weights * outputs.objective).sum()`` with the weights of :func:`aggregation_weights`.
"""

from megatron_rlvr.objectives.advantages import (
    Advantage,
    group_advantages,
    informative_groups,
    overlong_penalty,
)
from megatron_rlvr.objectives.aggregation import Aggregation, aggregation_weights
from megatron_rlvr.objectives.policy_objective import PolicyObjective, UpdateObjective
from megatron_rlvr.objectives.reference_kl import KLEstimator, KLPlace, ReferenceKL
from megatron_rlvr.objectives.registry import (
    OBJECTIVE_PARAMETERS,
    OBJECTIVES,
    ObjectiveParameters,
    build_objective,
    objective_parameters,
)
from megatron_rlvr.objectives.tokens import TokenInputs, TokenObjective, TokenOutputs

__all__ = [
    "OBJECTIVES",
    "OBJECTIVE_PARAMETERS",
    "Advantage",
    "Aggregation",
    "KLEstimator",
    "KLPlace",
    "ObjectiveParameters",
    "PolicyObjective",
    "ReferenceKL",
    "TokenInputs",
    "TokenObjective",
    "TokenOutputs",
    "UpdateObjective",
    "aggregation_weights",
    "build_objective",
    "group_advantages",
    "informative_groups",
    "objective_parameters",
    "overlong_penalty",
]
