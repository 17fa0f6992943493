"""From hidden states and a vocabulary-sharded weight to token statistics or the loss, without the logits of all tokens.

Three forms, by what is known when the logits of a chunk are at hand:

- :func:`fused_linear_statistics`: no gradient (old and reference log-probs). One matrix product.
- :func:`fused_linear_token_statistics`: any objective on top; the backward pass computes each chunk's logits again.
  Four matrix products instead of three.
- :func:`fused_linear_objective`: the clipped objective, whose gradient is known as soon as the chunk's log-probs are,
  so the gradients are formed in the forward pass. Three matrix products, as without fusing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .objective import GateMasks, Thresholds, check_token_tensors, four_scalars
from .reference import NOT_A_TARGET
from .statistics import TokenStatistics, check_temperature, refuse_second_derivative, statistics_of_shard
from .vocab_parallel import VocabShard
from .vocab_projection import (
    TokenChunks,
    WeightGradient,
    check_projection,
    gather_hidden,
    reduce_hidden_gradient,
)


@dataclass(frozen=True)
class FusedObjective(GateMasks):
    """The loss of tokens and what was computed on the way. Only ``loss`` is differentiable.

    Attributes:
        loss: 0-d float32, differentiable in hidden states and weight.
        objective: float32 [T], without token weight and entropy term.
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


@dataclass(frozen=True)
class _Vocabulary:
    """What every chunk needs to know of the softmax: which shard this is, and the temperature."""

    shard: VocabShard
    group: dist.ProcessGroup | None
    inverse_temperature: float
    sequence_parallel: bool
    chunk_bytes: int | None

    def statistics(
        self, logits: Tensor, targets: Tensor, second_moments: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-prob, entropy, row state and moments of a chunk: one all-gather."""
        return statistics_of_shard(logits, targets, self.inverse_temperature, self.shard, self.group, second_moments)

    def gradient_over(self, logits: Tensor, targets: Tensor, state: Tensor, g: Tensor, h: Tensor) -> None:
        """Write the gradient of a chunk's logits over them."""
        start = self.shard.start
        torch.ops.megatron_rlvr.logits_gradient_(logits, targets, state, g, h, start, self.inverse_temperature)


class _Gradients:
    """Gradients of hidden states and weight, summed a chunk at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, wanted: tuple[bool, bool], into_main_grad: bool):
        self.weight = weight
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self.of_weight = WeightGradient(weight, into_main_grad) if wanted[1] else None

    def add(self, chunk: slice, grad_logits: Tensor, hidden: Tensor) -> None:
        if self.hidden is not None:
            torch.mm(grad_logits, self.weight, out=self.hidden[chunk])
        if self.of_weight is not None:
            self.of_weight.add(grad_logits, hidden[chunk])


def fused_linear_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    second_moments: bool = False,
    sequence_parallel: bool = False,
    chunk_bytes: int | None = None,
    vocabulary: int | None = None,
) -> TokenStatistics:
    """Log-prob and entropy of softmax(hidden weight^T / temperature), without gradient and without all the logits.

    Arguments, shapes and errors as in :func:`fused_linear_token_statistics`.
    """
    with torch.no_grad():
        return fused_linear_token_statistics(
            hidden.detach(),
            weight.detach(),
            targets,
            temperature=temperature,
            group=group,
            second_moments=second_moments,
            sequence_parallel=sequence_parallel,
            chunk_bytes=chunk_bytes,
            vocabulary=vocabulary,
        )


def fused_linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    second_moments: bool = False,
    sequence_parallel: bool = False,
    chunk_bytes: int | None = None,
    vocabulary: int | None = None,
) -> TokenStatistics:
    """``token_statistics(hidden @ weight.T, ...)``, differentiable, with the logits of one chunk at a time.

    Shapes: ``hidden`` [T, h] ([T/tp, h] under ``sequence_parallel``, consecutive tokens on consecutive ranks),
    ``weight`` [V/tp, h] of the same type, ``targets`` int64 [T]; ``vocabulary`` as in :func:`token_statistics`.
    ``chunk_bytes`` bounds the logits held at once (None: 64 MiB on the CPU, 512 MiB on a GPU). The backward pass
    computes the logits again. The weight's gradient is summed in float32, into ``weight.main_grad`` where there is one
    (Megatron's data-parallel wrapper makes it), and then nothing arrives in ``weight.grad``.
    Communication over ``group``: forward one all-gather of 4 float32 a token for each chunk; backward one all-reduce
    of the hidden gradient. Under ``sequence_parallel`` an all-gather of hidden states in both passes, and a
    reduce-scatter instead of the all-reduce. Raises ValueError for arguments that do not fit together.
    """
    check_temperature(temperature)
    shard = VocabShard.of(group, weight.shape[0], vocabulary)
    check_projection(hidden, weight, targets, shard, sequence_parallel, chunk_bytes)
    targets = targets.contiguous()
    softmax = _Vocabulary(shard, group, 1.0 / temperature, sequence_parallel, chunk_bytes)
    logprob, entropy, moments = _Statistics.apply(hidden, weight, targets, softmax, second_moments)
    return TokenStatistics(logprob, entropy, *(moments.unbind(0) if second_moments else (None, None)))


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocabulary: _Vocabulary, second_moments: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        full = gather_hidden(hidden, vocabulary.shard, vocabulary.group, vocabulary.sequence_parallel)
        tokens = full.shape[0]
        logprob, entropy = (full.new_empty(tokens, dtype=torch.float32) for _ in range(2))
        state = full.new_empty((tokens, 4), dtype=torch.float32)
        moments = full.new_empty((2 if second_moments else 0, tokens), dtype=torch.float32)
        for chunk, logits in TokenChunks(full, weight, vocabulary.chunk_bytes):
            found = vocabulary.statistics(logits, targets[chunk], second_moments)
            logprob[chunk], entropy[chunk], state[chunk], moments[:, chunk] = found
        if any(ctx.needs_input_grad[:2]):
            ctx.save_for_backward(hidden, weight, targets, state)
            # the parameter itself: autograd hands out another tensor for a saved one, which has no main_grad
            ctx.vocabulary, ctx.parameter = vocabulary, weight
        ctx.mark_non_differentiable(moments)
        return logprob, entropy, moments

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, _: Tensor) -> tuple:
        refuse_second_derivative("fused_linear_token_statistics")
        hidden, weight, targets, state = ctx.saved_tensors
        vocabulary = ctx.vocabulary
        shard, group, sequence_parallel = vocabulary.shard, vocabulary.group, vocabulary.sequence_parallel
        full = gather_hidden(hidden, shard, group, sequence_parallel)
        gradients = _Gradients(full, ctx.parameter, ctx.needs_input_grad[:2], into_main_grad=True)
        g, h = grad_logprob.contiguous(), grad_entropy.contiguous()
        for chunk, logits in TokenChunks(full, weight, vocabulary.chunk_bytes):
            vocabulary.gradient_over(logits, targets[chunk], state[chunk], g[chunk], h[chunk])
            gradients.add(chunk, logits, full)
        grad_hidden, grad_weight = None, None
        if gradients.hidden is not None:
            grad_hidden = reduce_hidden_gradient(gradients.hidden, shard, group, sequence_parallel)
        if gradients.of_weight is not None:
            grad_weight = gradients.of_weight.for_autograd()
        return grad_hidden, grad_weight, None, None, None


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
    temperature: float = 1.0,
    entropy_coefficient: float = 0.0,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_bytes: int | None = None,
    vocabulary: int | None = None,
    loss_scale: float | None = None,
) -> FusedObjective:
    """loss = -sum_t w_t (clipped objective_t + entropy_coefficient * entropy_t) with its gradients, chunk by chunk.

    Shapes and communication as in :func:`fused_linear_token_statistics`, but all of it in the forward pass, where the
    gradients are formed; ``old_logprob``, ``advantage`` and ``token_weight`` (w, default 1) float32 [T], ``mask`` bool
    [T]. Tokens outside the mask, whatever their target, and tokens without target (-100) have weight 0 and count
    nowhere. The backward pass multiplies the gradients by the one that reaches ``loss``.

    ``loss_scale`` is for those who know that number beforehand (1 / microbatches, a loss scale): then the weight's
    gradient goes straight into ``weight.main_grad`` in the forward pass, and the backward pass fails if another number
    arrives. Otherwise a float32 gradient of the weight is held between the two passes.
    Raises ValueError for arguments that do not fit together, and RuntimeError for a second backward pass.
    """
    check_temperature(temperature)
    shard = VocabShard.of(group, weight.shape[0], vocabulary)
    check_projection(hidden, weight, targets, shard, sequence_parallel, chunk_bytes)
    tokens = {"advantage": advantage, "mask": mask, "token_weight": token_weight}
    check_token_tensors(old_logprob, tokens, first="old_logprob")
    if old_logprob.shape != targets.shape:
        raise ValueError(f"old_logprob: must be [T] with T = {targets.shape[0]}, found {list(old_logprob.shape)}")
    targets = targets.contiguous()
    if mask is not None:  # what stands in a masked place, a padding id for one, is nobody's mistake
        known = (targets >= 0) & (targets < shard.vocabulary)
        targets = torch.where(mask | known, targets, torch.full_like(targets, NOT_A_TARGET))
    has_target = targets != NOT_A_TARGET
    mask = has_target if mask is None else mask & has_target
    softmax = _Vocabulary(shard, group, 1.0 / temperature, sequence_parallel, chunk_bytes)
    loss, objective, logprob, entropy, gate, counts = _Objective.apply(
        hidden,
        weight,
        targets,
        (old_logprob.detach(), advantage.detach(), mask, None if token_weight is None else token_weight.detach()),
        (four_scalars(thresholds), float(entropy_coefficient), loss_scale),
        softmax,
    )
    return FusedObjective(loss, objective, logprob, entropy, gate, counts[0], counts[1], counts[2:])


class _Objective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        tokens: tuple[Tensor, Tensor, Tensor, Tensor | None],
        settings: tuple[tuple[float, float, float, float], float, float | None],
        vocabulary: _Vocabulary,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        old_logprob, advantage, mask, token_weight = tokens
        scalars, entropy_coefficient, loss_scale = settings
        wanted = ctx.needs_input_grad[:2]
        straight = loss_scale is not None and getattr(weight, "main_grad", None) is not None
        formed_with = loss_scale if straight and loss_scale is not None else 1.0
        full = gather_hidden(hidden, vocabulary.shard, vocabulary.group, vocabulary.sequence_parallel)
        objective, logprob, entropy = (torch.empty_like(old_logprob) for _ in range(3))
        gate = torch.empty_like(old_logprob, dtype=torch.uint8)
        counts = torch.zeros(6, dtype=torch.int64, device=full.device)
        per_token = torch.ones_like(old_logprob) if token_weight is None else token_weight
        per_token = torch.where(mask, per_token, torch.zeros_like(per_token))
        scaled = per_token * formed_with
        gradients = _Gradients(full, weight, wanted, straight) if any(wanted) else None
        for chunk, logits in TokenChunks(full, weight, vocabulary.chunk_bytes):
            logprob[chunk], entropy[chunk], state, _ = vocabulary.statistics(logits, targets[chunk])
            objective[chunk], derivative, found, gate[chunk] = torch.ops.megatron_rlvr.clipped_objective(
                logprob[chunk],
                old_logprob[chunk],
                advantage[chunk],
                mask[chunk],
                None,
                entropy[chunk],
                *scalars,
            )
            counts += found
            if gradients is not None:
                g, h = -scaled[chunk] * derivative, -scaled[chunk] * entropy_coefficient
                vocabulary.gradient_over(logits, targets[chunk], state, g, h)
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
            ctx.formed_with, ctx.straight = formed_with, straight
        ctx.mark_non_differentiable(objective, logprob, entropy, gate, counts)
        return loss, objective, logprob, entropy, gate, counts

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple:
        refuse_second_derivative("fused_linear_objective")
        if ctx.held is None:
            raise RuntimeError(
                "fused_linear_objective: second backward pass: the gradients were handed out by the first"
            )
        (grad_hidden, of_weight), ctx.held = ctx.held, None
        grad_weight = None
        if ctx.straight:
            _check_scale(grad_loss, ctx.formed_with)
        else:  # what was formed for a gradient of 1 is scaled in place, by a number on the device
            if grad_hidden is not None:
                grad_hidden.mul_(grad_loss)
            if of_weight is not None:
                of_weight.total.mul_(grad_loss)
        if of_weight is not None:
            grad_weight = of_weight.for_autograd()
            main_grad = getattr(of_weight.weight, "main_grad", None)
            if main_grad is not None and not ctx.straight:
                main_grad.add_(of_weight.total)
                grad_weight = WeightGradient(of_weight.weight, into_main_grad=True).for_autograd()
        return grad_hidden, grad_weight, None, None, None, None


def _check_scale(grad_loss: Tensor, scale: float) -> None:
    """Fail if the gradient that reaches the loss is not what the weight's gradient was formed with."""
    same = torch.isclose(grad_loss, torch.full_like(grad_loss, scale), rtol=1e-6)
    message = f"fused_linear_objective: loss_scale={scale} was promised, but another gradient reached the loss"
    if grad_loss.device.type == "cpu":
        if not same:
            raise RuntimeError(f"{message}: {grad_loss.item()}; the weight's main_grad is wrong now")
    else:
        torch._assert_async(same, message)  # without waiting for the device
