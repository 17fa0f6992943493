"""From a Hugging Face folder into this rank's model chunks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.weights.huggingface_folder import tensor_files
from megatron_rlvr.weights.shape_checks import check_shapes


def load_folder(bridge: PolicyBridge, model_chunks: Sequence[PolicyModel], folder: Path | None = None) -> None:
    """Fill the chunks of `PolicyBridge.build` with the weights of `folder`. Collective over the job.

    Args:
        bridge, model_chunks: of one model.
        folder: with safetensors; None is the bridge's own.

    Raises:
        UserError: if a tensor is missing or has another shape than config.json says, or a file cannot be read.
    """
    folder = folder or bridge.path
    check_shapes(tensor_files(folder), bridge.hf_config)
    try:
        bridge.read_weights(model_chunks, folder)
    except (KeyError, ValueError, OSError, SafetensorError) as error:
        raise UserError(f"weights of {folder} cannot be read as {bridge.hf_config.model_type}: {error}") from error
