"""The weights of a whole model, one at a time: as megatron-core holds each and as Hugging Face names its parts."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.weights.huggingface_folder import read_tensor


class WholeWeights:
    """What every weight of a model is called, how it is laid out, and how it is carried over; holds no weight.

    The model is built on the meta device in the layout of one process, so a weight of megatron-core is whole.

    Args:
        bridge: of a process alone (tensor, pipeline and expert sizes 1) with the local layers.

    Attributes:
        state: megatron-core's description of the model's checkpoint, by name in the model.
        names: of the weights, in the order of their modules.
        formats: how each weight maps to Hugging Face tensors, by name.
    """

    def __init__(self, bridge: PolicyBridge):
        self.bridge = bridge
        [model] = bridge.build(shapes_only=True)
        self.state: dict[str, ShardedBase] = model.sharded_state_dict()
        self.names = [name for name, _ in model.named_parameters()]
        self.formats = {name: bridge.weight_format(name) for name in self.names}
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def huggingface_tensors(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """dtype and shape of every tensor of the model's folder, in the order of `to_huggingface`."""
        found: dict[str, tuple[torch.dtype, torch.Size]] = {}
        for name in self.names:
            empty = torch.empty(self._shapes[name], dtype=self.bridge.dtype, device="meta")
            found |= {key: (t.dtype, t.shape) for key, t in self.to_huggingface(name, empty) if key not in found}
        return found

    def largest_bytes(self) -> int:
        """Bytes of the largest weight as megatron-core holds it."""
        return max(math.prod(shape) for shape in self._shapes.values()) * self.bridge.dtype.itemsize

    def from_huggingface(self, name: str, files: Mapping[str, Path]) -> Tensor:
        """A weight as megatron-core holds it, made of the tensors in `files`.

        Raises:
            UserError: when one of them is missing or has another shape.
        """
        sources = self.formats[name].names
        parts = []
        for source in sources:
            if source not in files:
                raise UserError(f"{self.bridge.path} lacks {source}, which {self.bridge.hf_config.model_type} needs")
            parts.append(read_tensor(files[source], source))
        try:
            weight = self.formats[name].to_megatron(parts)
        except (AssertionError, RuntimeError):
            weight = None
        if weight is None or weight.shape != self._shapes[name]:
            found = ", ".join(f"{source} {list(part.shape)}" for source, part in zip(sources, parts, strict=True))
            raise UserError(
                f"{self.bridge.path}: {found} is not the model of its config.json, where {name} is "
                f"{list(self._shapes[name])}: download the model again"
            )
        return weight.to(self.bridge.dtype)

    def to_huggingface(self, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors that a weight is made of, by name."""
        yield from self.formats[name].to_huggingface(weight)

    def pieces(self, name: str, weight: Tensor) -> list[ShardedTensor]:
        """A weight as the checkpoint holds it: in one piece, or gate and up projection each in its own; views of it."""
        entry = copy.copy(self.state[name])
        entry.data = weight
        if isinstance(entry, ShardedTensorFactory):
            return entry.build()
        assert isinstance(entry, ShardedTensor)
        return [entry]

    def empty(self, name: str) -> Tensor:
        """Memory for a weight."""
        return torch.empty(self._shapes[name], dtype=self.bridge.dtype)
