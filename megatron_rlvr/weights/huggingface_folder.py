"""Read and write Hugging Face model folders, shard by shard and tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_rlvr.atomic_write import replace_folder
from megatron_rlvr.checked_input import InvalidInputError, checked, field, parse_object, read_bytes
from megatron_rlvr.errors import UserError
from megatron_rlvr.weights import fp8
from megatron_rlvr.weights.companions import copy_companions

SHARD_BYTES = 4 * 1024**3
"""Default maximum size of a safetensors file, in bytes."""
INDEX = "model.safetensors.index.json"


def write_folder(
    folder: Path,
    tensors: Iterator[tuple[str, torch.Tensor]],
    companions: Path,
    shard_bytes: int = SHARD_BYTES,
    quantization: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Write a complete Hugging Face folder, which gets its name when every file is complete.

    Args:
        folder: folder to write; replaced if it exists.
        tensors: tensors by name, consumed one at a time; one shard is kept in memory.
        companions: folder from which config, generation config and tokenizer are copied.
        shard_bytes: maximum size of a shard, unless a tensor is larger. A model of one shard has no index.
        quantization: ``quantization_config`` of config.json, for weights of which some are quantized.
        dtype: dtype that config.json names; None names that of most bytes, for weights that differ only by family.

    Returns:
        the number of tensors written.

    Raises:
        UserError: if the folder cannot be written, for example to a full disk. An existing folder is then unchanged.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        count, sizes = _write_shards(partial, tensors, shard_bytes)
        sizes.pop(fp8.DTYPE, None)  # the model computes in the dtype of the others
        most = max(sizes, key=sizes.__getitem__, default=torch.float32)
        copy_companions(companions, partial, dtype or most, quantization)
        replace_folder(partial, folder)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
        raise UserError(f"{folder} cannot be written: {error}; free some space or choose another folder") from error
    return count


def _write_shards(
    folder: Path, tensors: Iterator[tuple[str, torch.Tensor]], shard_bytes: int
) -> tuple[int, Counter[torch.dtype]]:
    """Write the tensors; returns their number and the bytes of each dtype."""
    sizes: Counter[torch.dtype] = Counter()
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    size = total = 0

    def close_shard() -> None:
        nonlocal size
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()
        size = 0

    for name, tensor in tensors:
        copy = tensor.detach().to("cpu", copy=True).contiguous()  # `tensor` may be a view of a buffer that is reused
        if shard and size + copy.nbytes > shard_bytes:
            close_shard()
        shard[name] = copy
        sizes[copy.dtype] += copy.nbytes
        size += copy.nbytes
        total += copy.nbytes
    close_shard()
    for number, file in enumerate(shard_names(len(shards))):
        (folder / f"shard-{number}").rename(folder / file)
    if len(shards) > 1:
        write_index(folder, shards, total)
    return sum(map(len, shards)), sizes


def shard_names(count: int) -> list[str]:
    """Return the names of a model's `count` safetensors files by Hugging Face's convention."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, shards: Sequence[Iterable[str]], total: int) -> None:
    """Write the index of a folder, which names the file of every tensor.

    Args:
        folder: the folder.
        shards: tensor names of each file.
        total: size of all tensors, in bytes.
    """
    files = shard_names(len(shards))
    weight_map = {name: file for names, file in zip(shards, files, strict=True) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor of a folder, from its index or from the headers of its files.

    Raises:
        UserError: if there are no safetensors files, a file of the index is missing, or a file is damaged.
    """
    if (folder / INDEX).is_file():
        weight_map = read_index(folder / INDEX)
        missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of its shards, such as {missing[0]}: download the model again"
            )
        names = {file: _names(folder / file) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in names[file]:
                raise UserError(f"{folder / file} lacks {name}, which the index expects there: download it again")
        for file, held in names.items():
            if unlisted := sorted(name for name in held if weight_map.get(name) != file):
                raise UserError(
                    f"{folder / file} holds {unlisted[0]}, which the index does not list there: download the model "
                    "again"
                )
        others = sorted({file.name for file in folder.glob("model*.safetensors")} - names.keys())
        if others:
            raise UserError(
                f"{folder / others[0]} is not in the index, and other programs may read it instead: delete it or "
                f"{INDEX}, whichever belongs to another model"
            )
        return {name: folder / file for name, file in weight_map.items()}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        found = next((f" but {file.name}" for file in sorted(folder.glob("*.bin"))), "")
        raise UserError(
            f"{folder} holds no *.safetensors{found}: save the model with save_pretrained(..., safe_serialization=True)"
        )
    placed: dict[str, Path] = {}
    for path in files:
        for name in sorted(_names(path)):
            if name in placed:
                raise UserError(
                    f"{folder} holds {name} twice, in {placed[name].name} and in {path.name}: delete the file that is "
                    "of another model"
                )
            placed[name] = path
    return placed


def read_index(path: Path) -> dict[str, str]:
    """Return the file name of every tensor from the index of a folder.

    Raises:
        UserError: if it cannot be read, or names anything but files of the folder.
    """
    try:
        weight_map = field(parse_object(read_bytes(path)), "weight_map", dict)
        for name, file in weight_map.items():
            # A path that leaves the folder would read, and later copy, files that do not belong to the model.
            if Path(checked(file, str, name)).name != file:
                raise InvalidInputError(f"{name!r} is in {file!r}, which is not the name of a file")
    except (OSError, InvalidInputError) as error:
        raise UserError(f"{path} is damaged ({error}): download the model again") from error
    return weight_map


def read_tensor(file: Path, name: str) -> torch.Tensor:
    """Read one tensor of a safetensors file to the CPU."""
    with safe_open(file, framework="pt", device="cpu") as opened:
        return opened.get_tensor(name)


class FolderReader:
    """Reads tensors, or parts of them, from the safetensors files of a folder. Files stay open until it is closed.

    Args:
        files: the file of every tensor, from `tensor_files`.
    """

    def __init__(self, files: Mapping[str, Path]):
        self._files = files
        self._opened: dict[Path, Any] = {}
        self._stack = ExitStack()

    def shape(self, name: str) -> list[int]:
        """The shape of a tensor. Raises KeyError if the folder does not have it."""
        return self._slice(name).get_shape()

    def read(self, name: str, dim: int | None, start: int, stop: int) -> torch.Tensor:
        """The part from `start` to `stop` of dimension `dim` (0 or 1) of a tensor; all of it if `dim` is None."""
        if dim is None:
            return self._opened_file(name).get_tensor(name)  # a slice of a scalar cannot be taken
        return self._slice(name)[start:stop] if dim == 0 else self._slice(name)[:, start:stop]

    def _slice(self, name: str) -> Any:
        return self._opened_file(name).get_slice(name)

    def _opened_file(self, name: str) -> Any:
        file = self._files[name]
        if file not in self._opened:
            self._opened[file] = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
        return self._opened[file]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def _names(file: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file. Opening it checks its length against the header."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return set(opened.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}): download or save it again") from error
