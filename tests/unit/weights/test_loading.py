"""Loading a folder needs no more memory than the model and one of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.config import ModelConfig, ParallelConfig
from megatron_rlvr.megatron.parallel import parallel_groups
from megatron_rlvr.weights.huggingface_folder import FolderReader
from megatron_rlvr.weights.loading import check_folder, load_folder
from tests.families import make_family
from tests.static_memory import HighWater

# As in published models, the embedding is the largest weight, and twice gate and up projection are smaller.
VOCABULARY, HIDDEN = 6000, 128


@pytest.fixture(scope="module", autouse=True)
def _groups() -> Iterator[None]:
    with parallel_groups(ParallelConfig(), seed=0):
        yield


@pytest.mark.parametrize("layers", [2, 9])
def test_loading_needs_one_weight_more_than_the_model(
    layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 1024, "num_hidden_layers": layers}
    folder = make_family(tmp_path / "model", "llama-untied", **sizes)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    bridge = PolicyBridge(ModelConfig(path=str(folder), dtype="bfloat16", layer_spec="local"), ParallelConfig())
    chunks = bridge.build()
    read = FolderReader.read

    def watched(self: FolderReader, name: str, dim: int | None, start: int, stop: int) -> torch.Tensor:
        tensor = read(self, name, dim, start, stop)
        water._watch(tensor.untyped_storage())  # safetensors allocates outside of torch
        return tensor

    monkeypatch.setattr(FolderReader, "read", watched)
    with HighWater() as water:
        load_folder(bridge, chunks, check_folder(bridge))
    largest = VOCABULARY * HIDDEN * 2
    assert 0.9 * largest < water.peak < 1.01 * largest
