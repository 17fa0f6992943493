"""Token weights, which turn token objectives into one loss: loss = -sum_t w_t * objective_t.

The weights depend only on the lengths of the whole minibatch and are known before the forward pass. So the loss is a
plain sum over microbatches and data-parallel ranks, however the minibatch is divided among them.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal["token-mean", "sequence-mean", "constant"]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)


def aggregation_weights(
    mode: str,
    lengths: Tensor,
    max_tokens: int,
    *,
    sequence_count: int | None = None,
    token_count: int | None = None,
) -> Tensor:
    """The weight of each token of each sequence: float32 [N] for integer ``lengths`` [N] in response tokens.

    - ``token-mean``: 1 / (tokens of the minibatch). DAPO, arXiv 2503.14476, equation 8.
    - ``sequence-mean``: 1 / (sequences * length). GRPO, arXiv 2402.03300, equation 3.
    - ``constant``: 1 / (sequences * max_tokens). Dr.GRPO, arXiv 2503.20783.

    ``lengths`` are those of the whole minibatch, or those of this rank's sequences if ``sequence_count`` and
    ``token_count`` give the totals of the whole minibatch. An empty sequence has weight 0. Raises ValueError for an
    unknown mode, for ``max_tokens`` below 1 and for a minibatch without tokens.
    """
    if mode not in AGGREGATIONS:
        raise ValueError(f"aggregation: unknown mode {mode!r}; valid: {', '.join(AGGREGATIONS)}")
    if max_tokens < 1:
        raise ValueError(f"aggregation: max_tokens must be at least 1, found {max_tokens}")
    sequences = len(lengths) if sequence_count is None else sequence_count
    tokens = int(lengths.sum()) if token_count is None else token_count
    if tokens < 1:
        raise ValueError(f"aggregation: the minibatch has {sequences} sequences and no response token")
    count = lengths.to(torch.float32)
    if mode == "token-mean":
        return torch.where(count > 0, 1.0 / tokens, 0.0)
    if mode == "constant":
        return torch.where(count > 0, 1.0 / (sequences * max_tokens), 0.0)
    return torch.where(count > 0, 1.0 / (sequences * count.clamp(min=1.0)), 0.0)
