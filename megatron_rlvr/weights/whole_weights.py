"""The weights of a model, one at a time, in megatron-core's and in Hugging Face's format."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.streamed_checkpoint import split_into_pieces
from megatron_rlvr.megatron.weight_shards import weights_of
from megatron_rlvr.weights.huggingface_folder import read_tensor


class WholeWeights:
    """Names, shapes and Hugging Face mapping of every weight of a model, without the weights themselves.

    The model is built on the meta device in the layout of one process, so no weight is split over ranks.

    Args:
        bridge: a bridge with tensor, pipeline and expert sizes 1 and the local layers.

    Attributes:
        state: megatron-core's description of each weight in a checkpoint, by its name in the model.
        names: names of the weights in the model, in the order of their modules.
        formats: how each weight maps to Hugging Face tensors, by name.
    """

    def __init__(self, bridge: PolicyBridge):
        self.bridge = bridge
        [model] = bridge.build(shapes_only=True)
        self.state: dict[str, Any] = model.sharded_state_dict()
        weights = dict(weights_of(model))
        self.names = list(weights)
        self.formats = {name: bridge.weight_format(name) for name in self.names}
        self._shapes = {name: weight.shape for name, weight in weights.items()}
        self._dtypes = {name: weight.dtype for name, weight in weights.items()}

    def huggingface_tensors(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Return dtype and shape of every tensor of the Hugging Face folder, in the order of `to_huggingface`."""
        described: dict[str, tuple[torch.dtype, torch.Size]] = {}
        for name in self.names:
            weight = torch.empty(self._shapes[name], dtype=self._dtypes[name], device="meta")
            for key, tensor in self.to_huggingface(name, weight):
                described.setdefault(key, (tensor.dtype, tensor.shape))
        return described

    def largest_bytes(self) -> int:
        """Return the size of the largest weight in megatron-core's format, in bytes."""
        return max(math.prod(shape) for shape in self._shapes.values()) * self.bridge.dtype.itemsize

    def from_huggingface(self, name: str, files: Mapping[str, Path]) -> Tensor:
        """Read a weight from safetensors files and convert it to megatron-core's format.

        Args:
            name: name of the weight in the model.
            files: the safetensors file of every Hugging Face tensor.

        Raises:
            UserError: if a tensor is missing, has the wrong shape, or is not finite in the dtype of the model.
        """
        weight_format = self.formats[name]
        tensors = []
        for key in weight_format.names:
            if key not in files:
                raise UserError(
                    f"{self.bridge.path} lacks {key}, which {self.bridge.hf_config.model_type} needs: download the "
                    "model again"
                )
            tensors.append(read_tensor(files[key], key))
        try:
            weight = weight_format.to_megatron(tensors)
        except (ValueError, RuntimeError):  # torch raises these for wrong shapes
            weight = None
        if weight is None or weight.shape != self._shapes[name]:
            shapes = ", ".join(
                f"{key} {list(tensor.shape)}" for key, tensor in zip(weight_format.names, tensors, strict=True)
            )
            raise UserError(
                f"{self.bridge.path}: {shapes} does not match its config.json, where {name} has shape "
                f"{list(self._shapes[name])}: download the model again"
            )
        weight = weight.to(self._dtypes[name])
        check_finite(weight, f"{self.bridge.path}: {' or '.join(weight_format.names)}")
        return weight

    def to_huggingface(self, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the Hugging Face tensors of a weight, by name."""
        yield from self.formats[name].to_huggingface(weight)

    def pieces(self, name: str, weight: Tensor) -> list[Any]:
        """Split a weight into the pieces that a checkpoint stores (megatron-core's ShardedTensor), as views."""
        return split_into_pieces(self.state[name], weight)

    def empty(self, name: str) -> Tensor:
        """Allocate uninitialised memory for a weight."""
        return torch.empty(self._shapes[name], dtype=self._dtypes[name])


def is_finite(weight: Tensor) -> bool:
    """Whether no value of a weight is NaN or infinite."""
    # The smallest and the largest value are NaN if any value is. Unlike isfinite, this needs no memory.
    return not weight.numel() or all(bool(bound.isfinite()) for bound in torch.aminmax(weight))


def check_finite(weight: Tensor, name: str) -> None:
    """Raise UserError if a weight has a value that is NaN or infinite."""
    if not is_finite(weight):
        raise UserError(f"{name} has values that are NaN or infinite: use weights from before they were damaged")
