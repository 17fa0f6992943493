"""Log-prob and exact entropy of tokens from vocabulary-sharded logits, with the gradient written over the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import statistics_operators  # noqa: F401, registers what torch.ops.megatron_rlvr has below
from .compiled import check_device
from .kept import KeptSets, check_kept
from .vocab_parallel import VocabShard, gather_partials

LOGIT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class NonFiniteLogitsError(RuntimeError):
    """Rows of the logits hold NaN or +inf, or nothing above -inf. Raised on the CPU only, by every rank of a group."""

    def __init__(self, message: str):
        super().__init__(message)


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of each token, float32 [T].

    Attributes:
        logprob: ln p of the target in nats, differentiable in the logits.
        entropy: H = -sum_x p_x ln p_x in nats, differentiable in the logits.
        sum_squared_prob: sum_x p_x^2, detached; None unless requested.
        sum_squared_prob_logprob: sum_x p_x^2 ln p_x, detached; None unless requested. With the previous one it gives
            the exact first-order entropy change of a step (``megatron_rlvr.control.regions.entropy_change``).
    """

    logprob: Tensor
    entropy: Tensor
    sum_squared_prob: Tensor | None = None
    sum_squared_prob_logprob: Tensor | None = None


def token_statistics(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    inplace: bool = True,
    second_moments: bool = False,
    vocabulary: int | None = None,
    kept: KeptSets | None = None,
) -> TokenStatistics:
    """Log-prob of each target and entropy of each row's softmax(logits / temperature), exact over the whole vocabulary.

    With ``kept``, exact over each row's kept set instead: the policy that samples under top-p or top-k. Then only the
    kept logits are read, and the gradient with respect to all others is 0.

    Only four numbers per row are saved for the backward pass. Communication over ``group``: one all-gather of 4 float32
    per row (6 with ``second_moments``) in the forward pass, none in the backward pass.

    Args:
        logits: [T, V/tp] in float32, bfloat16 or float16. Any row stride, column stride 1; they are read where they
            are, without a copy.
        targets: int64 [T], ids of the whole vocabulary, or -100 for a row without target, whose log-prob is 0.
        temperature: one number for all rows. It divides the logits before both statistics.
        group: the tensor-parallel group, whose ranks hold equal consecutive shards of the vocabulary; None if the
            vocabulary is not sharded.
        inplace: write the gradient over the logits' storage. Then neither the caller nor another autograd node may read
            the logits after the backward pass: the operation that made them is refused if it saved them, torch's
            version counter makes another node that saved them raise (not inside torch.utils.checkpoint), and a second
            backward pass raises RuntimeError. A linear layer before this operator is safe, because it saves its input
            and weight and not its output. False allocates the gradient. Under torch.compile it is always allocated.
        second_moments: return sum p^2 and sum p^2 ln p, too.
        vocabulary: size of the whole vocabulary, needed if the number of ranks does not divide it. The last shard is
            then shorter than ceil(V/tp).
        kept: the ids that each row keeps, the same on every rank of the group; None keeps the whole vocabulary. It must
            hold the target of every row that has one.

    Raises ValueError for a wrong type, shape or device, and with ``inplace`` for a parameter as logits and for logits
    that the operation before saved. On the CPU it raises ValueError for a target outside the vocabulary or outside its
    row's kept set, and NonFiniteLogitsError, a RuntimeError, for rows with NaN, with +inf or with nothing above -inf.
    On a GPU, where a check would wait for the device, these rows give NaN.
    """
    _check_arguments(logits, targets, temperature, inplace)
    check_device(logits.device)
    shard = VocabShard.of(group, logits.shape[1], vocabulary)
    if kept is not None:
        check_kept(kept, targets)
    arguments = (logits, targets.contiguous(), 1.0 / temperature, shard, group, second_moments, kept)
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
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _check_producer(logits)


def _check_producer(logits: Tensor) -> None:
    """Raise ValueError if the operation that made the logits saved them for its own backward pass.

    Overwritten, they would stop that pass with a message of torch that names no remedy, and under hooks for saved
    tensors, such as those of torch.utils.checkpoint, where torch counts no versions, give it wrong numbers.
    """
    for tensor in (logits, logits._base):  # a view has the saved tensor as its base
        node = None if tensor is None else tensor.grad_fn
        # Every generated node that saves its output has this name. Pow has it and does not always save.
        if node is not None and hasattr(type(node), "_raw_saved_result") and not node.name().startswith("Pow"):
            raise ValueError(
                f"logits: {node.name()} saved them for its own backward pass, which comes after the gradient was "
                "written over them; pass inplace=False"
            )


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless ``temperature`` is a positive finite number."""
    if not isinstance(temperature, int | float):
        raise ValueError(
            f"temperature: must be a positive finite number, found {temperature!r}; pass one float for all rows"
        )
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature: must be a positive finite number, found {temperature!r}")


def refuse_second_derivative(operator: str) -> None:
    """Raise RuntimeError if the backward pass in progress will be differentiated (``create_graph=True``).

    The gradient is computed from detached numbers, so a second derivative would silently lack this operator's term.
    torch's ``once_differentiable`` does not raise if the incoming gradient is a constant.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{operator}: create_graph=True asks for a second derivative, which this operator does not have; "
            "leave create_graph out, or use torch.log_softmax where two derivatives are needed"
        )


def statistics_of_shard(
    logits: Tensor,
    targets: Tensor,
    inverse_temperature: float,
    shard: VocabShard,
    group: dist.ProcessGroup | None,
    second_moments: bool,
    kept: KeptSets | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob, entropy, row state and second moments, without gradient: two kernels with one all-gather between."""
    vocabulary = shard.vocabulary
    try:
        partials = _row_statistics(logits, targets, kept, shard, inverse_temperature, second_moments)
        gathered = gather_partials(partials, shard, group, inverse_temperature)
        return torch.ops.megatron_rlvr.combine_statistics(gathered, targets, vocabulary, inverse_temperature)
    except RuntimeError as error:
        if str(error).startswith(("targets:", "kept:")):  # torch's stable ABI passes the message on, but not the type
            raise ValueError(str(error)) from None
        if str(error).startswith("logits:"):
            raise NonFiniteLogitsError(str(error)) from None
        raise


def _row_statistics(
    logits: Tensor,
    targets: Tensor,
    kept: KeptSets | None,
    shard: VocabShard,
    inverse_temperature: float,
    second_moments: bool,
) -> Tensor:
    """Partial statistics of a shard."""
    ops, settings = torch.ops.megatron_rlvr, (shard.start, shard.vocabulary, inverse_temperature, second_moments)
    if kept is None:
        return ops.row_statistics(logits, targets, *settings)
    return ops.kept_row_statistics(logits, targets, kept.ids, kept.offsets, *settings)


def write_gradient(logits: Tensor, targets: Tensor, kept: KeptSets | None, *arguments: Any) -> None:
    """Overwrite logits with their gradient; ``arguments`` are those of the operator from ``state`` on."""
    ops = torch.ops.megatron_rlvr
    if kept is None:
        ops.logits_gradient_(logits, targets, *arguments)
    else:
        ops.kept_logits_gradient_(logits, targets, kept.ids, kept.offsets, *arguments)


def _new_gradient(logits: Tensor, targets: Tensor, kept: KeptSets | None, *arguments: Any) -> Tensor:
    ops = torch.ops.megatron_rlvr
    if kept is None:
        return ops.logits_gradient(logits, targets, *arguments)
    return ops.kept_logits_gradient(logits, targets, kept.ids, kept.offsets, *arguments)


class _TokenStatistics(torch.autograd.Function):
    """The statistics with a backward pass that may overwrite the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        inverse_temperature: float,
        shard: VocabShard,
        group: dist.ProcessGroup | None,
        second_moments: bool,
        kept: KeptSets | None,
        inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprob, entropy, state, moments = statistics_of_shard(
            logits, targets, inverse_temperature, shard, group, second_moments, kept
        )
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(logits, targets, state)
            ctx.kept = kept
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
                "them (inplace=True); pass inplace=False to keep the graph"
            )
        try:
            logits, targets, state = ctx.saved_tensors
        except RuntimeError as error:
            raise RuntimeError(
                "token_statistics: the logits cannot be read again: they were changed in place, or consumed by the "
                "backward pass of another token_statistics(inplace=True), after the forward pass; pass inplace=False "
                f"there. torch says: {error}"
            ) from error
        arguments = (targets, ctx.kept, state, grad_logprob.contiguous(), grad_entropy.contiguous())
        position = (ctx.vocab_start, ctx.inverse_temperature)
        if ctx.inplace:
            write_gradient(logits, *arguments, *position)
            # Another autograd node that saved these logits must raise instead of reading gradients in their place.
            torch.autograd.graph.increment_version(logits)
            ctx.consumed = True
            gradient = logits.detach()
        else:
            gradient = _new_gradient(logits, *arguments, *position)
        return gradient, *([None] * 7)


def _traceable(
    logits: Tensor,
    targets: Tensor,
    inverse_temperature: float,
    shard: VocabShard,
    group: dist.ProcessGroup | None,
    second_moments: bool,
    kept: KeptSets | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics as registered operators only, whose autograd formula torch.compile can trace."""
    partials = _row_statistics(logits.detach(), targets, kept, shard, inverse_temperature, second_moments)
    gathered = gather_partials(partials, shard, group, inverse_temperature)
    ops, settings = torch.ops.megatron_rlvr, (gathered, shard.start, shard.vocabulary, inverse_temperature)
    if kept is None:
        logprob, entropy, _, moments = ops.token_statistics(logits, targets, *settings)
    else:
        logprob, entropy, _, moments = ops.kept_token_statistics(logits, targets, kept.ids, kept.offsets, *settings)
    return logprob, entropy, moments
