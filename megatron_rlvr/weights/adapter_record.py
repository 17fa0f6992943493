"""What a checkpoint of adapters says of them: their settings, and the weights that they were trained next to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_rlvr.checked_input import InvalidInputError, field
from megatron_rlvr.checksums import DamagedError
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import lora
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.weights.shape_checks import FolderWeights

RECORD = "lora"
"""The key of ``run.json`` that holds it."""


def adapter_record(bridge: PolicyBridge, base: str) -> dict[str, Any]:
    """Return the entry of ``run.json``.

    Args:
        bridge: a bridge with adapters.
        base: result of `weights_digest`.
    """
    settings = bridge.adapters
    assert settings is not None
    return {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "target_modules": lora.chosen_modules(bridge.family, settings),
        "base": {"path": str(bridge.path.resolve()), "weights": base},
    }


def weights_digest(found: FolderWeights) -> str:
    """Return a checksum of a folder's weights: SHA-256 of name, dtype, shape and three rows of every tensor.

    To read all of a large model would take minutes. Training changes nearly every row of every matrix, so the first,
    the middle and the last row of each tell two models apart. Another division into files changes nothing.
    """
    digest = hashlib.sha256()
    by_file: dict[Path, list[str]] = {}
    for name in found.files:
        by_file.setdefault(found.files[name], []).append(name)
    sampled: dict[str, bytes] = {}
    for file, names in by_file.items():
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in names:
                if name not in found.derived:
                    sampled[name] = _sample(opened.get_slice(name))
    for name in sorted(sampled):
        digest.update(name.encode() + b"\0" + sampled[name])
    return digest.hexdigest()


def _sample(tensor: Any) -> bytes:
    shape = tensor.get_shape()
    rows: list[Tensor] = [tensor[row : row + 1] for row in sorted({0, shape[0] // 2, shape[0] - 1})] if shape else []
    described = hashlib.sha256(f"{tensor.get_dtype()} {shape}".encode())
    for row in rows:
        described.update(row.contiguous().view(torch.uint8).numpy().data)
    return described.digest()


def stored_record(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what ``run.json`` says of adapters; None for a checkpoint of all weights.

    Raises:
        DamagedError: if it is not what `adapter_record` returned.
    """
    if RECORD not in record:
        return None
    try:
        stored = field(record, RECORD, dict)
        field(stored, "rank", int, at_least=1)
        field(stored, "alpha", float)
        field(stored, "target_modules", list)
        base = field(stored, "base", dict)
        field(base, "path", str)
        field(base, "weights", str)
    except InvalidInputError as error:
        raise DamagedError(f"run.json is damaged ({RECORD}: {error})") from error
    return stored


def check_same_adapters(stored: Mapping[str, Any] | None, expected: Mapping[str, Any] | None, folder: Path) -> None:
    """Refuse a checkpoint of other adapters, of adapters of another base, or of all weights instead of adapters.

    Args:
        stored: result of `stored_record` for the checkpoint.
        expected: record of the policy; None if it has no adapters.
        folder: the checkpoint.

    Raises:
        UserError: if the checkpoint does not belong to the policy.
    """
    if stored is None and expected is None:
        return
    convert = "convert it with tools/convert_checkpoint.py to-huggingface and set model.path to the result"
    if stored is None:
        assert expected is not None
        raise UserError(
            f"{folder} holds all weights of a model, but lora.rank={expected['rank']} trains adapters next to those of "
            f"model.path: set lora.rank=0, or {convert}"
        )
    if expected is None:
        raise UserError(
            f"{folder} holds adapters of {stored['base']['path']}, but lora.rank=0 trains all weights: set "
            f"lora.rank={stored['rank']}, or {convert}"
        )
    for name in ("rank", "alpha", "target_modules"):
        if stored[name] != expected[name]:
            raise UserError(
                f"{folder} holds adapters with lora.{name}={stored[name]}, found {expected[name]}: set it back"
            )
    check_same_base(stored["base"], expected["base"], str(folder))


def check_same_base(stored: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Refuse adapters that were trained next to other weights.

    Args:
        stored: the base of the adapters.
        expected: the base in use.
        what: the adapters, for the error.

    Raises:
        UserError: if they differ.
    """
    if stored["weights"] != expected["weights"]:
        raise UserError(
            f"{what} holds adapters of another base, {stored['path']}: its weights differ from those of "
            f"{expected['path']}; set model.path to the base of the adapters"
        )
