"""Small random models of every supported family, and what a policy and transformers in float64 compute with them.

`run` is a job of tests/layout_jobs.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlvr.config import Config
from megatron_rlvr.control import AffineThreshold, ClipThresholds
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.data.routes import RouterShape, Routes
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rlvr.objectives import UpdateObjective, build_objective
from megatron_rlvr.rollout.config import RolloutConfig

VOCABULARY = 96
TEMPERATURE = 0.8
ADVANTAGE = torch.tensor([-0.9, 1.1, 0.7, -0.8, -0.5, 1.3, -0.4, 1.7])
WEIGHT = torch.tensor([0.03, 0.05, 0.02, 0.04, 0.06, 0.03, 0.05, 0.02])
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 6.0,
    "original_max_position_embeddings": 96,
}
# Llama's published scaling, with wavelengths for heads of 8: kept, blended and divided frequencies all occur.
_LLAMA3_PUBLISHED = {**_LLAMA3, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-untied": {"model_type": "qwen2"},
    "qwen3-tied-wide-heads": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 16},
    "qwen3-untied": {"model_type": "qwen3", "head_dim": 8},
    "llama-untied": {"model_type": "llama"},
    "llama3-untied": {"model_type": "llama", "rope_parameters": _LLAMA3},
    "llama3-tied": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": _LLAMA3_PUBLISHED},
    "llama-wide-heads": {"model_type": "llama", "head_dim": 24},
    "qwen2-tied-odd-vocabulary": {"model_type": "qwen2", "tie_word_embeddings": True, "vocab_size": VOCABULARY + 1},
    "qwen3-odd-vocabulary": {"model_type": "qwen3", "head_dim": 8, "vocab_size": VOCABULARY + 1},
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES |= {
    "qwen3-yarn": {"model_type": "qwen3", "head_dim": 8, "rope_parameters": _YARN},
    "llama-linear": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "qwen2-dynamic": {
        "model_type": "qwen2",
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    },
}
_GEMMA3 = {
    "model_type": "gemma3_text",
    "tie_word_embeddings": True,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
_GEMMA3_LINEAR = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
FAMILIES |= {
    "gemma3": _GEMMA3,
    "gemma3-linear": {**_GEMMA3, "rope_parameters": _GEMMA3_LINEAR, "vocab_size": VOCABULARY + 1},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
    "mixtral": {
        "model_type": "mixtral",
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 24,
    },
    "glm4-moe": {
        "model_type": "glm4_moe",
        "head_dim": 16,
        "use_qk_norm": True,
        "attention_bias": True,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.7,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
}
_LATENT = {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
MIXTURES |= {
    "deepseek-v3": {
        **_LATENT,
        "q_lora_rank": 24,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    },
    "moonlight": {
        **_LATENT,
        "q_lora_rank": None,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
    },
}
THREE_LAYERS = "moonlight-3-layers"
"""A model whose layers two pipeline stages do not divide."""
# Of a folder, by the names that transformers has in memory.
MIXTRAL_NAMES = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
CHOICE_BIAS = "e_score_correction_bias"
"""A weight without gradient: it only chooses experts."""
ROUTER_AUX_LOSS = 0.02
MICROBATCH = 3
# The first step of Adam moves every weight by LEARNING_RATE g / (|g| + epsilon). With a large epsilon, the step depends
# on the size of the gradient g, and not on its sign alone.
LEARNING_RATE, EPSILON, WEIGHT_DECAY = 0.1, 0.03, 0.02


@dataclasses.dataclass
class Measurement:
    """Log-probs and entropies [T] of the response tokens; by Hugging Face name, gradients and weights.

    `updated` has the weights after a step of AdamW with these gradients.
    """

    logprob: torch.Tensor
    entropy: torch.Tensor
    grad_norm: float
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    updated: dict[str, torch.Tensor]


def make_families(folder: Path) -> Path:
    """Make a model of every family and mixture in the subfolder of its name; returns `folder`."""
    for name in FAMILIES | MIXTURES:
        make_family(folder / name, name)
    make_family(folder / THREE_LAYERS, "moonlight", num_hidden_layers=3)
    return folder


def make_family(folder: Path, name: str, **changes: Any) -> Path:
    """Save a random model of the family as a Hugging Face folder; no weight has its initial value."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(len(name))
    config = AutoConfig.for_model(**(settings | (FAMILIES | MIXTURES)[name] | changes))
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(CHOICE_BIAS):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
    model.save_pretrained(folder)
    return folder


def make_batch(routers: RouterShape | None = None) -> RolloutBatch:
    """Eight responses to two prompts, long enough for the low rotary frequencies to matter; routed at random."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in (45, 31)]
    lengths = (14, 1, 27, 13, 6, 22, 5, 15)
    responses = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    routes: list[Routes | None] = [None] * 8
    if routers is not None:
        # A sequence has no route for its last token, and the fourth has none at all.
        tokens = [0 if i == 3 else len(prompts[i // 4]) + length - 1 for i, length in enumerate(lengths)]
        routes = [random_routes(count, routers, generator) for count in tokens]
    completions = [
        Completion(r, [-1.0] * len(r), "stop", 0, routes=of_sequence)
        for r, of_sequence in zip(responses, routes, strict=True)
    ]
    return RolloutBatch.from_completions(prompts, completions, [0.0] * 8, padding=0)


def random_routes(tokens: int, routers: RouterShape, generator: torch.Generator | None = None) -> Routes:
    """Distinct experts for each token and router, drawn at random."""
    scores = torch.rand(tokens, len(routers.routed), routers.experts, generator=generator)
    return Routes(scores.topk(routers.chosen).indices.numpy().astype(routers.dtype))


def has_aux_loss(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text())["model_type"] in ("qwen3_moe", "mixtral")


def policy_config(folder: Path, layout: ParallelConfig, replay: bool = False) -> Config:
    # The load-balancing loss depends on how sequences are divided into microbatches.
    router_aux_loss = ROUTER_AUX_LOSS if has_aux_loss(folder) and not layout.microbatch_tokens else 0.0
    return Config(
        model=ModelConfig(path=str(folder), dtype="float32", layer_spec="local", router_aux_loss=router_aux_loss),
        rollout=RolloutConfig(temperature=TEMPERATURE, routing_replay=replay),
        optimizer=OptimizerConfig(learning_rate=1e-12, clip_grad=1e9),
        parallel=dataclasses.replace(layout, microbatch_sequences=0 if layout.microbatch_tokens else MICROBATCH),
    )


def measure(
    folder: Path, layout: ParallelConfig, here: parallel.Layout, replay: bool = False
) -> tuple[Measurement, Any]:
    """What a policy in this layout computes for the batch, and the updated policy.

    Log-probs are on the last stage only.
    """
    from megatron_rlvr.training.policy import Policy

    config = policy_config(folder, layout, replay)
    config.optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATE, epsilon=EPSILON, weight_decay=WEIGHT_DECAY, clip_grad=1e9
    )
    policy = Policy(config, here)
    weights = {name: tensor.clone() for name, tensor in policy.bridge.export(policy.model_chunks)}
    batch = make_batch(policy.routers)
    scores = policy.score(batch, ADVANTAGE)
    wide = AffineThreshold(0.2, 0.0)
    weight = WEIGHT / here.data_size  # every data-parallel rank has the whole batch
    objective = UpdateObjective(build_objective("clip"), ClipThresholds(wide, wide))
    report = policy.update(batch, torch.arange(8), ADVANTAGE, weight, scores, objective)
    updated = {name: tensor.clone() for name, tensor in policy.bridge.export(policy.model_chunks)}
    with torch.no_grad():
        parameters = [p for chunk in policy.model_chunks for p in chunk.parameters()]
        values = [p.clone() for p in parameters]
        for parameter in parameters:
            parameter.copy_(parameter.main_grad)
        exported = policy.bridge.export(policy.model_chunks)
        gradients = {name: tensor.clone() for name, tensor in exported if not name.endswith(CHOICE_BIAS)}
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
    return Measurement(scores.logprob, scores.entropy, report.grad_norm, gradients, weights, updated), policy


def reference(folder: Path, routers: RouterShape | None = None, aux_loss: bool = True) -> Measurement:
    """The same, computed by transformers in float64. At ratio 1 the clipped objective has the gradient of A ln p.

    With `routers`, the experts are those of the batch's routes.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    weights = single_experts(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config.model_type
    )
    model = model.double()
    batch = make_batch(routers)
    taken, entropies, routed = [], [], []
    current: list[torch.Tensor] = []
    if routers is not None:
        replace_routes(model, routers, current)
    counts = [0] * 8 if batch.routes is None else batch.routes.counts.tolist()
    given = [None] * 8 if batch.routes is None else batch.routes.experts.long().split(counts)
    sequences = zip(batch.tokens, batch.prompt_lengths, batch.response_lengths, given, strict=True)
    for tokens, prompt, response, routes in sequences:
        current[:] = [routes]
        output = model(tokens[None, : prompt + response])
        logprobs = (output.logits[0, prompt - 1 : -1] / TEMPERATURE).log_softmax(-1)
        taken.append(logprobs.gather(1, tokens[prompt : prompt + response, None])[:, 0])
        entropies.append(-(logprobs.exp() * logprobs).sum(1))
        if aux_loss and has_aux_loss(folder):
            routed.append(model(tokens[None, : prompt + response], output_router_logits=True).router_logits)
    logprob = torch.cat(taken)
    factor = (ADVANTAGE * WEIGHT).double()[batch.sequence_of_token()]
    loss = -(factor * logprob).sum()
    if routed:
        lengths = batch.prompt_lengths + batch.response_lengths
        order = lengths.argsort(descending=True, stable=True).tolist()  # the order in which microbatches are filled
        starts = range(0, len(order), MICROBATCH)
        microbatches = [[routed[i] for i in order[start : start + MICROBATCH]] for start in starts]
        loss = loss + ROUTER_AUX_LOSS * sum(map(imbalance, microbatches)) / len(microbatches)
    loss.backward()
    gradients = single_experts({name: p.grad for name, p in model.named_parameters()}, model.config.model_type)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    updated = {name: adam_step(weights[name].double(), gradient) for name, gradient in gradients.items()}
    return Measurement(logprob.detach(), torch.cat(entropies).detach(), norm, gradients, weights, updated)


def adam_step(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The first step of AdamW (arXiv 1711.05101, algorithm 2), in which matrices alone decay."""
    decay = LEARNING_RATE * WEIGHT_DECAY if weight.dim() > 1 else 0.0
    return (1 - decay) * weight - LEARNING_RATE * gradient / (gradient.abs() + EPSILON)


def replace_routes(model: Any, routers: RouterShape, current: list[torch.Tensor]) -> None:
    """Let the routers of a transformers model use `current[0]`, [tokens, routers, chosen], for the first tokens."""
    for number, layer in enumerate(routers.routed):

        def replaced(_module: Any, _inputs: Any, output: Any, number: int = number) -> Any:
            logits, _, own = output
            given = current[0][:, number]
            indices = torch.cat([given, own[len(given) :]])
            if hasattr(model.config, "routed_scaling_factor"):
                gates = logits.sigmoid().gather(1, indices)
                gates = model.config.routed_scaling_factor * gates / gates.sum(1, keepdim=True)
            else:
                gates = logits.gather(1, indices).softmax(1)
            return logits, gates, indices

        model.model.layers[layer].mlp.gate.register_forward_hook(replaced)


def imbalance(sequences: list[tuple[torch.Tensor, ...]], chosen: int = 2) -> torch.Tensor:
    """Switch Transformer's load-balancing loss (arXiv 2101.03961, equation 4), summed over layers.

    E sum_e f_e P_e, where f_e is the share of choices that fell on expert e and P_e its mean probability, over all
    tokens of the sequences. A sequence is a tuple of router logits [tokens, E], by layer.
    """
    total = torch.zeros((), dtype=torch.float64)
    for layer in zip(*sequences, strict=True):
        probability = torch.cat(layer).softmax(-1)
        hits = torch.zeros_like(probability).scatter(1, probability.topk(chosen).indices, 1.0)
        total = total + probability.size(1) * (hits.mean(0) / chosen * probability.mean(0)).sum()
    return total


def single_experts(tensors: dict[str, torch.Tensor], model_type: str) -> dict[str, torch.Tensor]:
    """The stacked experts of transformers as the tensors of a model folder."""
    singles = {}
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for number, gate_and_up in enumerate(tensor):
                gate, up = gate_and_up.chunk(2)
                singles[f"{module}.{number}.gate_proj.weight"] = gate
                singles[f"{module}.{number}.up_proj.weight"] = up
        elif last == "down_proj":
            for number, down in enumerate(tensor):
                singles[f"{module}.{number}.down_proj.weight"] = down
        else:
            singles[name] = tensor
    if model_type == "mixtral":
        for old, new in MIXTRAL_NAMES.items():
            singles = {name.replace(old, new): tensor for name, tensor in singles.items()}
    return singles


def agree(found: Measurement, expected: Measurement) -> None:
    """Weights agree bit for bit; log-probs, entropies, all gradients and all updates up to float32 rounding."""
    for name, tensor in found.weights.items():
        assert tensor.equal(expected.weights[name]), name
    with_gradient = {name for name in found.weights if not name.endswith(CHOICE_BIAS)}
    assert set(expected.gradients) == set(found.gradients) == with_gradient
    assert (found.logprob - expected.logprob).abs().max() < 2e-5
    assert (found.entropy - expected.entropy).abs().max() < 2e-5
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for name, gradient in expected.gradients.items():
        assert (found.gradients[name] - gradient).norm() < 1e-5 * gradient.norm() + 1e-7, name
    assert found.updated.keys() == found.weights.keys()
    for name, tensor in found.updated.items():
        if name not in with_gradient:
            assert tensor.equal(expected.weights[name]), name
            continue
        change = (expected.updated[name] - expected.weights[name]).norm()
        assert (tensor - expected.updated[name]).norm() <= 1e-5 * change + 1e-7 * tensor.norm(), name


def run(job: dict[str, Any], here: parallel.Layout, output: Path) -> None:
    """Measure every folder of a job, and save ``<folder name>.pt`` in a folder of the job's name.

    A job has "name", "layout" (fields of ParallelConfig), "folders" and perhaps "replay": whether random routes are
    replayed.
    """
    for folder in map(Path, job["folders"]):
        measurement, _ = measure(folder, ParallelConfig(**job["layout"]), here, job.get("replay", False))
        if here.is_reporting_rank and here.data_rank == 0:
            (output / job["name"]).mkdir(exist_ok=True, parents=True)
            torch.save(dataclasses.asdict(measurement), output / job["name"] / f"{folder.name}.pt")
