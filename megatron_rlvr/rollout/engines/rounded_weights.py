"""The policy's weights, rounded as quantized servers would hold them, for the local engine to generate with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from megatron_rlvr.megatron import lora
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.megatron.swapped_weights import empty_weights, swapped_weights
from megatron_rlvr.weights import fp8


class RoundedWeights:
    """A second copy of this rank's weights, whose projections are rounded to FP8 blocks of the whole model's tensors.

    It shows what quantized rollouts do to training, on a machine whose servers cannot compute in FP8. `update` holds
    the whole model in memory, because blocks do not end where ranks split a tensor. Construction is collective over
    the ranks of a model replica.

    Args:
        bridge: bridge of the policy. Its adapters, if it has any, are merged into the rounded weights.
        model_chunks: model chunks of this rank.
    """

    def __init__(self, bridge: PolicyBridge, model_chunks: Sequence[PolicyModel]):
        self._bridge, self._model_chunks = bridge, model_chunks
        self._export = bridge.weight_export(model_chunks)
        self._weights = empty_weights(model_chunks)
        self.update()

    def update(self) -> None:
        """Round the policy's current weights. Collective over the ranks of a model replica."""
        whole = {name: tensor.clone() for name, tensor in fp8.rounded(self._export.tensors())}
        with swapped_weights(self._model_chunks, self._weights):
            self._bridge.read_weights(self._model_chunks, _Tensors(whole))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model compute with the rounded weights while the block runs."""
        with lora.without_adapters(self._model_chunks), swapped_weights(self._model_chunks, self._weights):
            yield


class _Tensors:
    """Reads whole tensors from memory; see `TensorReader`."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors = tensors

    def shape(self, name: str) -> list[int]:
        return list(self._tensors[name].shape)

    def read(self, name: str, dim: int | None, start: int, stop: int) -> Tensor:
        tensor = self._tensors[name]
        return tensor if dim is None else tensor.narrow(dim, start, stop - start)
