"""Other weights in the place of a model's own, for as long as a block runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.megatron.weight_shards import weights_of


def empty_weights(model_chunks: Sequence[PolicyModel]) -> list[Tensor]:
    """Return a tensor like each weight of `model_chunks`, not initialized, for `swapped_weights`."""
    return [torch.empty_like(weight.data) for weight in _weights(model_chunks)]


@contextmanager
def swapped_weights(model_chunks: Sequence[PolicyModel], others: Sequence[Tensor]) -> Iterator[None]:
    """Let the model compute with `others` while the block runs.

    Only the addresses of the data are exchanged. The model's own weights are neither moved nor written to, so they are
    the same afterwards, however the block ends; so are gradient buffers and optimizer, which the block must not use.

    Args:
        model_chunks: this rank's model chunks.
        others: a tensor of the shape, dtype and device of each weight, in the order of `empty_weights`.
    """
    weights = _weights(model_chunks)
    own = [weight.data for weight in weights]
    try:
        for weight, other in zip(weights, others, strict=True):
            weight.data = other
        yield
    finally:
        for weight, data in zip(weights, own, strict=True):
            weight.data = data


def _weights(model_chunks: Sequence[PolicyModel]) -> list[Tensor]:
    return [weight for chunk in model_chunks for _, weight in weights_of(chunk)]
