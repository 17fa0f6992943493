"""A checkpoint folder: files in megatron-core's torch_dist format, and ``run.json``, which describes them.

``run.json`` is written last. It holds a fingerprint of the model, the size of every file, and entries of the writer:
the state of a run, or the source of a conversion.
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
    """Write ``run.json`` with `record` and the size of every file. Call this when all other files are complete."""
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    write_text(folder / _RECORD, json.dumps({**record, "files": sizes}, indent=1))


def read_record(folder: Path) -> dict[str, Any]:
    """Read ``run.json``: the record that `write_record` wrote, with the file sizes under ``files``.

    Raises:
        OSError, ValueError: if ``run.json`` is missing or damaged.
    """
    return json.loads((folder / _RECORD).read_text())


def is_complete(folder: Path) -> bool:
    """Whether every file of a checkpoint exists and has the size that ``run.json`` records."""
    try:
        sizes = read_record(folder).get("files", {})
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def fingerprint(hf_config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return the family, sizes and dtype of a model, which must be equal for a checkpoint to belong to it."""
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
        folder: folder of the checkpoint, for the error.
        remedy: the end of the error: what to write instead.

    Raises:
        UserError: if they differ; names every difference.
    """
    different = [
        f"{key}={stored.get(key)} instead of {expected[key]}" for key in expected if stored.get(key) != expected[key]
    ]
    if different:
        raise UserError(f"{folder} is a checkpoint of another model ({', '.join(different)}): {remedy}")
