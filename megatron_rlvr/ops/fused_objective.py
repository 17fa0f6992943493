"""The clipped objective from hidden states and a vocabulary-sharded weight, without the logits of all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .kept import KeptSets, check_kept
from .objective import GateMasks, check_token_tensors
from .reference import NOT_A_TARGET
from .statistics import check_temperature, refuse_second_derivative
from .thresholds import Thresholds, four_scalars, steered
from .vocab_parallel import VocabShard
from .vocab_projection import (
    ProjectionGradients,
    TokenChunks,
    VocabSoftmax,
    WeightGradient,
    check_projection,
    gather_hidden,
    reduce_hidden_gradient,
)


@dataclass(frozen=True)
class FusedObjective(GateMasks):
    """The loss of tokens and the values it was computed from. Only ``loss`` is differentiable.

    Attributes:
        loss: 0-d float32, differentiable in hidden states and weight.
        objective: float32 [T], times the steering weight, without token weight and entropy term.
        logprob, entropy: float32 [T], in nats.
        gate: uint8 [T]. 0: the gradient flows. 1: the upper bound acts. 2: the lower bound acts.
        clip_high: number of tokens with A > 0 and r above the upper bound, 0-d int64.
        clip_low: number of tokens with A < 0 and r below the lower bound, 0-d int64.
        region_counts: int64 [4], tokens in the regions E1 to E4.
    """

    loss: Tensor
    objective: Tensor
    logprob: Tensor
    entropy: Tensor
    gate: Tensor
    clip_high: Tensor
    clip_low: Tensor
    region_counts: Tensor


def fused_linear_objective(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    thresholds: Thresholds,
    *,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    steering_weight: Tensor | None = None,
    temperature: float = 1.0,
    entropy_coefficient: float = 0.0,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_bytes: int | None = None,
    vocabulary: int | None = None,
    loss_scale: float | None = None,
    kept: KeptSets | None = None,
) -> FusedObjective:
    """loss = -sum_t w_t (s_t clipped objective_t + entropy_coefficient * entropy_t), with its gradients, by chunks.

    The forward pass computes the gradients; the backward pass multiplies them by the gradient that reaches ``loss``.
    Communication is that of :func:`fused_linear_token_statistics`, all of it in the forward pass.

    Args:
        hidden, weight, targets: as in :func:`fused_linear_token_statistics`.
        old_logprob, advantage: float32 [T].
        thresholds: as in :func:`clipped_objective`.
        mask: bool [T]. Tokens outside it, whatever their target, and tokens without target (-100) have weight 0 and are
            not counted.
        token_weight: w, float32 [T]; None for 1.
        steering_weight: s, as in :func:`clipped_objective`.
        temperature, group, sequence_parallel, chunk_bytes, vocabulary, kept: as in
            :func:`fused_linear_token_statistics`. The kept set of a token outside the mask need not hold its target.
        entropy_coefficient: weight of the entropy term.
        loss_scale: the gradient that will reach ``loss``, if it is known beforehand (1 / microbatches, a loss scale).
            The forward pass then adds the weight's gradient to ``weight.main_grad``, and the backward pass fails if
            another number arrives. Without it a float32 gradient of the weight is held between the two passes.

    Raises ValueError for a wrong type, shape or device and for thresholds whose bounds do not exist. Raises
    RuntimeError for a second backward pass, for a second derivative, and if ``loss_scale`` was wrong (on a GPU by a
    device-side assertion, since a check would wait for the device).
    """
    check_temperature(temperature)
    shard = VocabShard.of(group, weight.shape[0], vocabulary)
    check_projection(hidden, weight, targets, shard, sequence_parallel, chunk_bytes, None)
    tokens = {"advantage": advantage, "mask": mask, "token_weight": token_weight, "steering_weight": steering_weight}
    check_token_tensors(old_logprob, tokens, first="old_logprob")
    if old_logprob.shape != targets.shape:
        raise ValueError(f"old_logprob: must be [T] with T = {targets.shape[0]}, found {list(old_logprob.shape)}")
    targets = targets.contiguous()
    if mask is not None:  # the target of a masked token may be anything, for example a padding id
        is_valid = (targets >= 0) & (targets < shard.vocabulary) & (kept is None)
        targets = torch.where(mask | is_valid, targets, torch.full_like(targets, NOT_A_TARGET))
    if kept is not None:
        check_kept(kept, targets)
    steering_weight = steered(thresholds, steering_weight, None)
    has_target = targets != NOT_A_TARGET
    mask = has_target if mask is None else mask & has_target
    softmax = VocabSoftmax(shard, group, 1.0 / temperature, sequence_parallel, chunk_bytes, kept)
    loss, objective, logprob, entropy, gate, counts = _Objective.apply(
        hidden,
        weight,
        targets,
        (old_logprob.detach(), advantage.detach(), mask, *_detached(token_weight, steering_weight)),
        (four_scalars(thresholds), float(entropy_coefficient), loss_scale),
        softmax,
    )
    return FusedObjective(loss, objective, logprob, entropy, gate, counts[0], counts[1], counts[2:])


def _detached(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.detach() for tensor in tensors]


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        tokens: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
        settings: tuple[tuple[float, float, float, float], float, float | None],
        vocabulary: VocabSoftmax,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        old_logprob, advantage, mask, token_weight, steering_weight = tokens
        scalars, entropy_coefficient, loss_scale = settings
        needs_gradient = ctx.needs_input_grad[:2]
        into_main_grad = loss_scale is not None and getattr(weight, "main_grad", None) is not None
        assumed_gradient = loss_scale if into_main_grad and loss_scale is not None else 1.0
        full = gather_hidden(hidden, vocabulary.shard, vocabulary.group, vocabulary.sequence_parallel)
        objective, logprob, entropy = (torch.empty_like(old_logprob) for _ in range(3))
        gate = torch.empty_like(old_logprob, dtype=torch.uint8)
        counts = torch.zeros(6, dtype=torch.int64, device=full.device)
        per_token = torch.ones_like(old_logprob) if token_weight is None else token_weight
        per_token = torch.where(mask, per_token, torch.zeros_like(per_token))
        scaled = per_token * assumed_gradient
        gradients = ProjectionGradients(full, weight, needs_gradient, into_main_grad) if any(needs_gradient) else None
        for chunk, logits in TokenChunks(full, weight, vocabulary.chunk_bytes):
            logprob[chunk], entropy[chunk], state, _ = vocabulary.statistics(chunk, logits, targets)
            objective[chunk], derivative, counts_of_chunk, gate[chunk] = torch.ops.megatron_rlvr.clipped_objective(
                logprob[chunk],
                old_logprob[chunk],
                advantage[chunk],
                mask[chunk],
                None if steering_weight is None else steering_weight[chunk],
                entropy[chunk],
                *scalars,
            )
            counts += counts_of_chunk
            if gradients is not None:
                g, h = -scaled[chunk] * derivative, -scaled[chunk] * entropy_coefficient
                vocabulary.write_gradient(chunk, logits, targets, state, g, h)
                gradients.add(chunk, logits, full)
        total = objective if entropy_coefficient == 0.0 else objective + entropy_coefficient * entropy
        loss = -torch.where(per_token == 0, torch.zeros_like(total), per_token * total).sum()
        if gradients is not None:
            grad_hidden = gradients.hidden
            if grad_hidden is not None:
                grad_hidden = reduce_hidden_gradient(
                    grad_hidden, vocabulary.shard, vocabulary.group, vocabulary.sequence_parallel
                )
            ctx.held = (grad_hidden, gradients.of_weight)
            ctx.assumed_gradient, ctx.into_main_grad = assumed_gradient, into_main_grad
        ctx.mark_non_differentiable(objective, logprob, entropy, gate, counts)
        return loss, objective, logprob, entropy, gate, counts

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple:
        refuse_second_derivative("fused_linear_objective")
        if ctx.held is None:
            raise RuntimeError(
                "fused_linear_objective: second backward pass: the first one has used up the gradients; repeat the "
                "forward pass"
            )
        (grad_hidden, of_weight), ctx.held = ctx.held, None
        grad_weight = None
        if ctx.into_main_grad:
            _check_scale(grad_loss, ctx.assumed_gradient)
        else:  # the gradients belong to a loss gradient of 1: scale them in place, by a number on the device
            if grad_hidden is not None:
                grad_hidden.mul_(grad_loss)
            if of_weight is not None:
                of_weight.total.mul_(grad_loss)
        if of_weight is not None:
            grad_weight = of_weight.for_autograd()
            main_grad = getattr(of_weight.weight, "main_grad", None)
            if main_grad is not None and not ctx.into_main_grad:
                main_grad.add_(of_weight.total)
                grad_weight = WeightGradient(of_weight.weight, into_main_grad=True).for_autograd()
        return grad_hidden, grad_weight, None, None, None, None


def _check_scale(grad_loss: Tensor, scale: float) -> None:
    """Raise RuntimeError if the gradient that reaches the loss is not the one that the weight's gradient assumed."""
    is_as_promised = torch.isclose(grad_loss, torch.full_like(grad_loss, scale), rtol=1e-6)
    message = f"fused_linear_objective: loss_scale={scale} was promised, but another gradient reached the loss"
    if grad_loss.device.type == "cpu":
        if not is_as_promised:
            raise RuntimeError(f"{message}: {grad_loss.item()}; the weight's main_grad is wrong now")
    else:
        torch._assert_async(is_as_promised, message)  # without waiting for the device
