"""Weights in FP8 blocks: the format, folders of them, buckets, and what servers refuse."""

from __future__ import annotations

import base64
import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.huggingface_config import read_config
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.fp8_servers import check_blocks, start_folder
from megatron_rlvr.rollout.engines.sglang.weight_sync import shared_memory
from megatron_rlvr.weights import fp8
from megatron_rlvr.weights.buckets import filled, largest_bytes, plan_buckets
from megatron_rlvr.weights.fp8_folder import quantize_folder
from megatron_rlvr.weights.huggingface_folder import read_tensor, tensor_files

PROJECTION = "model.layers.0.mlp.up_proj.weight"


def random(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 257), (3, 500), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_block_has_the_scale_of_its_largest_element(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = (random(*shape) * torch.logspace(-4, 2, shape[1])).to(dtype)
    quantized, scale = fp8.quantize(weight)
    assert quantized.dtype == torch.float8_e4m3fn and quantized.shape == weight.shape and scale.dtype == torch.float32
    assert scale.shape == fp8.scale_shape(weight.shape) == (-(-shape[0] // 128), -(-shape[1] // 128))
    back = fp8.dequantize(quantized, scale)
    assert back.dtype == torch.float32 and back.shape == weight.shape
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            block = slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128)
            exact, found = weight[block].double(), back[block].double()
            largest = exact.abs().max()
            torch.testing.assert_close(scale[row, column].double(), largest / 448, rtol=1e-6, atol=0)
            torch.testing.assert_close(found.abs().max(), largest, rtol=1e-6, atol=0)
            # e4m3 has 3 bits of mantissa; below 2^-6 its numbers are 2^-9 apart.
            error = (found - exact).abs()
            assert (error <= torch.maximum(exact.abs() / 16, scale[row, column].double() * 2**-10) * 1.000001).all()


def test_extreme_blocks_stay_finite() -> None:
    weight = torch.zeros(128, 512)
    weight[0, 128] = torch.finfo(torch.float32).max
    weight[:, 256:384] = torch.finfo(torch.bfloat16).tiny
    weight[5, 400] = 1e-40  # a denormal number
    quantized, scale = fp8.quantize(weight)
    back = fp8.dequantize(quantized, scale)
    assert torch.isfinite(back).all() and torch.isfinite(scale).all() and (scale > 0).all()
    assert (back[:, :128] == 0).all() and back[0, 128] == pytest.approx(weight[0, 128].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (PROJECTION, True),
        ("model.layers.3.self_attn.q_proj.weight", True),
        ("model.layers.3.self_attn.kv_a_proj_with_mqa.weight", True),
        ("model.layers.3.mlp.experts.7.down_proj.weight", True),
        ("model.layers.3.block_sparse_moe.experts.7.w2.weight", True),
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", True),
        ("model.layers.3.self_attn.q_proj.bias", False),
        ("model.layers.3.mlp.gate.weight", False),
        ("model.layers.3.block_sparse_moe.gate.weight", False),
        ("model.layers.3.mlp.shared_expert_gate.weight", False),
        ("model.layers.3.input_layernorm.weight", False),
        ("model.layers.3.self_attn.q_a_layernorm.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_projections_are_quantized(name: str, expected: bool) -> None:
    assert fp8.is_quantized(name) == expected


class WholeModel:
    """An export of tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors = tensors

    def described(self):
        return ((name, tensor.dtype, tensor.shape) for name, tensor in self._tensors.items())

    def tensors(self):
        return iter(self._tensors.items())


EXPORT = fp8.QuantizedExport(
    WholeModel(
        {
            "model.embed_tokens.weight": random(7, 9).bfloat16(),
            PROJECTION: random(131, 5).bfloat16(),  # 655 bytes in FP8, so the float32 scales would not be aligned
            "model.layers.0.mlp.down_proj.weight": random(128, 256).bfloat16(),
            "model.norm.weight": random(1, 9)[0].bfloat16(),
        }
    )
)


@pytest.mark.parametrize("size", [1, 700, 2**20])
def test_buckets_hold_several_dtypes_and_keep_them_aligned(size: int) -> None:
    described, tensors = list(EXPORT.described()), {name: tensor.clone() for name, tensor in EXPORT.tensors()}
    assert [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()] == described
    planned = plan_buckets(described, size)
    buffers = [torch.empty(largest_bytes(planned), dtype=torch.uint8) for _ in range(2)]
    received = {}
    for bucket in filled(planned, EXPORT.tensors(), buffers):
        message = pickle.loads(base64.b64decode(shared_memory._serialize(bucket)))
        flat, metadata = message["flattened_tensor"], message["metadata"]
        for entry in metadata:  # as SGLang reads it (FlattenedTensorBucket.reconstruct_tensors)
            assert isinstance(entry, SimpleNamespace) and entry.start_idx % entry.dtype.itemsize == 0
            received[entry.name] = flat[entry.start_idx : entry.end_idx].view(entry.dtype).reshape(entry.shape).clone()
    assert received.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert received[name].view(torch.uint8).equal(tensor.view(torch.uint8)), name
    if size == 2**20:
        assert len(planned) == 2  # the scales of the first projection begin a new one


def test_a_folder_for_servers(small_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "fp8"
    count, compared = quantize_folder(small_model, target, shard_bytes=20_000, verify=True)
    source, files = tensor_files(small_model), tensor_files(target)
    assert count == 7 * 4 and len(files) == len(source) + count == compared and (target / "tokenizer.json").is_file()
    for name, file in source.items():
        tensor = read_tensor(file, name)
        if fp8.is_quantized(name):
            scale = read_tensor(files[fp8.scale_name(name)], fp8.scale_name(name))
            [(_, tensor)] = fp8.rounded([(name, tensor)])
            assert fp8.dequantize(read_tensor(files[name], name), scale).equal(tensor)
        else:
            assert read_tensor(files[name], name).equal(tensor)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (small_model, target))
    assert after == before | {"quantization_config": fp8.QUANTIZATION_CONFIG}
    with pytest.raises(UserError, match="already exists: remove it"):
        quantize_folder(small_model, target)
    with pytest.raises(UserError, match="before its quantization"):
        quantize_folder(target, tmp_path / "twice")


def test_a_damaged_model_makes_no_folder(small_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_bytes((small_model / "config.json").read_bytes())
    tensors = load_file(small_model / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"model.norm.weight has values that are NaN or infinite"):
        quantize_folder(copy, tmp_path / "target")
    assert not list(tmp_path.glob("target*"))


def aligned(folder: Path, **sizes: int) -> Path:
    config = {"model_type": "qwen2", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 50, "tie_word_embeddings": False}
    folder.mkdir(exist_ok=True)
    config |= sizes | {"architectures": ["Qwen2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "fp8").mkdir()
    (folder / "fp8" / "config.json").write_text(json.dumps(config | {"quantization_config": fp8.QUANTIZATION_CONFIG}))
    return folder


@pytest.mark.parametrize(
    ("sizes", "tensor", "refused"),
    [
        ({}, 1, None),
        ({"num_key_value_heads": 1}, 1, r"k_proj.weight has shape \[64, 512\], so 1 tensor-parallel"),
        ({}, 4, r"k_proj.weight has shape \[128, 512\], so 4"),
        ({"head_dim": 128, "num_key_value_heads": 1}, 4, None),  # its ranks share a head
        ({"head_dim": 128, "intermediate_size": 896}, 4, r"gate_proj.weight has shape \[896, 512\]"),
        ({"intermediate_size": 1000}, 1, r"gate_proj.weight has shape \[1000, 512\]"),
    ],
)
def test_blocks_that_servers_would_cut(tmp_path: Path, sizes: dict, tensor: int, refused: str | None) -> None:
    folder = aligned(tmp_path / "model", **sizes)
    server = SGLangConfig(server={"tp": tensor}, model_path=str(folder / "fp8"))
    config = read_config(folder)
    if refused is None:
        check_blocks(server, start_folder(server, folder), config)
    else:
        with pytest.raises(UserError, match=refused):
            check_blocks(server, folder / "fp8", config)


def test_servers_need_a_quantized_folder(small_model: Path, tmp_path: Path) -> None:
    config = read_config(small_model)
    with pytest.raises(UserError, match="has no weights in FP8 blocks of 128 x 128: make it with tools/convert"):
        check_blocks(SGLangConfig(), small_model, config)
    with pytest.raises(UserError, match=r"has no readable config.json .*: make it with"):
        check_blocks(SGLangConfig(), tmp_path, config)
    assert start_folder(SGLangConfig(), small_model) == small_model.resolve()
    with pytest.raises(UserError, match=r"fp8 needs rollout.sglang.model_path.*to-fp8 MODEL FOLDER"):
        replace(RolloutConfig(), engine="sglang", quantization="fp8").check()
