"""A Hugging Face folder must have exactly the weights of its config.json, and an export is what was trained."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.families import FAMILIES as TABLES
from megatron_rlvr.megatron.families.family import HF_LAYER, LAYER
from megatron_rlvr.megatron.families.weight_map import Plain
from megatron_rlvr.megatron.huggingface_config import read_config
from megatron_rlvr.megatron.rotary import inverse_frequencies
from megatron_rlvr.weights.checkpoint_folder import check_same_model, fingerprint
from megatron_rlvr.weights.huggingface_folder import INDEX, tensor_files, write_folder
from megatron_rlvr.weights.shape_checks import check_shapes, expected_weights, rounding, stored_dtype, unused_warning
from tests.families import CHOICE_BIAS, FAMILIES, MIXTURES, make_families

Tensors = dict[str, Tensor]


def check(folder: Path) -> Any:
    return check_shapes(tensor_files(folder), read_config(folder))


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_families(tmp_path_factory.mktemp("families"))


@pytest.fixture
def copy(families: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: shutil.copytree(families / family, tmp_path / family)


@pytest.mark.parametrize("family", FAMILIES | MIXTURES)
def test_every_family_has_exactly_the_expected_weights(family: str, families: Path) -> None:
    folder, config = families / family, read_config(families / family)
    found = check(folder)
    assert found.dtypes == {torch.float32} and found.derived == frozenset()
    stored = load_file(folder / "model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in stored.items()} == expected_weights(config)


@pytest.mark.parametrize(
    "family", ["qwen2-untied", "qwen3-tied-wide-heads", "llama-untied", "qwen3-moe", "deepseek-v3"]
)
def test_every_missing_or_reshaped_weight_is_named(family: str, copy: Callable[[str], Path]) -> None:
    folder = copy(family)
    intact = load_file(folder / "model.safetensors")
    for name in (name for name in intact if "layers.1." in name or "layers" not in name):
        save_file({k: t for k, t in intact.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=f"lacks {name}, "):
            check(folder)
        other = {name: torch.zeros([*intact[name].shape[:-1], intact[name].shape[-1] + 1])}
        save_file(intact | other, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=f"{name} has shape .*does not match its config.json"):
            check(folder)


def frequencies(theta: float = 10000.0, size: int = 8) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, size, 2).float() / size)


INV_FREQ = "model.layers.1.self_attn.rotary_emb.inv_freq"
DERIVED: dict[str, tuple[str, Tensor]] = {
    "frequencies": (INV_FREQ, frequencies()),
    "frequencies of the model": ("model.rotary_emb.inv_freq", frequencies()),
    "frequencies in bfloat16": (INV_FREQ, frequencies().bfloat16()),
    "frequencies in float16": (INV_FREQ, frequencies().half()),
    "positions": ("model.embeddings.position_ids", torch.arange(256)[None]),
    "a causal mask": ("model.causal_mask", torch.ones(9, 9).triu(1).bool()),
    "masks of layers": ("model.layers.0.self_attn.bias", torch.ones(1, 1, 9, 9).tril().to(torch.uint8)),
    "the value of masked entries": ("model.layers.0.self_attn.masked_bias", torch.tensor(-1e9)),
}
FOREIGN: dict[str, tuple[str, Tensor, str]] = {
    "frequencies of another theta": (INV_FREQ, frequencies(500000.0), "trained with another rope_theta or scaling"),
    "scaled frequencies": (INV_FREQ, frequencies() / 4, "trained with another rope_theta or scaling"),
    "frequencies of other heads": (INV_FREQ, frequencies(size=16), "trained with another rope_theta or scaling"),
    "frequencies that are NaN": (INV_FREQ, frequencies() * float("nan"), "trained with another rope_theta"),
    "reversed positions": ("model.embeddings.position_ids", torch.arange(9).flip(0), "is not what the attention"),
    "a mask of a window": ("model.causal_mask", torch.ones(9, 9).triu(1).tril(3).bool(), "is not what the attention"),
    "a mask without values": ("model.causal_mask", torch.ones(0, 0), "is not what the attention"),
    "a mask of zeros": ("model.layers.0.self_attn.masked_bias", torch.tensor(0.0), "is not what the attention"),
    "a bias": ("model.layers.0.self_attn.o_proj.bias", torch.zeros(32), "o_proj.bias is not a tensor of llama"),
    "an adapter": ("model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(4, 32), "is not a tensor of llama"),
    "a value head": ("v_head.summary.weight", torch.zeros(1, 32), "v_head.summary.weight is not a tensor of llama"),
    "norms of another family": ("model.layers.0.self_attn.q_norm.weight", torch.ones(8), "is not a tensor of llama"),
    "scales of a quantization": ("model.layers.0.mlp.up_proj.weight_scale", torch.ones(1), "is not a tensor of llama"),
}


@pytest.mark.parametrize("kind", DERIVED)
def test_tensors_that_config_json_determines_are_accepted(kind: str, copy: Callable[[str], Path]) -> None:
    folder, (name, tensor) = copy("llama-untied"), DERIVED[kind]
    edit(folder, lambda tensors: tensors.update({name: tensor}))
    found = check(folder)
    assert found.derived == {name} and found.dtypes == {torch.float32}


@pytest.mark.parametrize("kind", FOREIGN)
def test_other_tensors_are_refused(kind: str, copy: Callable[[str], Path]) -> None:
    folder, (name, tensor, message) = copy("llama-untied"), FOREIGN[kind]
    edit(folder, lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(UserError, match=message):
        check(folder)


def test_the_text_model_within_a_multimodal_one_is_named(copy: Callable[[str], Path]) -> None:
    folder = copy("gemma3")
    edit(folder, lambda t: [t.update({f"language_model.{name}": t.pop(name)}) for name in list(t)])
    message = r"no weight is named model\.layers\.\*, but there is language_model\.model\.layers\.0\..*: save the text"
    with pytest.raises(UserError, match=message):
        check(folder)


def test_a_table_that_misses_a_weight_or_has_one_too_many(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, family = copy("qwen3-untied"), TABLES["qwen3"]
    fewer = [entry for entry in family.weights if not entry.megatron.endswith("q_layernorm.weight")]
    more = [*family.weights, Plain(f"{LAYER}.post_norm.weight", f"{HF_LAYER}.post_norm.weight")]
    for weights, message in ((fewer, "q_norm.weight is not a tensor of qwen3"), (more, "lacks .*0.post_norm.weight")):
        monkeypatch.setitem(TABLES, "qwen3", dataclasses.replace(family, weights=weights))
        with pytest.raises(UserError, match=message):
            check(folder)


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "moonlight"])
def test_routers_that_choose_one_expert(family: str, copy: Callable[[str], Path]) -> None:
    folder = copy(family)
    edit_config(folder, num_experts_per_tok=1)
    with pytest.raises(UserError, match="num_experts_per_tok=1 is not supported: use a model with 'at least 2'"):
        read_config(folder)


@pytest.mark.parametrize("family", ["gemma3", "glm4-moe"])
def test_yarn_where_its_factor_would_be_lost(family: str, copy: Callable[[str], Path]) -> None:
    """It applies to one kind of layers, or to the rotated part of a head."""
    folder = copy(family)
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    given = json.loads((folder / "config.json").read_text())["rope_parameters"]
    changed = given | {"full_attention": yarn} if family == "gemma3" else given | yarn
    edit_config(folder, rope_parameters=changed)
    with pytest.raises(
        UserError, match=r"rope_type='yarn' multiplies the rotated queries and keys by 1\.139, which the"
    ):
        read_config(folder)


@pytest.mark.parametrize("theta", [5000.0, 1e6])
def test_rotary_parameters_without_kinds_of_layers_are_what_transformers_computes(
    theta: float, copy: Callable[[str], Path]
) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    folder = copy("gemma3")
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": theta})
    config = read_config(folder)
    theirs = Gemma3RotaryEmbedding(config)
    expected = [getattr(theirs, f"{kind}_inv_freq") for kind in ("full_attention", "sliding_attention")]
    assert not expected[0].equal(expected[1])
    torch.testing.assert_close(inverse_frequencies(config, torch.device("cpu")), torch.cat(expected))


def test_scaled_frequencies_are_those_of_the_scaling(copy: Callable[[str], Path]) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = copy("llama3-untied")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](read_config(folder), torch.device("cpu"))
    edit(folder, lambda tensors: tensors.update({INV_FREQ: scaled}))
    assert check(folder).derived == {INV_FREQ}
    edit(folder, lambda tensors: tensors.update({INV_FREQ: frequencies()}))
    with pytest.raises(UserError, match="another rope_theta or scaling"):
        check(folder)


@pytest.mark.parametrize("family", ["qwen2-tied", "llama3-tied", "qwen3-tied-wide-heads"])
def test_a_tied_model_has_one_output_layer(family: str, copy: Callable[[str], Path]) -> None:
    folder = copy(family)
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert check(folder).derived == {"lm_head.weight"}
    edit(folder, lambda t: t["lm_head.weight"][-1, 0].add_(1e-3))
    with pytest.raises(UserError, match=r"tie_word_embeddings=true, but lm_head\.weight differs .*set it to false"):
        check(folder)
    edit_config(folder, tie_word_embeddings=False)
    assert check(folder).derived == frozenset()
    edit(folder, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"lacks lm_head\.weight, and config\.json has tie_word_embeddings=false"):
        check(folder)


def test_dtypes_of_weights(copy: Callable[[str], Path]) -> None:
    folder = copy("llama-untied")
    edit(folder, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items() if "mlp" in name}))
    assert check(folder).dtypes == {torch.float32, torch.bfloat16}
    for dtype, name in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")):
        edit(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(dtype)}))  # noqa: B023
        with pytest.raises(UserError, match=f"has dtype {name}: use the model before its quantization"):
            check(folder)
    assert rounding([torch.float32, torch.bfloat16], torch.float32) is None
    assert rounding([torch.float16], torch.float32) is None
    assert rounding([torch.float32, torch.bfloat16], torch.bfloat16) == "weights in float32 are rounded to bfloat16"
    assert rounding([torch.float16], torch.bfloat16) == "weights in float16 are rounded to bfloat16"
    assert rounding([torch.float64], torch.float32) == "weights in float64 are rounded to float32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config says that the weights are quantized"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types='sliding_attention' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"model_type": "gemma3", "vision_config": {}}, r"because it is multimodal.* \(the nearest is gemma3_text\)"),
    ],
)
def test_models_that_are_computed_otherwise_are_refused(
    changes: dict[str, Any], message: str, copy: Callable[[str], Path]
) -> None:
    folder = copy("qwen2-untied")
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        read_config(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_oss"}, "'gpt_oss' is not supported, because its attention has sinks"),
        (
            {"model_type": "deepseek_v2"},
            r"because its router weighs experts by a softmax \(the nearest is deepseek_v3\)",
        ),
        ({"model_type": "kimi_k3"}, r"'kimi_k3' is not supported \(the nearest is kimi_k2\)"),
        ({"model_type": ["deepseek_v3"]}, r"model_type list \['deepseek_v3'\] is not supported"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' is not supported: use a model with 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method='greedy' is not supported: use a model with 'noaux_tc'"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"rope_interleave": False}, "rope_interleave=False is not supported"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2 is not supported: use a model with 4"),
        ({"num_experts_per_tok": 1, "n_group": 1}, "num_experts_per_tok=1 is not supported"),
        ({"topk_group": 2}, "num_experts_per_tok=2 is not supported: use a model with 4"),
        ({"topk_group": 5}, "topk_group=5 is more than n_group=4"),
        ({"n_group": 3}, "n_group=3 does not divide n_routed_experts=8"),
        ({"n_group": None}, "'n_group' is NoneType None instead of an integer"),
        ({"v_head_dim": None}, "'v_head_dim' is NoneType None"),
        ({"kv_lora_rank": 0}, "'kv_lora_rank' is int 0, which is out of range"),
    ],
)
def test_models_near_deepseek_v3_are_refused(
    changes: dict[str, Any], message: str, copy: Callable[[str], Path]
) -> None:
    folder = copy("deepseek-v3")
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message) as raised:
        read_config(folder)
    assert "\n" not in str(raised.value)


def test_kimi_k2_is_read_as_deepseek_v3(copy: Callable[[str], Path]) -> None:
    folder = copy("deepseek-v3")
    expected = read_config(folder)
    edit_config(folder, model_type="kimi_k2", auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"})
    assert read_config(folder).to_diff_dict() | {"auto_map": None} == expected.to_diff_dict() | {"auto_map": None}
    assert check(folder).dtypes == {torch.float32}


def test_a_bias_of_the_router_stays_in_float32(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("moonlight")
    name = f"model.layers.1.mlp.gate.{CHOICE_BIAS}"
    edit(folder, lambda t: t.update({n: x.bfloat16() for n, x in t.items() if n != name}))
    assert check(folder).dtypes == {torch.bfloat16}
    write_folder(tmp_path / "out", iter(load_file(folder / "model.safetensors").items()), folder)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    config = read_config(folder)
    assert stored_dtype(name, torch.float32, torch.bfloat16, config) is torch.float32
    other = "model.layers.1.mlp.gate.weight"
    assert stored_dtype(other, torch.float32, torch.bfloat16, config) is torch.bfloat16
    assert stored_dtype(other, torch.bfloat16, None, config) is torch.bfloat16


@pytest.mark.parametrize(
    "change", [{"routed_scaling_factor": 1.5}, {"norm_topk_prob": False}, {"rope_interleave": False}]
)
def test_a_checkpoint_knows_what_its_weights_compute(change: dict[str, Any], copy: Callable[[str], Path]) -> None:
    """A value of config.json that changes no shape changes the policy."""
    config = read_config(copy("deepseek-v3"))
    stored = json.loads(json.dumps(fingerprint(config, torch.float32)))
    check_same_model(stored, fingerprint(config, torch.float32), Path("step_1"), remedy="")
    for key, value in change.items():
        setattr(config, key, value)
    other = fingerprint(config, torch.float32)
    with pytest.raises(UserError, match=f"another model .*{next(iter(change))}"):
        check_same_model(stored, other, Path("step_1"), remedy="")
    del stored["computation"]  # of an earlier version
    check_same_model(stored, other, Path("step_1"), remedy="")


def test_each_tensor_is_in_one_file(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen2-untied")
    tensors = load_file(folder / "model.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "other.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"holds model.norm.weight twice, in model.safetensors and in other.safetensors"
    ):
        tensor_files(folder)
    (folder / "other.safetensors").unlink()
    sharded = folder.with_name("sharded")
    write_folder(sharded, iter(tensors.items()), folder, shard_bytes=40_000)
    index = json.loads((sharded / INDEX).read_text())
    assert check(sharded).dtypes == {torch.float32} and len(set(index["weight_map"].values())) > 1
    shutil.copy(folder / "model.safetensors", sharded)
    with pytest.raises(UserError, match=r"model.safetensors is not in the index"):
        tensor_files(sharded)
    (sharded / "model.safetensors").unlink()
    del index["weight_map"]["model.norm.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"holds model.norm.weight, which the index does not list there"):
        tensor_files(sharded)


def test_a_folder_of_pickles_is_refused(copy: Callable[[str], Path]) -> None:
    folder = copy("qwen2-untied")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds no \*\.safetensors but pytorch_model\.bin: save the model with"):
        tensor_files(folder)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_config_json_names_the_dtype_of_the_weights(
    dtype: torch.dtype, key: str | None, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder, out = copy("qwen2-tied"), tmp_path / "out"
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config | ({key: "bfloat16"} if key else {})))
    tensors = {name: t.to(dtype) for name, t in load_file(folder / "model.safetensors").items()}
    write_folder(out, iter(tensors.items()), folder)
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(loaded[name].dtype is dtype and loaded[name].equal(t) for name, t in tensors.items())
    written = json.loads((out / "config.json").read_text())
    assert {k: v for k, v in written.items() if k != (key or "dtype")} == config
    if key and dtype is torch.bfloat16:
        assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_everything_that_makes_a_model_is_exported(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("qwen2-tied")
    names = {
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.txt",
    }
    names |= {"chat_template.jinja", "tokenizer.model", "qwen.tiktoken", "added_tokens.json", "merges.txt", "LICENSE"}
    for name in names:
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{}")
    (folder / "modeling.py").write_text("raise SystemExit")
    write_folder(tmp_path / "out", iter(load_file(folder / "model.safetensors").items()), folder)
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"config.json", "model.safetensors", "additional_chat_templates/tool.jinja", *names}


def test_layers_for_multi_token_prediction_are_left_out_with_a_warning(copy: Callable[[str], Path]) -> None:
    folder = copy("glm4-moe")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.eh_proj.weight"] = torch.zeros(32, 64)

    edit(folder, add)
    assert "1 tensors for multi-token prediction are not trained" in (unused_warning(check(folder)) or "")
    edit_config(folder, num_nextn_predict_layers=0)
    with pytest.raises(UserError, match=r"layers 0 to 2, but config\.json describes 2"):
        check(folder)
