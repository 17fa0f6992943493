"""A Hugging Face folder with FP8 weights, for servers to start from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.huggingface_config import read_config
from megatron_rlvr.weights import fp8
from megatron_rlvr.weights.companions import check_companions
from megatron_rlvr.weights.comparison import compare_new_folder
from megatron_rlvr.weights.huggingface_folder import SHARD_BYTES, read_tensor, tensor_files, write_folder
from megatron_rlvr.weights.shape_checks import check_shapes, unused_warning
from megatron_rlvr.weights.whole_weights import check_finite


def quantize_folder(
    source: Path, target: Path, shard_bytes: int = SHARD_BYTES, verify: bool = False
) -> tuple[int, int]:
    """Write the model of a Hugging Face folder with its projections in FP8, one tensor at a time.

    config.json names a dtype that holds all other weights exactly. Tensors for multi-token prediction are left out,
    with a warning.

    Args:
        source: the folder, with weights in float32, bfloat16 or float16.
        target: folder to write; must not exist.
        shard_bytes: maximum size of a file, unless a tensor is larger.
        verify: read the folder back and compare every tensor; one that differs removes the folder.

    Returns:
        the number of tensors that were quantized, and of those that were compared.

    Raises:
        UserError: if the source is no complete model, a weight is not finite, the target exists, or a tensor differs.
    """
    if target.exists():
        raise UserError(f"{target} already exists: remove it, or choose another folder")
    check_companions(source)
    found = check_shapes(tensor_files(source), read_config(source))
    if unused := unused_warning(found):
        print(f"warning: {unused}", file=sys.stderr)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in sorted(found.files):
            tensor = read_tensor(found.files[name], name)
            check_finite(tensor, f"{found.files[name]}: {name}")
            yield name, tensor

    dtype = reduce(torch.promote_types, found.dtypes)
    write_folder(target, fp8.quantized(tensors()), source, shard_bytes, fp8.QUANTIZATION_CONFIG, dtype)
    compared = compare_new_folder(target, fp8.quantized(tensors())) if verify else 0
    return sum(map(fp8.is_quantized, found.files)), compared
