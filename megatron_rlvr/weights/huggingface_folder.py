"""Hugging Face model folders on disk: written shard by shard and renamed into place, read tensor by tensor."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_rlvr.atomic_write import replace_folder
from megatron_rlvr.errors import UserError

SHARD_BYTES = 4 * 1024**3
INDEX = "model.safetensors.index.json"
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "added_tokens.json",
)


def write_folder(
    folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], companions: Path, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write a complete Hugging Face folder; nothing of that name is touched before every file is whole.

    Args:
        folder: becomes the folder; one that stands there is replaced.
        tensors: consumed one at a time; what is held at once is one shard.
        companions: folder that config, generation config and tokenizer are copied from.
        shard_bytes: a shard is closed before it would exceed this; a model of one shard has no index.

    Returns:
        the number of tensors written.

    Raises:
        UserError: when the disk refuses (full, read-only); what stood there before is untouched.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        count = _write_shards(partial, tensors, shard_bytes)
        copy_companions(companions, partial)
        replace_folder(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder} cannot be written: {error}") from error
    return count


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what makes a folder of weights a complete model: config, generation config and tokenizer."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            shutil.copy2(file, folder)


def _write_shards(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], shard_bytes: int) -> int:
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    size = total = 0

    def close() -> None:
        nonlocal size
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()
        size = 0

    for name, tensor in tensors:
        copy = tensor.detach().to("cpu", copy=True).contiguous()  # exports may be views of a buffer that is reused
        if held and size + copy.nbytes > shard_bytes:
            close()
        held[name] = copy
        size += copy.nbytes
        total += copy.nbytes
    close()
    for number, file in enumerate(shard_names(len(shards))):
        (folder / f"shard-{number}").rename(folder / file)
    if len(shards) > 1:
        write_index(folder, shards, total)
    return sum(map(len, shards))


def shard_names(count: int) -> list[str]:
    """The names of a model's files, by Hugging Face's convention."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, shards: Sequence[Iterable[str]], total: int) -> None:
    """Write which file of a folder holds which tensor; `total` is their bytes."""
    files = shard_names(len(shards))
    weight_map = {name: file for names, file in zip(shards, files, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a folder, from its index or from the headers of its files.

    Raises:
        UserError: when there are no safetensors, an indexed shard is missing, or a file is damaged.
    """
    if (folder / INDEX).is_file():
        try:
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        except (ValueError, KeyError) as error:
            raise UserError(f"{folder / INDEX} is damaged ({error}): download the model again") from error
        missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of its shards, {missing[0]} for one: download the model again"
            )
        found = {file: _header(folder / file) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in found[file]:
                raise UserError(f"{folder / file} lacks {name}, which the index says it holds: download it again")
        return {name: folder / file for name, file in weight_map.items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder} holds no *.safetensors: save the model with save_pretrained(..., safe_serialization=True)"
        )
    return {name: file for file in files for name in _header(file)}


def check_shapes(files: dict[str, Path], hf_config: Any) -> None:
    """Refuse weights of another shape than config.json describes, before they are read as something else.

    Args:
        files: the file of every tensor, of `tensor_files`.
        hf_config: of transformers.

    Raises:
        UserError: naming the first tensor that does not fit, or a layer of the configuration that has no weights.
    """
    hidden, vocabulary = hf_config.hidden_size, hf_config.vocab_size
    head = getattr(hf_config, "head_dim", None) or hidden // hf_config.num_attention_heads
    queries, keys = head * hf_config.num_attention_heads, head * hf_config.num_key_value_heads
    inner = hf_config.intermediate_size
    expected = {
        "model.embed_tokens.weight": [vocabulary, hidden],
        "lm_head.weight": [vocabulary, hidden],
        "self_attn.q_proj.weight": [queries, hidden],
        "self_attn.k_proj.weight": [keys, hidden],
        "self_attn.v_proj.weight": [keys, hidden],
        "self_attn.o_proj.weight": [hidden, queries],
        "mlp.gate_proj.weight": [inner, hidden],
        "mlp.up_proj.weight": [inner, hidden],
        "mlp.down_proj.weight": [hidden, inner],
        "model.norm.weight": [hidden],
        "input_layernorm.weight": [hidden],
        "post_attention_layernorm.weight": [hidden],
    }
    layers: set[int] = set()
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dictionary
                layer = re.match(r"model\.layers\.(\d+)\.", name)
                if layer:
                    layers.add(int(layer[1]))
                wanted = expected.get(name[layer.end() :] if layer else name)
                if wanted and (found := opened.get_slice(name).get_shape()) != wanted:
                    raise UserError(
                        f"{file}: {name} has shape {found}, but config.json describes {wanted}: the weights belong to "
                        "another model"
                    )
    count = hf_config.num_hidden_layers
    if layers != set(range(count)):
        raise UserError(
            f"{file.parent}: the weights have layers {min(layers, default=0)} to {max(layers, default=-1)}, but "
            f"config.json describes {count}: they belong to another model"
        )


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file, on the CPU."""
    with safe_open(file, framework="pt", device="cpu") as opened:
        return opened.get_tensor(name)


def _header(file: Path) -> set[str]:
    """The names in a safetensors file; opening it checks that the file is as long as its header says."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return set(opened.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}): download or save it again") from error
