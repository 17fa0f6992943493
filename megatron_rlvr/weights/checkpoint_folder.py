"""A checkpoint folder: files in megatron-core's torch_dist format, ``run.json``, which describes them, and checksums.

``run.json`` holds a fingerprint of the model, the size of every file, and entries of the writer: the state of a run, or
the source of a conversion. It is written after the other files, and ``SHA256SUMS`` after it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_rlvr import checksums
from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.checked_input import InvalidInputError, checked, field, parse_object, read_bytes
from megatron_rlvr.checksums import DamagedError
from megatron_rlvr.errors import UserError

_RECORD = "run.json"
_ROPE = (
    "rope_type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
_SCALING = (
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "truncate",
    "partial_rotary_factor",
)
"""Further rotary parameters."""
_COMPUTATION = (
    "n_routed_experts",
    "num_local_experts",
    "n_shared_experts",
    "first_k_dense_replace",
    "mlp_only_layers",
    "decoder_sparse_step",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "routed_scaling_factor",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "rope_interleave",
    "use_qk_norm",
    "attention_bias",
    "layer_types",
    "sliding_window",
    "query_pre_attn_scalar",
)
"""Settings of mixtures and of attention that change what the same weights compute."""
_ADDED = ("head_dim", "num_experts_per_tok", "rms_norm_eps", "rope", "computation")
"""Entries of the fingerprint that checkpoints of earlier versions lack."""
_LARGEST_STEP = 2**53


def write_record(folder: Path, record: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Write ``run.json`` with `record` and the size of every file, and the checksums of all. The last act of a writer.

    Args:
        folder: the folder, whose other files are complete.
        record: the entries of ``run.json``; no number may be NaN or infinite.
        digests: checksums of files by name, as far as they were hashed when they were written. Others are read.

    Raises:
        OSError: if a file cannot be read or written.
    """
    sizes = {name: (folder / name).stat().st_size for name in checksums.file_names(folder)}
    described = {**record, "checksums": checksums.LIST, "files": sizes}
    write_text(folder / _RECORD, json.dumps(described, indent=1, allow_nan=False))
    checksums.write_list(folder, digests)


def read_record(folder: Path) -> dict[str, Any]:
    """Read ``run.json``: the record that `write_record` wrote, with the file sizes under ``files``.

    Only the types of ``step``, ``model``, ``files``, ``saved_at`` and ``score`` are checked.

    Raises:
        DamagedError: if ``run.json`` is missing or is not such a record.
    """
    path = folder / _RECORD
    if path.exists() and not path.is_file():  # a pipe would be read without end
        raise DamagedError(f"{_RECORD} is not a regular file")
    try:
        record = parse_object(read_bytes(path))
        field(record, "step", int, at_least=0, at_most=_LARGEST_STEP)
        field(record, "model", dict)
        for name, size in field(record, "files", dict, default={}).items():
            checked(size, int, name, at_least=0)
        field(record, "saved_at", float, default=0.0)
        field(record, "score", float, default=0.0)
    except OSError as error:
        raise DamagedError(f"{_RECORD} cannot be read ({error.strerror or error})") from error
    except InvalidInputError as error:
        raise DamagedError(f"{_RECORD} is damaged ({error})") from error
    return record


def open_folder(folder: Path) -> tuple[dict[str, Any], dict[str, str] | None]:
    """Return the record of a checkpoint and its checksums by file name, or None for the checksums of an old checkpoint.

    This compares the names and sizes of all files and the checksum of ``run.json``. The caller has still to compare the
    other files, with `checksums.check_files`.

    Raises:
        DamagedError: if a file is missing or has another size, or ``run.json`` or the list of checksums is damaged.
    """
    listed = checksums.read_list(folder)
    if listed is not None:
        checksums.check_files(folder, listed, [_RECORD] if _RECORD in listed else [])
    record = read_record(folder)
    if listed is None and "checksums" in record:
        raise DamagedError(f"{checksums.LIST} is missing")
    for name, size in record.get("files", {}).items():
        try:
            found = (folder / name).stat().st_size
        except (OSError, ValueError) as error:
            raise DamagedError(f"{name} is missing") from error
        if found != size:
            raise DamagedError(f"{name} has {found} bytes instead of {size}")
    return record, listed


def fingerprint(hf_config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Return family, sizes, constants and dtype of a model, which must be equal for a checkpoint to belong to it."""
    names = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "tie_word_embeddings",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "rms_norm_eps",
    )
    computation = {name: value for name in _COMPUTATION if (value := getattr(hf_config, name, None)) is not None}
    return {name: getattr(hf_config, name, None) for name in names} | {
        "computation": computation | {"rope": _rope(hf_config.rope_parameters, _SCALING)},
        "rope": _rope(hf_config.rope_parameters, _ROPE),
        "dtype": str(dtype),
    }


def _rope(parameters: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the parameters that rotary embeddings depend on; some families have one set per kind of layer."""
    nested = {name: _rope(value, names) for name, value in parameters.items() if isinstance(value, Mapping)}
    return nested | {name: parameters[name] for name in names if name in parameters}


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
        f"{key}={stored.get(key)} instead of {expected[key]}"
        for key in expected
        if (key in stored or key not in _ADDED) and stored.get(key) != expected[key]
    ]
    if different:
        raise UserError(f"{folder} is a checkpoint of another model ({', '.join(different)}): {remedy}")
