"""The difference between two versions of a model's weights: the elements whose bits changed, and their new values.

A step at the learning rates of RL changes few bfloat16 weights, because most updates are smaller than the distance to
the next bfloat16 number. A delta is a folder with a safetensors file for each file of the base that has changes, under
the same name, ``delta.json`` and the checksums of both. For a changed tensor ``NAME``, its file holds either

- ``NAME:gaps``, uint8 [n]: the unchanged elements before each changed one, since the last changed one; 255 stands for
  a gap in ``NAME:jumps``, int64, which holds the gaps of 255 and more in order; and ``NAME:values``, the bits of the
  new values, an integer of the tensor's size [n]; or
- ``NAME:whole``, the new tensor, where that is smaller.

Values replace bits, so the result does not depend on arithmetic. It does depend on the base, which the reader must
compare with ``delta.json`` before it applies a delta.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rlvr.atomic_write import replace_folder, write_text
from megatron_rlvr.checked_input import InvalidInputError, field, parse_object, read_bytes
from megatron_rlvr.checksums import DamagedError, check_files, digest, file_names, read_list, write_list
from megatron_rlvr.errors import UserError
from megatron_rlvr.weights.huggingface_folder import FolderReader, tensor_files

_ABOUT = "delta.json"
_LONG_GAP = 255
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_THREADS = 4


@dataclass(frozen=True)
class Delta:
    """What a delta is, as ``delta.json`` says it.

    Attributes:
        chain: the full weights that the chain of deltas began with, and those before it.
        base: version of the weights that it applies to.
        version: version of the weights that result.
        elements: elements of the whole model.
        changed: elements whose bits changed.
        nbytes: bytes of its tensors.
    """

    chain: str
    base: int
    version: int
    elements: int = 0
    changed: int = 0
    nbytes: int = 0


def encode(name: str, old: Tensor, new: Tensor) -> tuple[dict[str, Tensor], int]:
    """Return the entries of a tensor in a delta, and the number of its changed elements.

    Args:
        name: name of the tensor.
        old, new: CPU tensors of the same dtype and shape.

    Raises:
        ValueError: if dtype or shape differ.
    """
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        raise ValueError(f"{name} was {old.dtype} {list(old.shape)} and is {new.dtype} {list(new.shape)}")
    bits = _bits(new)
    changed = (_bits(old) != bits).nonzero()[:, 0]
    if not len(changed):
        return {}, 0
    gaps = torch.diff(changed, prepend=changed.new_tensor([-1])) - 1
    jumps = gaps[gaps >= _LONG_GAP]
    if len(changed) * (1 + new.itemsize) + jumps.nbytes >= new.nbytes:
        return {f"{name}:whole": new.contiguous()}, len(changed)
    entries = {f"{name}:gaps": gaps.clamp(max=_LONG_GAP).to(torch.uint8), f"{name}:values": bits[changed]}
    return entries | ({f"{name}:jumps": jumps} if len(jumps) else {}), len(changed)


def apply(name: str, tensor: Tensor, entries: Mapping[str, Tensor]) -> None:
    """Change a tensor in place to the version that a delta describes.

    Args:
        name: name of the tensor.
        tensor: the tensor of the base, contiguous.
        entries: entries of the delta; those of other tensors are ignored.

    Raises:
        ValueError: if the entries do not fit the tensor.
    """
    whole = entries.get(f"{name}:whole")
    if whole is not None:
        if (whole.dtype, whole.shape) != (tensor.dtype, tensor.shape):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)} in the base, which the delta changes")
        tensor.copy_(whole)
        return
    gaps, values = entries[f"{name}:gaps"].long(), entries[f"{name}:values"]
    jumps = entries.get(f"{name}:jumps", gaps.new_empty(0))
    long = gaps == _LONG_GAP
    bits = _bits(tensor)
    if int(long.sum()) != len(jumps) or len(gaps) != len(values) or values.dtype != bits.dtype:
        raise ValueError(f"{name} is inconsistent in the delta")
    gaps[long] = jumps
    positions = (gaps + 1).cumsum(0) - 1
    if bool((gaps < 0).any()) or int(positions[-1]) >= len(bits):
        raise ValueError(f"{name} has changes outside of the tensor")
    bits[positions] = values


def write_delta(folder: Path, base: Path, tensors: Iterable[tuple[str, Tensor]], about: Delta) -> Delta:
    """Write the delta from a Hugging Face folder to new weights. It gets its name when it is complete.

    Args:
        folder: folder to write; replaced if it exists.
        base: folder of the old weights.
        tensors: the new weights by name: the same tensors, consumed one at a time. One file of changes is in memory.
        about: chain, base and version; the rest is filled in.

    Returns:
        `about`, complete.

    Raises:
        UserError: if the base cannot be read or the delta cannot be written.
    """
    files = tensor_files(base)
    elements = changed = nbytes = 0
    entries: dict[str, dict[str, Tensor]] = {}
    current = None
    with _replaced(folder) as partial, FolderReader(files) as reader:

        def close(file: str) -> None:
            if found := entries.pop(file, None):
                save_file(found, partial / file)

        missing = set(files)
        for name, tensor in tensors:
            file = files[name].name
            if current not in (None, file):  # an export has the order of the files that were written from it
                close(str(current))
            current = file
            found, count = encode(name, reader.read(name, None, 0, 0), tensor.detach())
            missing.remove(name)
            elements, changed = elements + tensor.numel(), changed + count
            nbytes += sum(entry.nbytes for entry in found.values())
            if found:
                entries.setdefault(file, {}).update(found)
        if missing:
            raise ValueError(f"the export lacks {min(missing)}, which {base} holds")
        for file in list(entries):
            close(file)
        about = Delta(about.chain, about.base, about.version, elements, changed, nbytes)
        write_text(partial / _ABOUT, json.dumps(asdict(about)))
        write_checksums(partial)
    return about


def read_delta(folder: Path) -> Delta:
    """Read what a delta is, after all of its files were compared with their checksums.

    Raises:
        DamagedError: if anything is missing or changed.
    """
    verify(folder)
    try:
        about = parse_object(read_bytes(folder / _ABOUT))
        numbers = {key: field(about, key, int, at_least=0) for key in asdict(Delta("", 0, 0)) if key != "chain"}
        return Delta(chain=field(about, "chain", str), **numbers)
    except (OSError, InvalidInputError) as error:
        raise DamagedError(f"{_ABOUT} is damaged ({error})") from error


def apply_delta(folder: Path, base: Path, delta: Path) -> None:
    """Write the Hugging Face folder that results from a base and a delta, which `read_delta` has verified.

    The files are those of a full export, bit for bit. A file without changes is linked to that of the base.

    Args:
        folder: folder to write, on the file system of `base`; replaced if it exists. It gets its name when complete.
        base: folder of the old weights; not changed.
        delta: folder of the delta.

    Raises:
        DamagedError: if the delta does not fit the base.
        UserError: if the folder cannot be written.
    """

    def write(partial: Path, name: str) -> None:
        if not (delta / name).is_file():
            (partial / name).hardlink_to(base / name)
            return
        tensors = load_file(base / name)
        with safe_open(delta / name, framework="pt", device="cpu") as changes:
            keys: dict[str, list[str]] = {}
            for key in changes.keys():  # noqa: SIM118
                keys.setdefault(key.rpartition(":")[0], []).append(key)
            for tensor, own in keys.items():
                apply(tensor, tensors[tensor], {key: changes.get_tensor(key) for key in own})
        save_file(tensors, partial / name, metadata={"format": "pt"})

    with _replaced(folder) as partial:
        names = [name for name in file_names(base) if name.endswith(".safetensors")]
        if added := {file.name for file in delta.glob("*.safetensors")} - set(names):
            raise DamagedError(f"the delta does not fit its base, which has no {min(added)}")
        for name in set(file_names(base)) - set(names):
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(base / name, partial / name)
        try:
            with ThreadPoolExecutor(_THREADS) as threads:
                list(threads.map(lambda name: write(partial, name), names))
        except (KeyError, ValueError) as error:
            raise DamagedError(f"the delta does not fit its base ({error})") from error


def copy_folder(folder: Path, source: Path) -> None:
    """Copy a Hugging Face folder with checksums, and verify the copy, which gets its name when it is complete.

    Raises:
        DamagedError: if a file of `source`, or of its copy, differs from its checksum.
        UserError: if the folder cannot be written.
    """
    with _replaced(folder) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)
        verify(partial)


def verify(folder: Path) -> None:
    """Compare every file of a folder with its checksum; raises DamagedError."""
    listed = read_list(folder)
    if listed is None:
        raise DamagedError(f"{folder} has no checksums" if folder.is_dir() else f"{folder} is missing")
    check_files(folder, listed)


def write_checksums(folder: Path) -> None:
    """Write the checksums of a folder that is complete otherwise. Files are read in several threads."""
    names = file_names(folder)
    with ThreadPoolExecutor(_THREADS) as threads:
        found = dict(zip(names, threads.map(lambda name: digest(folder / name), names), strict=True))
    write_list(folder, found)


def _bits(tensor: Tensor) -> Tensor:
    """Return the elements as integers [n], a view of a contiguous tensor. They tell -0 from 0 and compare NaN."""
    return tensor.contiguous().view(-1).view(_BITS[tensor.itemsize])


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` at the end of the block, unless the block raises."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        replace_folder(partial, folder)
    except (OSError, SafetensorError, shutil.Error) as error:
        raise UserError(f"{folder} cannot be written: {error}; free some space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
