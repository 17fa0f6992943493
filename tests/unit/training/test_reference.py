"""The reference policy in the policy's own stages, against transformers in float64; its weights never stay there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_rlvr.config import Config
from megatron_rlvr.control import ClipThresholds
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.data.kept_tokens import KeptTokens
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.config import LoRAConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rlvr.megatron.optimizer import chained_optimizers
from megatron_rlvr.megatron.weight_shards import weights_of
from megatron_rlvr.objectives import ReferenceKL, UpdateObjective, build_objective, group_advantages
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.training.config import AlgorithmConfig
from megatron_rlvr.training.reference import Reference
from megatron_rlvr.training.scoring import score_rollout
from tests.families import make_batch, make_family, policy_config
from tests.small_model import make_small_model

FILE = "model.safetensors"
TEMPERATURE = 0.8
PROMPTS = [[3, 4, 5, 105, 9, 106], [7, 8, 9, 10, 105, 50, 106]]
ADVANTAGE = torch.tensor([-0.9, 1.1, 0.7, -0.9, 0.0, 0.0, 0.0, 0.0])
REWARDS = [0, 1, 1, 0, 0, 0, 0, 0]


@pytest.fixture(scope="module")
def layout() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield layout


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_model(tmp_path_factory.mktemp("other"), seed=5)


def model_config(path: Path) -> ModelConfig:
    return ModelConfig(path=str(path), dtype="float32", layer_spec="local")


def bridge(path: Path) -> PolicyBridge:
    return PolicyBridge(model_config(path), ParallelConfig())


@pytest.fixture(params=[False, True], ids=["logits", "fused"])
def policy(request: pytest.FixtureRequest, layout: parallel.Layout, small_model: Path) -> Any:
    from megatron_rlvr.training.policy import Policy

    config = Config(
        model=model_config(small_model),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        optimizer=OptimizerConfig(learning_rate=0.02, clip_grad=1e9),
        algorithm=AlgorithmConfig(fused_linear=request.param),
        parallel=ParallelConfig(microbatch_sequences=3),
    )
    return Policy(config, layout)


@pytest.fixture
def batch() -> RolloutBatch:
    """Tokens that were drawn from kept sets, of two prompts; the rewards of the second one's completions are equal."""
    generator = torch.Generator().manual_seed(1)
    # In transformers the pad token (109) gets no embedding gradient, so no response contains it.
    responses = [torch.randint(0, 108, (n,), generator=generator).tolist() for n in (4, 1, 7, 3, 6, 2, 5, 5)]

    def kept(token: int) -> list[int]:
        return [token, *(i for i in torch.randperm(110, generator=generator).tolist()[:60] if i != token)]

    completions = [
        Completion(r, [-1.0] * len(r), "stop", 0, kept=KeptTokens.of([kept(t) for t in r])) for r in responses
    ]
    return RolloutBatch.from_completions(PROMPTS, completions, REWARDS, padding=109)


def exact_logprob(model: Any, batch: RolloutBatch) -> torch.Tensor:
    """float64 log-probs [T] of transformers, under the temperature and the kept sets."""
    rows, targets = [], []
    for tokens, prompt, response in zip(batch.tokens, batch.prompt_lengths, batch.response_lengths, strict=True):
        end = prompt + response
        rows.append(model(tokens[None, :end]).logits[0, prompt - 1 : end - 1] / TEMPERATURE)
        targets.append(tokens[prompt:end])
    logits = torch.cat(rows)
    assert batch.kept is not None
    logits = logits.masked_fill(~batch.kept.mask(0, logits.shape[1]), -torch.inf)
    return logits.log_softmax(-1).gather(1, torch.cat(targets)[:, None])[:, 0]


def transformers_model(path: Path) -> Any:
    from transformers import Qwen2ForCausalLM

    return Qwen2ForCausalLM.from_pretrained(path).double()


def everything(policy: Any) -> list[tuple[int, torch.Tensor]]:
    """Address and a copy of all weights, of the optimizer's own copies of them, and of all gradients."""
    tensors = [p for chunk in policy.model_chunks for p in chunk.parameters()]
    tensors += [p.main_grad for p in tensors if hasattr(p, "main_grad")]
    for single in chained_optimizers(policy.optimizer):
        tensors += [p for group in single.optimizer.param_groups for p in group["params"]]
    return [(tensor.data_ptr(), tensor.detach().clone()) for tensor in tensors]


def same(some: list[tuple[int, torch.Tensor]], others: list[tuple[int, torch.Tensor]]) -> bool:
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("resident", ["device", "host", "disk"])
def test_the_reference_is_scored_and_leaves_the_policy_as_it_is(
    policy: Any, batch: RolloutBatch, other_model: Path, small_model: Path, resident: str
) -> None:
    before = everything(policy)
    reference = Reference(bridge(other_model), policy, resident)
    own = policy.score(batch).logprob
    first, second = reference.logprob(batch), reference.logprob(batch)
    assert first.equal(second) and policy.score(batch).logprob.equal(own)
    with torch.no_grad():
        exact = exact_logprob(transformers_model(other_model), batch)
    assert (first - exact).abs().max() < 5e-6 < (first - own).abs().mean()
    assert same(everything(policy), before)
    if resident != "disk":
        weights = (weight for chunk in policy.model_chunks for weight in chunk.parameters())
        assert sum(w.nbytes for w in reference._kept or []) == sum(w.nbytes for w in weights)  # as the plan counts
    # The start model is the policy itself, bit for bit.
    assert Reference(bridge(small_model), policy, resident).logprob(batch).equal(own)


def test_adapters_are_off_while_the_reference_is_scored(
    layout: parallel.Layout, batch: RolloutBatch, small_model: Path, other_model: Path
) -> None:
    from megatron_rlvr.megatron.lora import adapters_in
    from megatron_rlvr.training.policy import Policy

    config = Config(
        model=model_config(small_model), rollout=RolloutConfig(temperature=TEMPERATURE), lora=LoRAConfig(rank=2)
    )
    policy = Policy(config, layout)
    start = policy.score(batch).logprob
    with torch.no_grad():
        for adapter in adapters_in(policy.model_chunks):
            adapter.lora_B.normal_(std=0.3)
    before, trained = everything(policy), policy.score(batch).logprob
    frozen, other = (Reference(bridge(path), policy, "host") for path in (small_model, other_model))
    assert frozen._kept is None and frozen.logprob(batch).equal(start)  # no second copy of the frozen weights
    with torch.no_grad():
        exact = exact_logprob(transformers_model(other_model), batch)
    assert (other.logprob(batch) - exact).abs().max() < 5e-6
    assert same(everything(policy), before) and policy.score(batch).logprob.equal(trained)
    assert (trained - start).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["gemma3", "glm4-moe", "moonlight"])
def test_every_weight_and_buffer_of_a_model_is_exchanged(family: str, layout: parallel.Layout, tmp_path: Path) -> None:
    from megatron_rlvr.training.policy import Policy

    torch.manual_seed(1)
    start, other = (make_family(tmp_path / name, family) for name in ("start", "other"))
    tensors = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in load_file(other / FILE).items()}
    save_file(tensors, other / FILE, metadata={"format": "pt"})
    policies = [Policy(policy_config(path, ParallelConfig()), layout) for path in (start, other)]
    rollout = make_batch()
    own = [policy.score(rollout).logprob for policy in policies]
    assert (own[0] - own[1]).abs().max() > 1e-3
    policy, before = policies[0], [weight for chunk in policies[0].model_chunks for _, weight in weights_of(chunk)]
    kept = [(weight.data_ptr(), weight.detach().clone()) for weight in before]
    for path, expected in ((other, own[1]), (start, own[0])):
        of_reference = PolicyBridge(policy_config(path, ParallelConfig()).model, ParallelConfig())
        assert Reference(of_reference, policy, "host").logprob(rollout).equal(expected)
        assert all(w.data_ptr() == address and w.equal(copy) for w, (address, copy) in zip(before, kept, strict=True))
    assert policy.score(rollout).logprob.equal(own[0])


def test_host_memory_keeps_a_copy_and_the_device_none(
    policy: Any, batch: RolloutBatch, other_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the weights move to page-locked memory, and are copied from there for every pass."""
    expected = Reference(bridge(other_model), policy, "device").logprob(batch)
    copies: list[torch.Tensor] = []
    other = bridge(other_model)

    def copy(weight: torch.Tensor, *_device: Any) -> torch.Tensor:
        copies.append(weight.clone())
        return copies[-1]

    with monkeypatch.context() as patched:
        patched.setattr("megatron_rlvr.training.reference.device.on_gpu", lambda: True)
        patched.setattr("megatron_rlvr.training.reference.device.return_cached_memory", lambda: None)
        patched.setattr(torch.Tensor, "pin_memory", copy)
        reference = Reference(other, policy, "host")
    locked, kept = list(copies), reference._kept
    assert kept is not None and all(a is b for a, b in zip(kept, locked, strict=True))
    with monkeypatch.context() as patched:
        patched.setattr("megatron_rlvr.training.reference._on_device", lambda weights: [copy(w) for w in weights])
        assert reference.logprob(batch).equal(expected) and reference.logprob(batch).equal(expected)
    assert len(copies) == 3 * len(locked) and reference._kept is kept


@pytest.mark.parametrize("resident", ["host", "disk"])
def test_an_error_while_it_is_scored_leaves_the_policy_as_it_is(
    policy: Any, batch: RolloutBatch, other_model: Path, resident: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, reference = everything(policy), Reference(bridge(other_model), policy, resident)
    calls = []

    def fail(*_arguments: Any) -> None:
        calls.append(same(everything(policy), before))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(policy._head), "score", fail)
        with pytest.raises(KeyboardInterrupt):
            reference.logprob(batch)
    assert calls == [False, False] and same(everything(policy), before)


def test_an_error_while_it_is_loaded_leaves_the_policy_as_it_is(
    policy: Any, other_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(policy)
    with monkeypatch.context() as patched:
        patched.setattr("megatron_rlvr.weights.loading._check_finite", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Reference(bridge(other_model), policy, "host")
    assert same(everything(policy), before)


@pytest.mark.parametrize(("estimator", "weighted"), [("k3", True), ("k3", False), ("k2", False)])
def test_the_penalty_in_the_loss_has_the_exact_gradient(
    policy: Any, batch: RolloutBatch, other_model: Path, small_model: Path, estimator: Any, weighted: bool
) -> None:
    coefficient, exact = 0.7, transformers_model(small_model)
    algorithm = AlgorithmConfig(kl_coefficient=coefficient, kl_estimator=estimator, kl_importance_weight=weighted)
    scores, advantage = score_rollout(policy, Reference(bridge(other_model), policy, "host"), batch, algorithm)
    assert advantage.equal(group_advantages(batch.shaped_rewards, "grpo").flatten())
    objective = UpdateObjective(
        replace(build_objective("clip"), reference_kl=algorithm.reference_kl()), ClipThresholds()
    )
    weight = (1.0 / batch.response_lengths.sum()).expand(8).float()
    for _ in range(2):  # in the second one, the policy is another than that which was scored
        export = {name: tensor.clone() for name, tensor in policy.bridge.export(policy.model_chunks)}
        exact.load_state_dict(export, strict=False)
        report = policy.update(batch, torch.arange(8), advantage, weight, scores, objective)

    assert batch.reference_logprob is not None
    old, fixed = scores.logprob.double(), batch.reference_logprob.double()
    taken, token_advantage = exact_logprob(exact, batch), advantage.double()[batch.sequence_of_token()]
    ratio, gap = (taken - old).exp(), taken - fixed
    clipped = torch.minimum(ratio * token_advantage, ratio.clamp(0.8, 1.2) * token_advantage)
    estimate = gap**2 / 2 if estimator == "k2" else torch.exp(-gap) - 1 + gap
    loss = -(clipped - coefficient * estimate * (ratio if weighted else 1.0)).mean()
    loss.backward()
    assert float(report.sums[0]) == pytest.approx(loss.item(), rel=1e-5)
    assert (ratio - 1).abs().max() > 0.1
    [model] = policy.model_chunks
    for ours, theirs in (
        (model.embedding.word_embeddings.weight, exact.model.embed_tokens.weight),
        (model.decoder.layers[1].mlp.linear_fc2.weight, exact.model.layers[1].mlp.down_proj.weight),
    ):
        assert (ours.main_grad - theirs.grad).norm() < 2e-5 * theirs.grad.norm()


@pytest.mark.parametrize("method", ["grpo", "grpo-no-std", "rloo"])
def test_the_penalty_in_the_reward_is_that_of_the_whole_completion(
    policy: Any, batch: RolloutBatch, other_model: Path, method: Any
) -> None:
    algorithm = AlgorithmConfig(kl_coefficient=0.01, kl_in="reward", advantage=method)
    scores, advantage = score_rollout(policy, Reference(bridge(other_model), policy, "host"), batch, algorithm)
    assert batch.reference_logprob is not None
    gap = (scores.logprob - batch.reference_logprob).double()
    ends = batch.response_lengths.cumsum(0).tolist()
    divergence = torch.tensor([gap[end - n : end].sum() for end, n in zip(ends, batch.response_lengths, strict=True)])
    rewards = torch.tensor(REWARDS).float().view(2, 4)
    penalty = -0.01 * divergence.view(2, 4)
    if method == "grpo":  # the standard deviation is that of the rewards alone
        expected = (penalty - penalty.mean(1, keepdim=True)) + group_advantages(rewards, "grpo")
    else:
        expected = group_advantages(rewards + penalty, method)
    torch.testing.assert_close(advantage.view(2, 4), expected.float(), rtol=1e-4, atol=1e-6)
    assert (advantage[4:] != 0).all()
    # The scores are those of these advantages, bit for bit.
    again = policy.score(batch, advantage)
    assert scores.entropy_change.equal(again.entropy_change) and scores.ascent.equal(again.ascent)


def test_a_folder_that_changes_is_not_read_again(
    policy: Any, batch: RolloutBatch, other_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(other_model, tmp_path / "model"))
    on_disk, in_memory = (Reference(bridge(folder), policy, resident) for resident in ("disk", "host"))
    before = in_memory.logprob(batch)
    shutil.copy(Path(policy.bridge.path) / "model.safetensors", folder)
    with pytest.raises(UserError, match="has changed since this run started"):
        on_disk.logprob(batch)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has changed since this run started"):
        on_disk.logprob(batch)
    assert in_memory.logprob(batch).equal(before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope="),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05 instead of 1e-06"),
    ],
)
def test_another_architecture_is_refused(
    policy: Any, other_model: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = Path(shutil.copytree(other_model, tmp_path / "model"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError, match="cannot be the reference of") as error:
        Reference(bridge(folder), policy, "host")
    assert said in str(error.value) and "\n" not in str(error.value)
    wide = make_small_model(tmp_path / "wide", hidden=48)
    with pytest.raises(UserError, match="hidden_size=48 instead of 32"):
        Reference(bridge(wide), policy, "host")


def test_the_checksums_are_of_all_weights_and_the_configuration(policy: Any, other_model: Path) -> None:
    digests = Reference(bridge(other_model), policy, "disk").digests()
    assert list(digests) == ["config.json", "model.safetensors"] and all(len(d) == 64 for d in digests.values())


def test_the_penalty_needs_what_it_says() -> None:
    assert AlgorithmConfig().reference_kl() is None
    assert AlgorithmConfig(kl_coefficient=0.1).reference_kl() == ReferenceKL(0.1, None, "loss", True)
    with pytest.raises(UserError, match="kl_estimator=k1 in the loss"):
        AlgorithmConfig(kl_estimator="k1", kl_importance_weight=False).check()
