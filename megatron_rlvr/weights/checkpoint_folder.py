"""A checkpoint folder: files of megatron-core's torch_dist format, and ``run.json``, which describes them.

``run.json`` is written last. It holds the model that the checkpoint is of, the size of every file, and what the writer
adds: a run its state, a conversion its source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.errors import UserError

_RECORD = "run.json"


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``run.json`` with `record` and the size of every file; call it when all other files are complete."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    write_text(folder / _RECORD, json.dumps({**record, "files": sizes}, indent=1))


def read_record(folder: Path) -> dict[str, Any]:
    """What `write_record` wrote.

    Raises:
        OSError, ValueError: if ``run.json`` is missing or damaged.
    """
    return json.loads((folder / _RECORD).read_text())


def is_complete(folder: Path) -> bool:
    """Whether every file of a checkpoint is there with the size that was written."""
    try:
        sizes = read_record(folder).get("files", {})
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def fingerprint(hf_config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What must agree for a checkpoint to be of a model: family, shape and dtype."""
    names = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "tie_word_embeddings",
        "num_experts",
        "moe_intermediate_size",
    )
    return {name: getattr(hf_config, name, None) for name in names} | {"dtype": str(dtype)}


def check_same_model(stored: Mapping[str, Any], expected: Mapping[str, Any], folder: Path, remedy: str) -> None:
    """Refuse a checkpoint whose fingerprint differs.

    Args:
        stored: fingerprint in the checkpoint.
        expected: fingerprint of the model in use.
        folder: the checkpoint.
        remedy: the end of the error, what to write instead.

    Raises:
        UserError: names every difference.
    """
    different = [
        f"{key}={stored.get(key)} instead of {expected[key]}" for key in expected if stored.get(key) != expected[key]
    ]
    if different:
        raise UserError(f"{folder} is a checkpoint of another model ({', '.join(different)}): {remedy}")
