"""Log-prob and exact entropy of tokens from vocabulary-sharded logits, with the gradient written over the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import library as _library  # noqa: F401  (registers torch.ops.megatron_rlvr)
from .compiled import check_device
from .vocab_parallel import VocabShard, gather_partials

LOGIT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class TokenStatistics:
    """Per-token statistics, each float32 [T], in nats.

    ``logprob`` and ``entropy`` are differentiable in the logits. The second moments are detached and None unless asked
    for; they give the exact first-order entropy change of a step (see ``megatron_rlvr.control.regions``).
    """

    logprob: Tensor
    entropy: Tensor
    sum_squared_prob: Tensor | None = None  # sum_x p_x^2
    sum_squared_prob_logprob: Tensor | None = None  # sum_x p_x^2 ln p_x


def token_statistics(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    inplace: bool = True,
    second_moments: bool = False,
    vocabulary: int | None = None,
) -> TokenStatistics:
    """Log-prob of each target and entropy of each row's softmax(logits / temperature), exact over the whole vocabulary.

    Shapes: ``logits`` [T, V/tp] in float32, bfloat16 or float16, any row stride, unit column stride, read where they
    lie; ``targets`` int64 [T], ids of the whole vocabulary, or -100 for a row without target (log-prob 0). Ranks of the
    tensor-parallel ``group`` hold equal consecutive shards of the vocabulary; None means that it is not sharded. Where
    the ranks do not divide it, ``vocabulary`` is its size and the last shard is shorter than ceil(V/tp).
    Communication: one all-gather of 4 (6 with ``second_moments``) float32 a row in the forward pass, none backward.

    Only four numbers a row are saved. With ``inplace`` the backward pass writes the gradient over the logits' own
    storage, so neither the caller nor another autograd node may read the logits afterwards: torch's version counter
    makes a node that saved them raise, and a second backward pass raises RuntimeError. A linear layer is safe before
    it, because it saves its input and weight and not its output. ``inplace=False`` allocates the gradient instead.
    Under torch.compile the gradient is always allocated.

    Raises ValueError for a wrong type, shape or device or a parameter as logits with ``inplace``; and, checked on the
    CPU only because a check would wait for the device, ValueError for a target outside the vocabulary and RuntimeError
    for rows with NaN or +inf. On a device such rows give NaN.
    """
    _check_arguments(logits, targets, temperature, inplace)
    check_device(logits.device)
    shard = VocabShard.of(group, logits.shape[1], vocabulary)
    arguments = (logits, targets.contiguous(), 1.0 / temperature, shard, group, second_moments)
    if torch.compiler.is_compiling():
        logprob, entropy, moments = _traceable(*arguments)
    elif torch.is_grad_enabled() and logits.requires_grad:
        logprob, entropy, moments = _TokenStatistics.apply(*arguments, inplace)
    else:
        logprob, entropy, _, moments = statistics_of_shard(*arguments)
    return TokenStatistics(logprob, entropy, *(moments.unbind(0) if second_moments else (None, None)))


def _check_arguments(logits: Tensor, targets: Tensor, temperature: float, inplace: bool) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: must be [T, V/tp], found shape {list(logits.shape)}; flatten batch and sequence")
    if logits.dtype not in LOGIT_TYPES:
        raise ValueError(f"logits: must be float32, bfloat16 or float16, found {logits.dtype}")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(
            f"logits: the vocabulary must be contiguous (column stride 1), found strides {list(logits.stride())}; "
            "call .contiguous()"
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: must be int64, found {targets.dtype}")
    if targets.shape != logits.shape[:1]:
        raise ValueError(f"targets: must be [T] with T = {logits.shape[0]} rows of logits, found {list(targets.shape)}")
    if targets.device != logits.device:
        raise ValueError(f"targets: must be on the logits' device {logits.device}, found {targets.device}")
    check_temperature(temperature)
    if inplace and logits.requires_grad:
        if isinstance(logits, torch.nn.Parameter):
            raise ValueError(
                "logits: a parameter would be overwritten by its gradient in the backward pass; pass inplace=False"
            )
        if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1]:
            raise ValueError(
                f"logits: rows overlap in memory (strides {list(logits.stride())}), so the gradient cannot be written "
                "over them; pass inplace=False"
            )


def check_temperature(temperature: float) -> None:
    if not isinstance(temperature, int | float):
        raise ValueError(
            f"temperature: must be a positive finite number, found {temperature!r}; one serves all rows: float(...)"
        )
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature: must be a positive finite number, found {temperature!r}")


def refuse_second_derivative(operator: str) -> None:
    """Raise RuntimeError when the backward pass in progress is to be differentiated (``create_graph=True``).

    Its gradient is computed from detached numbers, so a second derivative would lack this operator's term and nobody
    would know: torch's own ``once_differentiable`` stays silent where the incoming gradient is a constant.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{operator}: create_graph=True asks for a second derivative, and there is none of this operator; "
            "leave create_graph out, or use torch.log_softmax for what is differentiated twice"
        )


def statistics_of_shard(
    logits: Tensor,
    targets: Tensor,
    inverse_temperature: float,
    shard: VocabShard,
    group: dist.ProcessGroup | None,
    second_moments: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob, entropy, row state and second moments, without gradient: two kernels and one all-gather between."""
    start, vocabulary = shard.start, shard.vocabulary
    ops = torch.ops.megatron_rlvr
    try:
        partials = ops.row_statistics(logits, targets, start, vocabulary, inverse_temperature, second_moments)
        gathered = gather_partials(partials, shard, group, inverse_temperature)
        return ops.combine_statistics(gathered, targets, vocabulary, inverse_temperature)
    except RuntimeError as error:
        if str(error).startswith("targets:"):  # torch's stable ABI carries the message, and not the type
            raise ValueError(str(error)) from None
        raise


def _traceable(
    logits: Tensor,
    targets: Tensor,
    inverse_temperature: float,
    shard: VocabShard,
    group: dist.ProcessGroup | None,
    second_moments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass as registered operators only, whose autograd formula torch.compile can trace."""
    start = shard.start
    partials = torch.ops.megatron_rlvr.row_statistics(
        logits.detach(), targets, start, shard.vocabulary, inverse_temperature, second_moments
    )
    gathered = gather_partials(partials, shard, group, inverse_temperature)
    logprob, entropy, _, moments = torch.ops.megatron_rlvr.token_statistics(
        logits, targets, gathered, start, shard.vocabulary, inverse_temperature
    )
    return logprob, entropy, moments


class _TokenStatistics(torch.autograd.Function):
    """The same forward pass with a backward pass that may consume the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        inverse_temperature: float,
        shard: VocabShard,
        group: dist.ProcessGroup | None,
        second_moments: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprob, entropy, state, moments = statistics_of_shard(
            logits, targets, inverse_temperature, shard, group, second_moments
        )
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits, targets, state)
            ctx.vocab_start, ctx.inverse_temperature = shard.start, inverse_temperature
            ctx.inplace, ctx.consumed = inplace, False
        ctx.mark_non_differentiable(moments)
        return logprob, entropy, moments

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, _: Tensor) -> tuple:
        refuse_second_derivative("token_statistics")
        if ctx.consumed:
            raise RuntimeError(
                "token_statistics: second backward pass over consumed logits: the first one wrote the gradient over "
                "them (inplace=True); pass inplace=False where the graph is kept"
            )
        try:
            logits, targets, state = ctx.saved_tensors
        except RuntimeError as error:
            raise RuntimeError(
                "token_statistics: the logits cannot be read again: they were changed in place, or consumed by the "
                "backward pass of another token_statistics(inplace=True), after the forward pass; pass inplace=False "
                f"there. torch says: {error}"
            ) from error
        arguments = (targets, state, grad_logprob.contiguous(), grad_entropy.contiguous())
        where = (ctx.vocab_start, ctx.inverse_temperature)
        if ctx.inplace:
            torch.ops.megatron_rlvr.logits_gradient_(logits, *arguments, *where)
            # Whoever else saved these logits for a backward pass of its own must not read gradients for logits.
            torch.autograd.graph.increment_version(logits)
            ctx.consumed = True
            gradient = logits.detach()
        else:
            gradient = torch.ops.megatron_rlvr.logits_gradient(logits, *arguments, *where)
        return gradient, None, None, None, None, None, None
