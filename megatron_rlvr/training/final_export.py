"""What a run leaves for other programs at its end: a Hugging Face folder, and the adapters in PEFT's format."""

from __future__ import annotations

import sys
from pathlib import Path

from megatron_rlvr.training.config import CheckpointConfig
from megatron_rlvr.training.policy import Policy
from megatron_rlvr.weights.export import export_adapters, export_folder
from megatron_rlvr.weights.peft_folder import peft_warning


def export_policy(policy: Policy, run_directory: Path, config: CheckpointConfig) -> None:
    """Write ``huggingface/`` if the configuration says so, and ``adapter/`` if the policy has adapters. Collective.

    The weights in ``huggingface/`` are complete: adapters are merged into them.

    Raises:
        UserError: if a folder cannot be written.
    """
    write = policy.layout.is_main
    if policy.adapter_record is not None:
        folder = run_directory / "adapter"
        export_adapters(policy.bridge, policy.model_chunks, folder, policy.adapter_record, write=write)
        warning = peft_warning(policy.bridge.family, policy.adapter_record["target_modules"])
        if warning and write:
            print(f"warning: {folder}: {warning}", file=sys.stderr)
    if config.export_huggingface:
        folder, dtype = run_directory / "huggingface", config.export_torch_dtype()
        export_folder(policy.bridge, policy.model_chunks, folder, write=write, dtype=dtype)
