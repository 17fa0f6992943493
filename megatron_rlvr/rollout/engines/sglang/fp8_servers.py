"""Servers that hold the policy's weights in FP8: the folder that they start from, and whether they can split it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_rlvr.checked_input import InvalidInputError, parse_object, read_bytes
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.families.weight_map import head_size_of
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.launch_arguments import ServerLayout
from megatron_rlvr.weights import fp8
from megatron_rlvr.weights.shape_checks import expected_weights

# SGLang stacks these on each other, and splits the columns of the others. In both cases blocks must not be cut.
_STACKED = re.compile(r"\.(?:[qkv]_proj|gate_proj|up_proj|w[13]|q_b_proj|kv_b_proj)\.weight$")
_SPLIT_COLUMNS = re.compile(r"\.(?:o_proj|down_proj|w2)\.weight$")
_KEY_VALUE = re.compile(r"\.[kv]_proj\.weight$")
_COMPARED = ("quant_method", "weight_block_size")
_REMEDY = "make it with tools/convert_checkpoint.py to-fp8 MODEL FOLDER"


def start_folder(config: SGLangConfig, model: Path) -> Path:
    """Return the folder that servers start from: `model`, unless the configuration names another one."""
    return Path(config.model_path or model).resolve()


def check_blocks(config: SGLangConfig, folder: Path, hf_config: Any) -> None:
    """Refuse a folder without FP8 weights, and servers whose ranks would cut a block.

    Args:
        config: section ``rollout.sglang``.
        folder: result of `start_folder`.
        hf_config: transformers configuration of the trained model.

    Raises:
        UserError: if the folder has another ``quantization_config``, or a rank of a server would get a part of a block
            (SGLang 0.5.23, ``Fp8LinearMethod.validate_block_quant_shapes``).
    """
    try:
        found = parse_object(read_bytes(folder / "config.json")).get("quantization_config")
    except (OSError, InvalidInputError) as error:
        raise UserError(
            f"rollout.sglang.model_path={folder} has no readable config.json ({error}): {_REMEDY}"
        ) from error
    if not isinstance(found, dict) or any(found.get(key) != fp8.QUANTIZATION_CONFIG[key] for key in _COMPARED):
        raise UserError(f"rollout.sglang.model_path={folder} has no weights in FP8 blocks of 128 x 128: {_REMEDY}")
    tensor = ServerLayout.from_arguments(config.server).tensor
    for name, shape in expected_weights(hf_config).items():
        size: float = fp8.BLOCK  # rows or columns of a rank
        if _STACKED.search(name):
            size = shape[0] / tensor
            if _KEY_VALUE.search(name):  # ranks share heads if there are fewer of them than ranks
                size = max(size, head_size_of(hf_config))
        elif _SPLIT_COLUMNS.search(name) and tensor > 1:
            size = shape[1] / tensor
        if size % fp8.BLOCK:
            raise UserError(
                f"rollout.quantization=fp8: {name} has shape {shape}, so {tensor} tensor-parallel ranks of a server "
                f"would cut its blocks of {fp8.BLOCK}: lower rollout.sglang.server.tensor_parallel_size, or set "
                "rollout.quantization=none"
            )
