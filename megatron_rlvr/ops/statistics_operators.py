"""The operators of log-prob and entropy, registered with torch: over the whole vocabulary, and over kept sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .kept import KeptSets, check_values
from .library import define


def _kept_row_statistics(
    logits: Tensor, targets: Tensor, kept_ids: Tensor, kept_offsets: Tensor, vocab_start: int, *settings: Any
) -> Tensor:
    kept, width = KeptSets(kept_ids, kept_offsets), logits.shape[1]
    if logits.device.type == "cpu":
        check_values(kept, targets, settings[0])
    is_kept = kept.mask(vocab_start, width)
    partials = reference.row_statistics(_masked(logits, is_kept), targets, vocab_start, *settings)
    column, inside = reference.target_columns(targets, vocab_start, width)
    broken = inside & ~is_kept.gather(-1, column)
    partials[:, reference.MAXIMUM].masked_fill_(broken.squeeze(-1), torch.nan)
    return partials


def _kept_logits_gradient(
    logits: Tensor,
    targets: Tensor,
    kept_ids: Tensor,
    kept_offsets: Tensor,
    state: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    vocab_start: int,
    inverse_temperature: float,
) -> Tensor:
    is_kept = KeptSets(kept_ids, kept_offsets).mask(vocab_start, logits.shape[1])
    return reference.logits_gradient(
        _masked(logits, is_kept), targets, state, grad_logprob, grad_entropy, vocab_start, inverse_temperature
    )


def _masked(logits: Tensor, is_kept: Tensor) -> Tensor:
    return logits.masked_fill(~is_kept, -torch.inf)


def _in_place(gradient: Callable[..., Tensor]) -> Callable[..., None]:
    def write(logits: Tensor, *arguments: Any) -> None:
        logits.copy_(gradient(logits, *arguments))

    return write


def _token_statistics(logits: Tensor, targets: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, gathered, _, vocab_size, inverse_temperature = arguments
    return torch.ops.megatron_rlvr.combine_statistics(gathered, targets, vocab_size, inverse_temperature)


def _fake_row_statistics(logits: Tensor, *arguments: Any) -> Tensor:
    second_moments = arguments[-1]
    return logits.new_empty((logits.shape[0], 6 if second_moments else 4), dtype=torch.float32)


def _fake_combine_statistics(gathered: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = gathered.shape[1]
    shapes = ((rows,), (rows,), (rows, 4), (2 if gathered.shape[2] == 6 else 0, rows))
    logprob, entropy, state, moments = (gathered.new_empty(shape) for shape in shapes)
    return logprob, entropy, state, moments


def _fake_token_statistics(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_combine_statistics(arguments[-4])


def _save_for_gradient(ctx: Any, inputs: tuple, output: tuple) -> None:
    *read, _, ctx.vocab_start, _, ctx.inverse_temperature = inputs
    _, _, state, moments = output
    ctx.save_for_backward(*read, state)
    ctx.input_count = len(inputs)
    ctx.mark_non_differentiable(state, moments)


def _backward(gradient: str) -> Callable[..., tuple]:
    def backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, *_: Any) -> tuple:
        grad_logits = getattr(torch.ops.megatron_rlvr, gradient)(
            *ctx.saved_tensors,
            grad_logprob.contiguous(),
            grad_entropy.contiguous(),
            ctx.vocab_start,
            ctx.inverse_temperature,
        )
        return grad_logits, *([None] * (ctx.input_count - 1))

    return backward


def _define(
    prefix: str, rows: str, row_statistics: Callable[..., Tensor], logits_gradient: Callable[..., Tensor]
) -> None:
    """Define the operators of the statistics and of their gradient; `rows` are the arguments that describe the rows."""
    gradient_arguments = (
        f"{rows}, Tensor state, Tensor grad_logprob, Tensor grad_entropy, int vocab_start, float inverse_temperature"
    )
    define(
        f"{prefix}row_statistics(Tensor logits, {rows}, int vocab_start, int vocab_size, float inverse_temperature,"
        " bool second_moments) -> Tensor",
        eager=row_statistics,
        fake=_fake_row_statistics,
    )
    # combine_statistics with the logits as an argument, so that autograd can differentiate with respect to them.
    define(
        f"{prefix}token_statistics(Tensor logits, {rows}, Tensor gathered, int vocab_start, int vocab_size,"
        f" float inverse_temperature) -> {_STATISTICS}",
        eager=_token_statistics,
        fake=_fake_token_statistics,
        backward=_backward(f"{prefix}logits_gradient"),
        setup_context=_save_for_gradient,
        has_kernel=False,
    )
    define(
        f"{prefix}logits_gradient(Tensor logits, {gradient_arguments}) -> Tensor",
        eager=logits_gradient,
        fake=lambda logits, *_: torch.empty_like(logits),
    )
    define(
        f"{prefix}logits_gradient_(Tensor(a!) logits, {gradient_arguments}) -> ()",
        eager=_in_place(logits_gradient),
        fake=lambda *_: None,
    )


_STATISTICS = "(Tensor logprob, Tensor entropy, Tensor state, Tensor moments)"
define(
    f"combine_statistics(Tensor gathered, Tensor targets, int vocab_size, float inverse_temperature) -> {_STATISTICS}",
    eager=reference.combine_statistics,
    fake=_fake_combine_statistics,
)
_define("", "Tensor targets", reference.row_statistics, reference.logits_gradient)
_define("kept_", "Tensor targets, Tensor kept_ids, Tensor kept_offsets", _kept_row_statistics, _kept_logits_gradient)
