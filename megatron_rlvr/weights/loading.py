"""Load a Hugging Face folder into this rank's model chunks."""

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
    """Load the weights of `folder` into model chunks. Collective over the job.

    Args:
        bridge: the bridge that built the chunks.
        model_chunks: this rank's model chunks.
        folder: folder with safetensors files; None means the bridge's folder.

    Raises:
        UserError: if a tensor is missing or its shape differs from config.json, or a file cannot be read.
    """
    folder = folder or bridge.path
    check_shapes(tensor_files(folder), bridge.hf_config)
    try:
        bridge.read_weights(model_chunks, folder)
    except (KeyError, ValueError, OSError, SafetensorError) as error:
        raise UserError(f"weights of {folder} cannot be read as {bridge.hf_config.model_type}: {error}") from error
