"""The adapters of a checkpoint, read by one process: as tensors, or merged into the weights that they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.lora_layers import merged
from megatron_rlvr.megatron.streamed_checkpoint import StreamedLoad
from megatron_rlvr.weights.adapter_record import check_same_base, weights_digest
from megatron_rlvr.weights.huggingface_folder import tensor_files
from megatron_rlvr.weights.shape_checks import check_shapes


class AdapterCheckpoint:
    """The adapters of a checkpoint.

    Args:
        bridge: a bridge of the model that the adapters belong to, with all parallel sizes 1.
        loaded: the checkpoint.
        record: what its ``run.json`` says of the adapters.

    Attributes:
        files: the file of every tensor of the base.

    Raises:
        UserError: if the bridge's folder does not have the weights that the adapters belong to.
    """

    def __init__(self, bridge: PolicyBridge, loaded: StreamedLoad, record: Mapping[str, Any]):
        self.bridge, self.loaded, self.record = bridge, loaded, record
        found = check_shapes(tensor_files(bridge.path), bridge.hf_config)
        own = {"path": str(bridge.path), "weights": weights_digest(found)}
        check_same_base(record["base"], own, str(loaded.folder))
        self.files = found.files
        self._names = set(loaded.tensor_names())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of all adapters by their name in PEFT, less its prefix."""
        for name in self.loaded.tensor_names():
            if not name.startswith("optimizer."):
                yield name, self.loaded.read(name, self.bridge.dtype)

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return a Hugging Face tensor of the base, merged with its adapter if it has one."""
        module = name.removesuffix(".weight")
        if f"{module}.lora_A.weight" not in self._names:
            return weight
        a, b = (self.loaded.read(f"{module}.{part}.weight", self.bridge.dtype) for part in ("lora_A", "lora_B"))
        return merged(weight, a, b, self.record["alpha"] / self.record["rank"])
