"""The clipped objective of tokens, under affine clip thresholds or under bounds given per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import reference
from .library import define
from .thresholds import Thresholds, four_scalars, steered


class GateMasks:
    """Mixin for dataclasses with a ``gate``: masks of the tokens on which a bound acts."""

    gate: Tensor

    @property
    def is_clipped_high(self) -> Tensor:
        """Tokens with A > 0 and r above the upper bound: bool [T]."""
        return self.gate == reference.CLIPPED_HIGH

    @property
    def is_clipped_low(self) -> Tensor:
        """Tokens with A < 0 and r below the lower bound: bool [T]."""
        return self.gate == reference.CLIPPED_LOW


@dataclass(frozen=True)
class ClippedObjective(GateMasks):
    """The objective of tokens, with clip and region counts. Nothing waits for the device until a value is read.

    Attributes:
        objective: [T] in the log-prob's type, differentiable in the log-prob.
        clip_high: number of tokens with A > 0 and r above the upper bound, 0-d int64.
        clip_low: number of tokens with A < 0 and r below the lower bound, 0-d int64.
        gate: uint8 [T]. 0: the gradient flows. 1: the upper bound acts. 2: the lower bound acts. 3: the dual clip acts.
        region_counts: int64 [4], tokens in the regions E1 to E4; None without entropy.
    """

    objective: Tensor
    clip_high: Tensor
    clip_low: Tensor
    gate: Tensor
    region_counts: Tensor | None = None


def clipped_objective(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    thresholds: Thresholds,
    *,
    dual_clip: float | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    steering_weight: Tensor | None = None,
    entropy: Tensor | None = None,
) -> ClippedObjective:
    """Token objective weight * min(r A, clip(r, low, high) A), to be maximised, with its clip and region counts.

    r = e^(logprob - old_logprob) is the importance ratio. The bounds follow from the thresholds a p + b of the current
    probability in closed form: low = (1 - b_l) / (1 + a_l p_old) and high = (1 + b_u) / (1 - a_u p_old). Source:
    PPO, arXiv 1707.06347, equation 7; the thresholds are those of arXiv 2602.09782. The gradient flows to ``logprob``
    only. There is no communication. Objective and gradient are finite for any log-ratio, and exact wherever float32
    holds them; elsewhere they are the largest finite number of their sign. Log-probs may be -inf.

    Args:
        logprob, old_logprob, advantage: float32 [T] on one device, log-probs in nats. All may be float64 instead, for
            verification, which the eager reference computes even if kernels are compiled.
        thresholds: a ``megatron_rlvr.control.ClipThresholds`` or another object with ``upper.slope``,
            ``upper.intercept``, ``lower.slope`` and ``lower.intercept``; a number eps for the bounds 1 - eps and
            1 + eps; or a pair (lower, upper) for 1 - lower and 1 + upper. Infinity turns clipping off on that side.
        dual_clip: where A < 0, the objective is at least dual_clip * A (arXiv 1912.09729). Must exceed 1.
        mask: bool [T]. Tokens outside it give objective and gradient 0 and are not counted, whatever they hold.
        weight: [T] in the log-prob's type, multiplies objective and gradient.
        steering_weight: the same once more, for the weights of ``thresholds.steering``
            (``megatron_rlvr.control.StepTokens.steering_weights``). Required unless the thresholds' steering is 0.
        entropy: H of each token's state in nats, [T] in the log-prob's type. If given, regions are counted: E1
            (-ln p < H, A > 0), E2 (-ln p >= H, A > 0), E3 (-ln p < H, A < 0), E4 (-ln p >= H, A < 0).

    Raises ValueError for a wrong type, shape or device, for thresholds whose bounds do not exist for some probability
    in [0, 1], for thresholds with steering but no ``steering_weight``, and for a dual clip of 1 or below.
    """
    tensors = {"old_logprob": old_logprob, "advantage": advantage, "mask": mask, "weight": weight, "entropy": entropy}
    types = (torch.float32, torch.float64)
    check_token_tensors(logprob, {**tensors, "steering_weight": steering_weight}, types=types)
    check_dual_clip(dual_clip)
    tensors["weight"] = steered(thresholds, steering_weight, weight)
    results = _run("clipped_objective", logprob, *tensors.values(), *four_scalars(thresholds), dual_clip)
    return _with_counts(*results, has_regions=entropy is not None)


def bounded_objective(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    low: Tensor | float,
    high: Tensor | float,
    *,
    dual_clip: float | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    entropy: Tensor | None = None,
) -> ClippedObjective:
    """Token objective weight * min(r A, clip(r, low, high) A), to be maximised, under bounds given per token.

    :func:`clipped_objective` with ``low`` and ``high`` instead of thresholds: float32 [T], or one number for all
    tokens. No gradient flows to them. Everything else, including the dual clip and the errors, is the same. To clip
    another ratio, for example a sequence's, pass its logarithm as ``logprob`` and zeros as ``old_logprob``.
    """
    low, high = (b if isinstance(b, Tensor) else torch.full_like(logprob, b) for b in (low, high))
    tensors = {
        "old_logprob": old_logprob,
        "advantage": advantage,
        "low": low,
        "high": high,
        "mask": mask,
        "weight": weight,
        "entropy": entropy,
    }
    check_token_tensors(logprob, tensors, types=(torch.float32, torch.float64))
    check_dual_clip(dual_clip)
    results = _run("bounded_objective", logprob, *tensors.values(), dual_clip)
    return _with_counts(*results, has_regions=entropy is not None)


def _run(operator: str, logprob: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(objective, derivative, counts, gate) of an operator; gradient flows to ``logprob`` only."""
    detached = (a.detach().contiguous() if isinstance(a, Tensor) else a for a in arguments)
    if logprob.dtype == torch.float64:
        return _InFloat64.apply(logprob.contiguous(), *detached, operator)
    return getattr(torch.ops.megatron_rlvr, operator)(logprob.contiguous(), *detached)


def _with_counts(
    objective: Tensor, derivative: Tensor, counts: Tensor, gate: Tensor, *, has_regions: bool
) -> ClippedObjective:
    return ClippedObjective(objective, counts[0], counts[1], gate, counts[2:] if has_regions else None)


def check_dual_clip(dual_clip: float | None) -> None:
    if dual_clip is not None and not dual_clip > 1.0:
        raise ValueError(f"dual_clip: must exceed 1, found {dual_clip!r}")


def check_token_tensors(
    logprob: Tensor,
    others: dict[str, Tensor | None],
    first: str = "logprob",
    types: tuple[torch.dtype, ...] = (torch.float32,),
) -> None:
    """Raise ValueError unless every tensor is [T] like ``logprob``, on its device and of its type (``mask``: bool).

    ``first`` names ``logprob`` in messages; ``types`` are those it may have.
    """
    if logprob.dim() != 1 or logprob.dtype not in types:
        remedy = "; call .float()" if logprob.dtype in (torch.float16, torch.bfloat16) else ""
        remedy += "; flatten batch and sequence" if logprob.dim() > 1 else ""
        raise ValueError(f"{first}: must be float32 [T], found {logprob.dtype} {list(logprob.shape)}{remedy}")
    for name, tensor in others.items():
        if tensor is None:
            continue
        expected = torch.bool if name == "mask" else logprob.dtype
        if tensor.dtype != expected:
            remedy = "" if expected == torch.bool else f"; call .to({expected})"
            raise ValueError(f"{name}: must be {expected}, found {tensor.dtype}{remedy}")
        if tensor.shape != logprob.shape:
            raise ValueError(f"{name}: must be [T] with T = {logprob.shape[0]} tokens, found {list(tensor.shape)}")
        if tensor.device != logprob.device:
            raise ValueError(f"{name}: must be on the device of log-probs, {logprob.device}, found {tensor.device}")


def _fake_objective(logprob: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts, gate = logprob.new_empty((6,), dtype=torch.int64), torch.empty_like(logprob, dtype=torch.uint8)
    return torch.empty_like(logprob), torch.empty_like(logprob), counts, gate


def _save_derivative(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, derivative, counts, gate = output
    ctx.save_for_backward(derivative)
    ctx.argument_count = len(inputs)
    ctx.mark_non_differentiable(counts, gate)
    ctx.set_materialize_grads(False)


def _objective_backward(ctx: Any, grad_objective: Tensor | None, grad_derivative: Tensor | None, *_: Any) -> tuple:
    # The derivative is weight * r A inside the bounds and 0 outside: it is its own derivative, so that higher
    # derivatives are exact, too.
    (derivative,) = ctx.saved_tensors
    incoming = [grad for grad in (grad_objective, grad_derivative) if grad is not None]
    grad_logprob = sum(incoming[1:], incoming[0]) * derivative if incoming else None
    return (grad_logprob, *([None] * (ctx.argument_count - 1)))


class _InFloat64(torch.autograd.Function):
    """The eager reference with the operators' autograd formula: autograd of e^x meets 0 * inf where a bound acts."""

    @staticmethod
    def forward(logprob: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return getattr(reference, arguments[-1])(logprob, *arguments[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _save_derivative(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        return _objective_backward(ctx, *gradients)


_RESULTS = "-> (Tensor objective, Tensor derivative, Tensor counts, Tensor gate)"
define(
    "clipped_objective(Tensor logprob, Tensor old_logprob, Tensor advantage, Tensor? mask, Tensor? weight,"
    " Tensor? entropy, float upper_slope, float upper_intercept, float lower_slope, float lower_intercept,"
    f" float? dual_clip=None) {_RESULTS}",
    eager=reference.clipped_objective,
    fake=_fake_objective,
    backward=_objective_backward,
    setup_context=_save_derivative,
)
define(
    "bounded_objective(Tensor logprob, Tensor old_logprob, Tensor advantage, Tensor low, Tensor high, Tensor? mask,"
    f" Tensor? weight, Tensor? entropy, float? dual_clip=None) {_RESULTS}",
    eager=reference.bounded_objective,
    fake=_fake_objective,
    backward=_objective_backward,
    setup_context=_save_derivative,
)
