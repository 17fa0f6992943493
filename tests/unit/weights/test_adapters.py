"""Adapters: what is trained, merged, saved in PEFT's format, converted, and refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import lora, parallel
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.config import LoRAConfig, ParallelConfig
from megatron_rlvr.megatron.optimizer import chained_optimizers
from megatron_rlvr.megatron.streamed_checkpoint import StreamedLoad
from megatron_rlvr.training.checkpoint import Checkpoints
from megatron_rlvr.training.checkpoint_loading import start_from
from megatron_rlvr.training.config import CheckpointConfig
from megatron_rlvr.training.final_export import export_policy
from megatron_rlvr.training.policy import Policy
from megatron_rlvr.weights import conversion
from tests.families import ADVANTAGE, make_batch, make_family, policy_config
from tests.lora_layouts import LORA, config, trained, update

MODELS = ("qwen2-tied", "glm4-moe")
# `save_pretrained` of PEFT 0.21.2 writes these names for a Qwen2 of two layers whose attention has adapters, and these
# keys among others. Both were compared with the real package; see docs/lora.md.
PEFT_NAMES = [
    f"base_model.model.model.layers.{layer}.self_attn.{module}_proj.lora_{matrix}.weight"
    for layer in range(2)
    for module in "kqov"
    for matrix in "AB"
]
PEFT_KEYS = (
    "alpha_pattern base_model_name_or_path bias fan_in_fan_out inference_mode init_lora_weights layers_pattern "
    "layers_to_transform lora_alpha lora_dropout modules_to_save peft_type r rank_pattern revision target_modules "
    "task_type use_dora use_rslora"
)


@pytest.fixture(scope="module")
def here() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield layout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for name in MODELS:
        make_family(folder / name, name)
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path, here: parallel.Layout) -> dict[str, dict[str, Any]]:
    """Two updates of each model, with a checkpoint after the first and after the second, and the exports of a run."""
    results = {}
    for name in MODELS:
        policy = Policy(config(folder / name, ParallelConfig()), here)
        checkpoints = Checkpoints(folder / f"{name}-run" / "checkpoints", CheckpointConfig())
        with lora.without_adapters(policy.model_chunks):
            base = policy.score(make_batch(), ADVANTAGE)
        for step in (1, 2):
            update(policy, here, base)
            checkpoints.save(step, policy, {}, {})
        export_policy(policy, folder / f"{name}-run", CheckpointConfig())
        results[name] = {"policy": policy, "scores": policy.score(make_batch(), ADVANTAGE), "base": base}
    return results


def adapters_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.bridge.adapter_export(policy.model_chunks).tensors()}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", MODELS)
def test_only_adapters_are_trained(name: str, folder: Path, runs: dict[str, Any]) -> None:
    policy = runs[name]["policy"]
    [chunk] = policy.model_chunks
    adapters = sum(p.numel() for n, p in chunk.named_parameters() if ".adapters." in n)
    assert {n for n, p in chunk.named_parameters() if p.requires_grad} == {
        n for n, _ in chunk.named_parameters() if ".adapters." in n
    }
    assert not any(hasattr(p, "main_grad") or p.grad is not None for p in chunk.parameters() if not p.requires_grad)
    states = [state for single in chained_optimizers(policy.optimizer) for state in single.optimizer.state.values()]
    assert sum(state["exp_avg"].numel() for state in states) == adapters
    with lora.without_adapters(policy.model_chunks):
        assert torch.equal(policy.score(make_batch(), ADVANTAGE).logprob, runs[name]["base"].logprob)
    stored = StreamedLoad(folder / f"{name}-run" / "checkpoints" / "step_2").metadata.state_dict_metadata
    tensors = {key for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata) and entry.size}
    names = set(adapters_of(policy))
    moments = {f"optimizer.state.{moment}.{key}" for moment in ("exp_avg", "exp_avg_sq") for key in names}
    assert tensors == names | moments


@pytest.mark.parametrize("name", MODELS)
def test_the_merged_model_is_the_policy(name: str, folder: Path, runs: dict[str, Any], here: parallel.Layout) -> None:
    """Its weights are W + alpha / rank B A of the base and of the tensors in PEFT's folder, in float64."""
    run = folder / f"{name}-run"
    adapters = load_file(run / "adapter" / "adapter_model.safetensors")
    base, merged = load_file(folder / name / "model.safetensors"), load_file(run / "huggingface" / "model.safetensors")
    changed = 0
    for key, weight in merged.items():
        module = f"base_model.model.{key.removesuffix('.weight')}"
        expected = base[key].double()
        if f"{module}.lora_A.weight" in adapters:
            a, b = (adapters[f"{module}.lora_{matrix}.weight"].double() for matrix in "AB")
            expected = expected + LORA.alpha / LORA.rank * b @ a
            changed += bool((b != 0).any())
        assert (weight - expected).abs().max() < 1e-6, key
    assert changed > 12
    whole = Policy(policy_config(run / "huggingface", ParallelConfig()), here)
    logprob = whole.score(make_batch(), ADVANTAGE).logprob
    assert (logprob - runs[name]["scores"].logprob).abs().max() < 1e-5
    assert (logprob - runs[name]["base"].logprob).abs().max() > 0.1


def test_the_folder_is_what_peft_writes(folder: Path, here: parallel.Layout, tmp_path: Path) -> None:
    attention = LoRAConfig(rank=2, alpha=3.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    policy = Policy(config(folder / "qwen2-tied", ParallelConfig(), attention), here)
    export_policy(policy, tmp_path, CheckpointConfig(export_huggingface=False))
    assert not (tmp_path / "huggingface").exists()
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert set(written) == set(PEFT_KEYS.split())
    assert written["base_model_name_or_path"] == str(folder / "qwen2-tied")
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (2, 3, 0.0)
    assert written["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sorted(tensors) == sorted(PEFT_NAMES)
    hidden, key_value = 32, 16
    assert tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"].shape == (2, hidden)
    assert tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"].shape == (key_value, 2)


def test_the_start_is_the_base(folder: Path, here: parallel.Layout) -> None:
    """B is zero, and A is drawn as PEFT draws it, from the seed and the module's name alone."""
    settings = config(folder / "qwen2-tied", ParallelConfig())
    first, again, other = (adapters_of(Policy(dataclasses.replace(settings, seed=seed), here)) for seed in (5, 5, 6))
    assert equal(first, again)
    for name, tensor in first.items():
        if name.endswith("lora_B.weight"):
            assert not tensor.any()
            continue
        bound = tensor.size(1) ** -0.5
        assert 0.9 * bound < tensor.abs().max() <= bound and tensor.mean().abs() < 0.3 * bound
        assert not torch.equal(tensor, other[name])
    assert len({tensor.double().sum().item() for name, tensor in first.items() if "lora_A" in name}) == 14


@pytest.mark.parametrize("name", MODELS)
def test_resumed_bit_for_bit(name: str, folder: Path, runs: dict[str, Any], here: parallel.Layout) -> None:
    policy = Policy(config(folder / name, ParallelConfig()), here)
    Checkpoints(folder / f"{name}-run" / "checkpoints", CheckpointConfig()).load(1, policy)
    update(policy, here, runs[name]["base"])
    assert equal(adapters_of(policy), adapters_of(runs[name]["policy"]))


@pytest.mark.parametrize("name", MODELS)
def test_conversions_of_a_checkpoint(name: str, folder: Path, runs: dict[str, Any], tmp_path: Path) -> None:
    run = folder / f"{name}-run"
    bridge = PolicyBridge(policy_config(folder / name, ParallelConfig()).model, ParallelConfig())
    checkpoint = run / "checkpoints" / "step_2"
    conversion.to_peft(bridge, checkpoint, tmp_path / "adapter", (lines := []).append, verify=True)
    warned = "loads gate_proj, up_proj, down_proj of experts alone" in lines[-1]
    assert warned == (name == "glm4-moe")
    ours, theirs = tmp_path / "adapter", run / "adapter"
    assert (ours / "adapter_config.json").read_bytes() == (theirs / "adapter_config.json").read_bytes()
    assert equal(*(load_file(f / "adapter_model.safetensors") for f in (ours, theirs)))
    conversion.to_huggingface(bridge, checkpoint, tmp_path / "merged", print, verify=True)
    assert equal(*(load_file(f / "model.safetensors") for f in (tmp_path / "merged", run / "huggingface")))
    with pytest.raises(UserError, match="holds adapters of another base") as raised:
        other = make_family(tmp_path / "other", name, attention_dropout=0.0)
        weights = load_file(other / "model.safetensors")
        save_file({k: w + 1e-3 for k, w in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
        other_bridge = PolicyBridge(policy_config(other, ParallelConfig()).model, ParallelConfig())
        conversion.to_peft(other_bridge, checkpoint, tmp_path / "x", print)
    assert str(other) in str(raised.value) and "\n" not in str(raised.value)


def test_a_run_starts_from_a_folder_of_peft(folder: Path, runs: dict[str, Any], here: parallel.Layout) -> None:
    policy = Policy(config(folder / "glm4-moe", ParallelConfig()), here)
    assert start_from(CheckpointConfig(start_from=str(folder / "glm4-moe-run" / "adapter")), policy)
    assert equal(adapters_of(policy), adapters_of(runs["glm4-moe"]["policy"]))
    assert trained(policy, here, 1)["grad_norms"][0] > 0


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any], base: str | None = None) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        metadata = {"format": "pt"} | ({} if base is None else {"base_weights": base})
        save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)

    return rewrite


def _another_base(folder: Path) -> None:
    """What another program saves: the folder of its base instead of a checksum. The shapes are those of the policy."""
    other = make_family(folder.with_name("other"), "qwen2-tied")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    _tensors(lambda tensors: None)(folder)
    _config(base_model_name_or_path=str(other))(folder)


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "type": (_config(peft_type="IA3"), "adapters of type 'IA3'"),
    "dora": (_config(use_dora=True), "use_dora=True"),
    "rslora": (_config(use_rslora=True), "use_rslora=True"),
    "ranks": (_config(rank_pattern={"q_proj": 4}), "rank_pattern="),
    "pissa": (_config(init_lora_weights="pissa_niter_16"), "init_lora_weights='pissa_niter_16'"),
    "activated": (_config(alora_invocation_tokens=[3]), "alora_invocation_tokens="),
    "a later PEFT": (_config(use_something_new=True), "use_something_new=True"),
    "rank": (_config(r=8), "r=8: set lora.rank"),
    "alpha": (_config(lora_alpha=1), "lora_alpha=1: set lora.alpha"),
    "no rank": (_config(r=None), "'r'"),
    "damaged": (lambda folder: (folder / "adapter_config.json").write_text("{") and None, "cannot be read"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "cannot be read"),
    "cut": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12345678"), "cannot be read"),
    "base": (_tensors(lambda tensors: None, "0" * 64), "another base"),
    "base of another program": (_another_base, "another base"),
    "bias": (_config(bias="lora_only"), "bias='lora_only'"),
    "whole modules": (_config(modules_to_save=["lm_head"]), "modules_to_save=['lm_head']"),
    "quantized": (_tensors(lambda t: t.update({FIRST: t[FIRST].to(torch.int8)})), "has dtype I8"),
    "missing": (_tensors(lambda tensors: tensors.pop(FIRST)), f"lacks {FIRST}"),
    "unknown": (_tensors(lambda tensors: tensors.update(other=torch.zeros(1))), "holds other"),
    "shape": (_tensors(lambda tensors: tensors.update({FIRST: torch.zeros(3, 7)})), "has shape [3, 7] instead of"),
    "nan": (_tensors(lambda tensors: tensors[FIRST].fill_(torch.nan)), "NaN"),
}


@pytest.fixture(scope="module")
def fresh(folder: Path, here: parallel.Layout) -> Policy:
    return Policy(config(folder / "qwen2-tied", ParallelConfig()), here)


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders_are_one_line(case: str, folder: Path, runs: dict[str, Any], fresh: Policy, tmp_path: Path) -> None:
    change, expected = BAD_FOLDERS[case]
    source = shutil.copytree(folder / "qwen2-tied-run" / "adapter", tmp_path / "adapter")
    change(source)
    with pytest.raises(UserError) as raised:
        start_from(CheckpointConfig(start_from=str(source)), fresh)
    assert expected in str(raised.value) and str(source) in str(raised.value) and "\n" not in str(raised.value)


def test_checkpoints_of_other_adapters_are_refused(
    folder: Path, runs: dict[str, Any], here: parallel.Layout, tmp_path: Path
) -> None:
    model, checkpoints = folder / "qwen2-tied", folder / "qwen2-tied-run" / "checkpoints"
    other = shutil.copytree(model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][-1, 3] += 1e-4
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    refused = {
        "lora.rank=3, found 4": (model, LoRAConfig(rank=4, alpha=12.0)),
        "lora.alpha=12.0, found 3.0": (model, LoRAConfig(rank=3, alpha=3.0)),
        "lora.target_modules=": (model, LoRAConfig(rank=3, alpha=12.0, target_modules=["q_proj"])),
        f"adapters of {model}, but lora.rank=0": (model, LoRAConfig()),
        "another base": (other, LORA),
    }
    for text, (path, settings) in refused.items():
        policy = Policy(config(path, ParallelConfig(), settings), here)
        with pytest.raises(UserError) as raised:
            Checkpoints(checkpoints, CheckpointConfig()).load_newest(policy)
        assert text in str(raised.value) and "\n" not in str(raised.value)
    whole = Policy(config(model, ParallelConfig(), LoRAConfig()), here)
    Checkpoints(tmp_path / "whole", CheckpointConfig()).save(1, whole, {}, {})
    with pytest.raises(UserError, match="holds all weights of a model"):
        start_from(CheckpointConfig(start_from=str(tmp_path / "whole" / "step_1")), runs["qwen2-tied"]["policy"])


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        (["q_prj"], "q_prj is not a linear layer of this model: choose from q_proj, k_proj, v_proj, o_proj, gate_proj"),
        (["lm_head"], "lm_head is not a linear layer"),
        ([], "leaves nothing to train"),
        (["q_proj", "q_proj"], "names q_proj twice"),
        (["all-linear", "q_proj"], "write it alone"),
    ],
)
def test_modules_that_cannot_have_adapters(modules: list[str], text: str, folder: Path, here: parallel.Layout) -> None:
    settings = LoRAConfig(rank=2, target_modules=modules)
    with pytest.raises(UserError) as raised:
        settings.check()
        Policy(config(folder / "qwen2-tied", ParallelConfig(), settings), here)
    assert text in str(raised.value)
