"""Token statistics from hidden states and a vocabulary-sharded weight, without the logits of all tokens.

There are three fused forms:

- :func:`fused_linear_statistics`: no gradient, for old and reference log-probs. One matrix product.
- :func:`fused_linear_token_statistics`: for any objective. The backward pass recomputes the logits of each chunk. Four
  matrix products instead of three.
- :func:`fused_linear_objective`, in fused_objective.py: the clipped objective. Its gradient is known as soon as a
  chunk's log-probs are, so the forward pass computes the gradients, too. Three matrix products, as without fusing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .kept import KeptSets
from .statistics import TokenStatistics, check_temperature, refuse_second_derivative
from .vocab_parallel import VocabShard
from .vocab_projection import (
    ProjectionGradients,
    TokenChunks,
    VocabSoftmax,
    check_projection,
    gather_hidden,
    reduce_hidden_gradient,
)


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
    kept: KeptSets | None = None,
) -> TokenStatistics:
    """Log-prob and entropy of softmax(hidden weight^T / temperature), without gradient, one chunk of logits at a time.

    Arguments, results, communication and errors are those of :func:`fused_linear_token_statistics`.
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
            kept=kept,
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
    kept: KeptSets | None = None,
) -> TokenStatistics:
    """``token_statistics(hidden @ weight.T, ...)``, differentiable, with the logits of one chunk at a time.

    The backward pass recomputes the logits. The weight's gradient is summed in float32: into ``weight.main_grad`` if
    the weight has one (Megatron's data-parallel wrapper makes it), in which case ``weight.grad`` gets nothing.

    Communication over ``group``: one all-gather of 4 float32 per token (6 with ``second_moments``) for each chunk of
    the forward pass, and one all-reduce of the hidden states' gradient in the backward pass. Under
    ``sequence_parallel`` also an all-gather of hidden states in each pass, and a reduce-scatter in place of the
    all-reduce.

    Args:
        hidden: [T, h] in float32, bfloat16 or float16. Under ``sequence_parallel`` [T/tp, h], with consecutive tokens
            on consecutive ranks.
        weight: [V/tp, h] in the type of ``hidden``.
        targets: int64 [T], ids of the whole vocabulary, or -100 for a token without target.
        temperature, group, second_moments, vocabulary, kept: as in :func:`token_statistics`.
        sequence_parallel: whether ranks of the group hold different tokens of ``hidden``.
        chunk_bytes: most bytes of logits held at one time; None means 64 MiB on the CPU and 512 MiB on a GPU.

    Raises ValueError for a wrong type, shape or device, and RuntimeError for a second derivative. Bad targets and
    logits are treated as in :func:`token_statistics`.
    """
    check_temperature(temperature)
    shard = VocabShard.of(group, weight.shape[0], vocabulary)
    check_projection(hidden, weight, targets, shard, sequence_parallel, chunk_bytes, kept)
    targets = targets.contiguous()
    softmax = VocabSoftmax(shard, group, 1.0 / temperature, sequence_parallel, chunk_bytes, kept)
    logprob, entropy, moments = _Statistics.apply(hidden, weight, targets, softmax, second_moments)
    return TokenStatistics(logprob, entropy, *(moments.unbind(0) if second_moments else (None, None)))


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softmax: VocabSoftmax, second_moments: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        full = gather_hidden(hidden, softmax.shard, softmax.group, softmax.sequence_parallel)
        tokens = full.shape[0]
        logprob, entropy = (full.new_empty(tokens, dtype=torch.float32) for _ in range(2))
        state = full.new_empty((tokens, 4), dtype=torch.float32)
        moments = full.new_empty((2 if second_moments else 0, tokens), dtype=torch.float32)
        for chunk, logits in TokenChunks(full, weight, softmax.chunk_bytes):
            logprob[chunk], entropy[chunk], state[chunk], moments[:, chunk] = softmax.statistics(
                chunk, logits, targets, second_moments
            )
        if any(ctx.needs_input_grad[:2]):
            ctx.save_for_backward(hidden, weight, targets, state)
            # The parameter itself: a saved tensor comes back as another object, without its main_grad.
            ctx.softmax, ctx.parameter = softmax, weight
        ctx.mark_non_differentiable(moments)
        return logprob, entropy, moments

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, _: Tensor) -> tuple:
        refuse_second_derivative("fused_linear_token_statistics")
        hidden, weight, targets, state = ctx.saved_tensors
        softmax = ctx.softmax
        shard, group, sequence_parallel = softmax.shard, softmax.group, softmax.sequence_parallel
        full = gather_hidden(hidden, shard, group, sequence_parallel)
        gradients = ProjectionGradients(full, ctx.parameter, ctx.needs_input_grad[:2], into_main_grad=True)
        g, h = grad_logprob.contiguous(), grad_entropy.contiguous()
        for chunk, logits in TokenChunks(full, weight, softmax.chunk_bytes):
            softmax.write_gradient(chunk, logits, targets, state[chunk], g[chunk], h[chunk])
            gradients.add(chunk, logits, full)
        grad_hidden, grad_weight = None, None
        if gradients.hidden is not None:
            grad_hidden = reduce_hidden_gradient(gradients.hidden, shard, group, sequence_parallel)
        if gradients.of_weight is not None:
            grad_weight = gradients.of_weight.for_autograd()
        return grad_hidden, grad_weight, None, None, None
