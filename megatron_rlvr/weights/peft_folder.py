"""Adapters as a folder in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_rlvr.atomic_write import replace_folder, write_text
from megatron_rlvr.checked_input import InvalidInputError, field, one_line, parse_object, read_bytes, shown
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import lora
from megatron_rlvr.megatron.families import Family
from megatron_rlvr.megatron.huggingface_config import read_config
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.weights.adapter_record import check_same_base, weights_digest
from megatron_rlvr.weights.huggingface_folder import FolderReader, tensor_files
from megatron_rlvr.weights.shape_checks import DTYPES, check_shapes, expected_weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""
_BASE = "base_weights"
"""Key in the metadata of the safetensors file: the digest of the weights that the adapters belong to."""
_NEUTRAL: dict[str, Any] = {
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_parameters": None,
    "trainable_token_indices": None,
    "layer_replication": None,
}
"""Settings of PEFT that must have no effect."""
_HARMLESS = {
    *("peft_type", "task_type", "peft_version", "auto_mapping", "inference_mode", "base_model_name_or_path"),
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "megatron_config", "megatron_core"),
    *("revision", "qalora_group_size", "ensure_weight_tying"),
}
"""Settings that change neither the policy of given adapters nor the base, or that are compared with the policy's."""
_INITIALIZED = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` with which PEFT leaves the base as it is. With others, such as ``pissa`` and
``olora``, it subtracts the first product of A and B from the weights of the base, also when it loads a folder."""


def write_adapters(folder: Path, tensors: Iterable[tuple[str, Tensor]], record: Mapping[str, Any]) -> None:
    """Write adapters, which PEFT, vLLM and SGLang load next to their base. A folder of this name is replaced.

    Args:
        folder: folder to write.
        tensors: the tensors of all adapters, by their name in PEFT, less its prefix.
        record: result of `adapter_record`.

    Raises:
        UserError: if the folder cannot be written.
    """
    alpha, base = record["alpha"], record["base"]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base["path"],
        "revision": None,
        "inference_mode": True,
        "r": record["rank"],
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "target_modules": list(record["target_modules"]),
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        **{name: value for name, value in _NEUTRAL.items() if name in _KNOWN_TO_ALL},
    }
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        copies = {PREFIX + name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors}
        save_file(copies, partial / WEIGHTS, metadata={"format": "pt", _BASE: base["weights"]})
        write_text(partial / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        replace_folder(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder} cannot be written: {error}; free some space or choose another folder") from error


_KNOWN_TO_ALL = ("bias", "use_dora", "use_rslora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern")
"""Of these settings, those that releases of PEFT since 0.9 know. They warn of others."""


def peft_warning(family: Family, target_modules: Sequence[str]) -> str | None:
    """Return what PEFT does not load of adapters in its own format, and None if it loads all of them.

    transformers 5 holds the experts of a layer in one parameter. PEFT 0.21 then takes the names of their modules for
    that parameter alone, and gives modules of the same names in other layers no adapters.
    """
    leaves: dict[bool, set[str]] = {True: set(), False: set()}
    for entry in family.weights:
        leaves[".experts." in entry.megatron] |= {
            name.removesuffix(".weight").rpartition(".")[2] for name in entry.names
        }
    shared = [name for name in target_modules if name in leaves[True] & leaves[False]]
    if not shared:
        return None
    return (
        f"PEFT 0.21 with transformers 5 loads {', '.join(shared)} of experts alone, and not those of dense layers and "
        "shared experts: give it the merged model, or train adapters of attention alone"
    )


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds adapters in PEFT's format."""
    return (folder / CONFIG).is_file()


def read_adapters(
    folder: Path, model_chunks: Sequence[PolicyModel], hf_config: Any, record: Mapping[str, Any]
) -> str | None:
    """Load adapters in PEFT's format into this rank's model chunks; each rank reads its shards.

    Args:
        folder: the folder.
        model_chunks: model chunks with adapters.
        hf_config: transformers configuration of the model.
        record: result of `adapter_record` for the chunks.

    Returns:
        a warning if the weights that the adapters belong to cannot be compared, because the folder has no checksum of
        them and names no model folder of this machine; None if they were compared.

    Raises:
        UserError: if the folder is damaged, its adapters belong to another base, or their rank, factor, modules or
            shapes are not those of the policy.
    """
    path = folder / WEIGHTS
    try:
        config = parse_object(read_bytes(folder / CONFIG))
        _check_settings(folder, config, record)
        base = str(config.get("base_model_name_or_path"))
        with safe_open(path, framework="pt", device="cpu") as opened:
            stored = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118, it is not a dict
            shapes = {name: tensor.get_shape() for name, tensor in stored.items()}
            dtypes = {name: tensor.get_dtype() for name, tensor in stored.items()}
            digest = (opened.metadata() or {}).get(_BASE) or _digest_of(base)
        if digest is not None:
            check_same_base({"weights": digest, "path": base}, record["base"], str(folder))
        _check_shapes(folder, shapes, hf_config, record)
        if quantized := [name for name, dtype in dtypes.items() if dtype not in DTYPES]:
            raise UserError(
                f"{folder}: {quantized[0]} has dtype {dtypes[quantized[0]]}: save the adapters in float32 or bfloat16"
            )
        with FolderReader(dict.fromkeys(shapes, path)) as reader, torch.no_grad():
            for adapter in lora.adapters_in(model_chunks):
                for name, tensor, dim in adapter.tensors():
                    size = tensor.size(dim or 0)
                    start = adapter.group.rank() * size
                    tensor.copy_(reader.read(PREFIX + name, dim, start, start + size))
    except (OSError, SafetensorError, InvalidInputError) as error:
        raise UserError(f"{folder} cannot be read as adapters ({one_line(error)}): save them again") from error
    if digest is None:
        return (
            f"{folder} says that its adapters belong to {base}; it has no checksum to compare {record['base']['path']}"
        )
    return None


def _digest_of(base: str) -> str | None:
    """Return the digest of the base that another program named; None if it is not a model folder of this machine."""
    if not os.path.isdir(base):  # noqa: PTH112, Path.is_dir raises for a name that is too long
        return None
    try:
        return weights_digest(check_shapes(tensor_files(Path(base)), read_config(Path(base))))
    except UserError:
        return None


def _check_settings(folder: Path, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} holds adapters of type {shown(config.get('peft_type'))}: only LORA can be trained")
    for name, value in config.items():
        if name == "init_lora_weights":
            unsupported = value not in _INITIALIZED
        else:
            unsupported = name not in _HARMLESS and bool(value) and value != _NEUTRAL.get(name)
        if unsupported:
            raise UserError(
                f"{folder} has {shown(name)[1:-1]}={shown(value)} in {CONFIG}, which is not supported: merge it first"
            )
    for name, key in (("r", "rank"), ("lora_alpha", "alpha")):
        if (value := field(config, name, float)) != record[key]:
            raise UserError(f"{folder} holds adapters with {name}={value:g}: set lora.{key} to it, not {record[key]:g}")


def _check_shapes(folder: Path, shapes: Mapping[str, Sequence[int]], hf_config: Any, record: Mapping[str, Any]) -> None:
    """Compare the tensors of a folder with those that the adapters of the whole model consist of."""
    rank, expected = record["rank"], {}
    for name, shape in expected_weights(hf_config).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in record["target_modules"] and module != name:
            expected[f"{PREFIX}{module}.lora_A.weight"] = [rank, shape[1]]
            expected[f"{PREFIX}{module}.lora_B.weight"] = [shape[0], rank]
    modules = f"lora.target_modules={list(record['target_modules'])}"
    if missing := expected.keys() - shapes.keys():
        raise UserError(f"{folder} lacks {min(missing)}, which {modules} needs: set it to the modules of the adapters")
    if others := shapes.keys() - expected.keys():
        raise UserError(f"{folder} holds {min(others)}, which is not one of {modules}: set it to those of the adapters")
    for name, shape in expected.items():
        if list(shapes[name]) != shape:
            raise UserError(
                f"{folder}: {name} has shape {list(shapes[name])} instead of {shape}: it belongs to another base"
            )
