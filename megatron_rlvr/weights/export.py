"""Export this rank's model chunks to a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.weights.huggingface_folder import write_folder


def export_folder(bridge: PolicyBridge, model_chunks: Sequence[PolicyModel], folder: Path, *, write: bool) -> None:
    """Write a complete Hugging Face folder. Collective over the job.

    Args:
        bridge: bridge of the model. Config and tokenizer are copied from its folder.
        model_chunks: this rank's model chunks.
        folder: folder to write; replaced if it exists.
        write: True on the one process that writes.

    Raises:
        UserError: if the folder cannot be written.
    """
    tensors = bridge.export(model_chunks)
    if write:
        write_folder(folder, tensors, companions=bridge.path)
    else:
        for _ in tensors:  # every process must take part in gathering every tensor
            pass
