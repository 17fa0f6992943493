"""From a published folder with FP8 weights, such as DeepSeek-V3's, to one that training can read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_rlvr.checked_input import read_json
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.huggingface_config import read_config
from megatron_rlvr.weights import fp8
from megatron_rlvr.weights.companions import check_companions, copy_companions
from megatron_rlvr.weights.comparison import compare_folder
from megatron_rlvr.weights.huggingface_folder import (
    SHARD_BYTES,
    read_tensor,
    tensor_files,
)
from megatron_rlvr.weights.resumable_folder import Report, begin, completing, identities, write_missing_shards
from megatron_rlvr.weights.shape_checks import DTYPES, expected_weights, names_in_float32
from megatron_rlvr.weights.whole_weights import check_finite

_QUANTIZED = "F8_E4M3"
Headers = Mapping[str, tuple[str, torch.Size]]
"""dtype, as safetensors names it, and shape of every tensor."""


def dequantize_folder(
    source: Path,
    target: Path,
    report: Report,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype = torch.bfloat16,
    verify: bool = False,
) -> tuple[int, int]:
    """Write the model of a folder whose projections are in FP8 blocks without quantization, one tensor at a time.

    Tensors that are not quantized, those for multi-token prediction included, keep their values and dtypes. config.json
    names a dtype that holds all weights exactly.

    Args:
        source: the folder, in the format of `megatron_rlvr.weights.fp8`.
        target: folder to write; must not exist. An interrupted conversion continues.
        report: called with lines of progress.
        shard_bytes: maximum size of a file, unless a tensor is larger.
        dtype: dtype of the weights that were quantized.
        verify: read the folder back and compare every tensor.

    Returns:
        the number of tensors that were quantized, and of those that were compared.

    Raises:
        UserError: if the source is not in this format or of a model that is not supported, or if a weight is missing or
            not finite, or if the target exists or cannot be written, or a tensor differs.
    """
    hf_config = read_config(source, quantized=True)
    _check_format(source)
    check_companions(source)
    files = tensor_files(source)
    headers = _headers(files)
    expected = expected_weights(hf_config)
    described = _described(source, headers, expected, dtype)
    in_float32 = names_in_float32(hf_config)
    # transformers rounds weights to the dtype that config.json names, so it must hold every weight exactly.
    widest = reduce(torch.promote_types, (described[name][0] for name in expected if not name.endswith(in_float32)))
    inputs = identities({*files.values(), source / "config.json"})
    settings = {"dequantized": str(source.resolve()), "files": inputs, "dtype": str(dtype), "shard": shard_bytes}
    partial = begin(target, settings, report)

    def tensor(name: str) -> Tensor:
        value = read_tensor(files[name], name)
        if headers[name][0] == _QUANTIZED:
            scales = fp8.scale_name(name)
            value = fp8.dequantize(value, read_tensor(files[scales], scales).float()).to(dtype)
        check_finite(value, f"{files[name]}: {name}")
        return value

    with completing(partial, target):
        write_missing_shards(partial, described, tensor, shard_bytes, report)
        copy_companions(source, partial, widest)
        if verify:
            report("comparing every tensor")
        compared = compare_folder(partial, ((name, tensor(name)) for name in described)) if verify else 0
    return sum(headers[name][0] == _QUANTIZED for name in described), compared


def _check_format(source: Path) -> None:
    found = read_json(source / "config.json", remedy="download the model again").get("quantization_config")
    expected = {key: fp8.QUANTIZATION_CONFIG[key] for key in ("quant_method", "weight_block_size")}
    own: dict[str, Any] = found if isinstance(found, dict) else {}
    if {key: own.get(key) for key in expected} != expected or own.get("fmt", "e4m3") != "e4m3":
        raise UserError(
            f"{source}/config.json: quantization_config is not that of FP8 weights in blocks of 128 x 128, which has "
            f"{expected}: use the model before its quantization"
        )


def _headers(files: Mapping[str, Path]) -> dict[str, tuple[str, torch.Size]]:
    found: dict[str, tuple[str, torch.Size]] = {}
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118, it is not a dict
                tensor = opened.get_slice(name)
                found[name] = tensor.get_dtype(), torch.Size(tensor.get_shape())
    return found


def _described(
    source: Path, headers: Headers, expected: Mapping[str, list[int]], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Return dtype and shape of every tensor to write, in the order of the source's files.

    Raises:
        UserError: if a weight of the model is missing or has another shape, or a quantized tensor and its scales do
            not belong together.
    """
    for name, size in expected.items():
        if name not in headers:
            raise UserError(f"{source} lacks {name}, which its config.json describes: download the model again")
        if (own := list(headers[name][1])) != size:
            raise UserError(f"{source}: {name} has shape {own}, but config.json describes {size}: download both again")
    suffix = fp8.scale_name("")
    described: dict[str, tuple[torch.dtype, torch.Size]] = {}
    for name, (stored, shape) in headers.items():
        if name.endswith(suffix):
            if headers.get(name.removesuffix(suffix), ("", shape))[0] != _QUANTIZED:
                raise UserError(f"{source} holds {name}, but no quantized tensor that it scales: download it again")
        elif stored == _QUANTIZED:
            scales = headers.get(fp8.scale_name(name))
            if scales is None or scales[1] != fp8.scale_shape(shape):
                found = "no" if scales is None else f"those of shape {list(scales[1])}"
                raise UserError(
                    f"{source}: {name} {list(shape)} needs scales {fp8.scale_name(name)} of shape "
                    f"{list(fp8.scale_shape(shape))}, found {found}: download the model again"
                )
            described[name] = dtype, shape
        elif stored in ("F32", "BF16"):
            described[name] = DTYPES[stored], shape
        else:
            raise UserError(f"{source}: {name} has dtype {stored}: use the model before its quantization")
    return described
