"""The operators as torch sees them: schemas, fake kernels, autograd formulas, and the eager kernels as the fallback.

The schemas stand here and nowhere else. The compiled library only adds kernels for the CPU and CUDA dispatch keys,
which take precedence; where it adds none, the eager reference runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import compiled as _compiled  # noqa: F401  (loads the compiled kernels)
from . import reference

NAMESPACE = "megatron_rlvr"

SCHEMAS = (
    "row_statistics(Tensor logits, Tensor targets, int vocab_start, int vocab_size, float inverse_temperature,"
    " bool second_moments) -> Tensor",
    "combine_statistics(Tensor gathered, Tensor targets, int vocab_size, float inverse_temperature)"
    " -> (Tensor logprob, Tensor entropy, Tensor state, Tensor moments)",
    # combine_statistics with the logits beside it, for autograd: differentiable in them by logits_gradient
    "token_statistics(Tensor logits, Tensor targets, Tensor gathered, int vocab_start, int vocab_size,"
    " float inverse_temperature) -> (Tensor logprob, Tensor entropy, Tensor state, Tensor moments)",
    "logits_gradient(Tensor logits, Tensor targets, Tensor state, Tensor grad_logprob, Tensor grad_entropy,"
    " int vocab_start, float inverse_temperature) -> Tensor",
    "logits_gradient_(Tensor(a!) logits, Tensor targets, Tensor state, Tensor grad_logprob, Tensor grad_entropy,"
    " int vocab_start, float inverse_temperature) -> ()",
    "clipped_objective(Tensor logprob, Tensor old_logprob, Tensor advantage, Tensor? mask, Tensor? weight,"
    " Tensor? entropy, float upper_slope, float upper_intercept, float lower_slope, float lower_intercept)"
    " -> (Tensor objective, Tensor derivative, Tensor counts)",
)

_library = torch.library.Library(NAMESPACE, "DEF")  # kept alive: torch forgets the operators of a collected library


def _write_gradient(logits: Tensor, *arguments: Any) -> None:
    logits.copy_(reference.logits_gradient(logits, *arguments))


def _fake_row_statistics(
    logits: Tensor, targets: Tensor, vocab_start: int, vocab_size: int, inverse_temperature: float, second_moments: bool
) -> Tensor:
    return logits.new_empty((logits.shape[0], 6 if second_moments else 4), dtype=torch.float32)


def _token_statistics(
    logits: Tensor, targets: Tensor, gathered: Tensor, vocab_start: int, vocab_size: int, inverse_temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.megatron_rlvr.combine_statistics(gathered, targets, vocab_size, inverse_temperature)


def _fake_combine_statistics(
    gathered: Tensor, targets: Tensor, vocab_size: int, inverse_temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = gathered.shape[1]
    shapes = ((rows,), (rows,), (rows, 4), (2 if gathered.shape[2] == 6 else 0, rows))
    logprob, entropy, state, moments = (gathered.new_empty(shape) for shape in shapes)
    return logprob, entropy, state, moments


def _fake_clipped_objective(logprob: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(logprob), torch.empty_like(logprob), logprob.new_empty((6,), dtype=torch.int64)


def _save_for_gradient(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, targets, _, ctx.vocab_start, _, ctx.inverse_temperature = inputs
    ctx.save_for_backward(logits, targets, output[2])
    ctx.mark_non_differentiable(output[2], output[3])


def _statistics_backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, *_: Any) -> tuple:
    logits, targets, state = ctx.saved_tensors
    gradient = torch.ops.megatron_rlvr.logits_gradient(
        logits,
        targets,
        state,
        grad_logprob.contiguous(),
        grad_entropy.contiguous(),
        ctx.vocab_start,
        ctx.inverse_temperature,
    )
    return gradient, None, None, None, None, None


def _save_derivative(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _objective_backward(ctx: Any, grad_objective: Tensor | None, grad_derivative: Tensor | None, _: Any) -> tuple:
    # w r A inside the bounds and 0 outside is its own derivative, so that higher derivatives are exact, too
    (derivative,) = ctx.saved_tensors
    known = [grad for grad in (grad_objective, grad_derivative) if grad is not None]
    return (sum(known[1:], known[0]) * derivative if known else None, *([None] * 9))


def _register() -> None:
    for schema in SCHEMAS:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    kernels = {
        "row_statistics": reference.row_statistics,
        "combine_statistics": reference.combine_statistics,
        "token_statistics": _token_statistics,
        "logits_gradient": reference.logits_gradient,
        "logits_gradient_": _write_gradient,
        "clipped_objective": reference.clipped_objective,
    }
    for name, kernel in kernels.items():
        _library.impl(name, kernel, "CompositeExplicitAutograd")
    fakes: dict[str, Any] = {
        "row_statistics": _fake_row_statistics,
        "combine_statistics": _fake_combine_statistics,
        "token_statistics": lambda logits, targets, gathered, *_: _fake_combine_statistics(gathered, targets, 0, 1.0),
        "logits_gradient": lambda logits, *_: torch.empty_like(logits),
        "logits_gradient_": lambda *_: None,
        "clipped_objective": _fake_clipped_objective,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    torch.library.register_autograd(
        f"{NAMESPACE}::token_statistics", _statistics_backward, setup_context=_save_for_gradient, lib=_library
    )
    torch.library.register_autograd(
        f"{NAMESPACE}::clipped_objective", _objective_backward, setup_context=_save_derivative, lib=_library
    )


_register()
