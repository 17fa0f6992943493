"""From this rank's model chunks to a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.weights.huggingface_folder import write_folder


def export_folder(bridge: PolicyBridge, model_chunks: Sequence[PolicyModel], folder: Path, *, write: bool) -> None:
    """Write a complete Hugging Face folder. Collective over the job; only the process with `write` touches the disk.

    Config and tokenizer are copied from the bridge's folder.

    Raises:
        UserError: if the folder cannot be written.
    """
    tensors = bridge.export(model_chunks)
    if write:
        write_folder(folder, tensors, companions=bridge.path)
    else:
        for _ in tensors:  # every process takes part in gathering every tensor
            pass
