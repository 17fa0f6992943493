"""The configuration: one section from each package."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_rlvr.config_schema import check_shape, one_line, refusal
from megatron_rlvr.control import build_schedule
from megatron_rlvr.data.config import DataConfig
from megatron_rlvr.errors import UserError, as_user_error
from megatron_rlvr.megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rlvr.objectives import build_objective
from megatron_rlvr.resume import check_same_run
from megatron_rlvr.rollout.config import EvaluationConfig, RolloutConfig
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.telemetry.config import TelemetryConfig
from megatron_rlvr.training.config import AlgorithmConfig, CheckpointConfig
from megatron_rlvr.verifiers.config import VerifierConfig


@dataclass
class Config:
    name: str = "run"
    seed: int = 0
    steps: int = 100
    run_directory: str = "???"
    threads: int = 0
    """CPU threads a process; 0 leaves torch's choice."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides, check every value.

    Raises:
        UserError: one line that names the file or override, what was found, and what to write instead.
    """
    try:
        tree = OmegaConf.load(Path(path))
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}: give the path of a YAML file as the first argument") from None
    except Exception as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not OmegaConf.is_dict(tree):
        raise UserError(f"{path} holds a list: write keys and values, such as steps: 100")
    for chosen in ("algorithm.schedule", "algorithm.objective"):
        if any(text.startswith(f"{chosen}.name=") for text in overrides):
            # Another schedule has other parameters: those in the file belong to the one that is replaced.
            OmegaConf.update(tree, chosen, {}, merge=False)
    given = _overrides(overrides)
    try:
        for part in (tree, given):
            check_shape(OmegaConf.to_container(part), Config, Config)
        merged = OmegaConf.merge(OmegaConf.structured(Config), tree, given)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(refusal(error, Config, str(path), tree, given)) from None
    assert isinstance(config, Config)
    check(config)
    return config


def _overrides(texts: Sequence[str]) -> Any:
    for text in texts:
        try:
            if text.find("=") < 1:
                raise UserError(f"override {text!r} is not key=value: write for example optimizer.learning_rate=1e-6")
            OmegaConf.from_dotlist([text])
        except (OmegaConfBaseException, YAMLError) as error:
            raise UserError(f"override {text!r}: its value is not valid YAML: {one_line(error)}") from None
    return OmegaConf.from_dotlist(list(texts))


def save_config(config: Config, path: Path, begun: bool = False) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back; over that of a run which has `begun`
    only if `check_same_run` lets it."""
    if begun and path.is_file():
        check_same_run(config, path)
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def check(config: Config) -> None:
    """Refuse values and combinations that cannot work.

    Raises:
        UserError: for the first that is wrong.
    """
    for key in ("model.path", "data.train", "run_directory"):
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if value in (None, "", "???"):
            raise UserError(
                f"{key} is not set: write it in the configuration file or give {key}=... on the command line"
            )
    rollout, algorithm, parallel = config.rollout, config.algorithm, config.parallel
    _one_of("model.dtype", config.model.dtype, ("auto", "float32", "bfloat16"))
    _one_of("model.layer_spec", config.model.layer_spec, ("auto", "local", "transformer_engine"))
    _one_of("model.fp8", config.model.fp8, ("none", "hybrid", "e4m3"))
    _one_of("model.fp8_recipe", config.model.fp8_recipe, ("delayed", "tensorwise", "mxfp8", "blockwise"))
    if config.model.fp8 != "none" and config.model.dtype == "float32":
        raise UserError(f"model.fp8={config.model.fp8} needs model.dtype=bfloat16: set it, or model.fp8=none")
    _one_of("rollout.engine", rollout.engine, ("local", "sglang", "recorded"))
    _one_of("algorithm.advantage", algorithm.advantage, ("grpo", "grpo-no-std", "rloo"))
    _one_of("algorithm.aggregation", algorithm.aggregation, ("token-mean", "sequence-mean", "constant"))
    _one_of("rollout.sglang.weight_sync", rollout.sglang.weight_sync, ("auto", "disk", "tensor", "distributed"))
    _one_of("rollout.sglang.interrupt", rollout.sglang.interrupt, ("retract", "in_place", "finish"))
    _one_of("rollout.sglang.when_all_lost", rollout.sglang.when_all_lost, ("stop", "wait"))
    positive = {
        "steps": config.steps,
        "rollout.prompts_per_step": rollout.prompts_per_step,
        "rollout.max_tokens": rollout.max_tokens,
        "rollout.temperature": rollout.temperature,
        "rollout.local_batch": rollout.local_batch,
        "rollout.mismatch_patience": rollout.mismatch_patience,
        "rollout.sglang.servers": rollout.sglang.servers,
        "rollout.sglang.concurrency": rollout.sglang.concurrency,
        "rollout.sglang.start_timeout_seconds": rollout.sglang.start_timeout_seconds,
        "rollout.sglang.request_timeout_seconds": rollout.sglang.request_timeout_seconds,
        "rollout.sglang.update_timeout_seconds": rollout.sglang.update_timeout_seconds,
        "rollout.sglang.health_timeout_seconds": rollout.sglang.health_timeout_seconds,
        "rollout.sglang.bucket_mb": rollout.sglang.bucket_mb,
        "rollout.sglang.attempts": rollout.sglang.attempts,
        "algorithm.minibatches": algorithm.minibatches,
        "algorithm.epochs": algorithm.epochs,
        "optimizer.learning_rate": config.optimizer.learning_rate,
        "optimizer.clip_grad": config.optimizer.clip_grad,
        "parallel.tensor": parallel.tensor,
        "parallel.pipeline": parallel.pipeline,
        "parallel.context": parallel.context,
        "parallel.virtual_pipeline": parallel.virtual_pipeline,
        "parallel.expert": parallel.expert,
        "parallel.expert_tensor": parallel.expert_tensor,
        "evaluation.prompts": config.evaluation.prompts,
        "evaluation.samples": config.evaluation.samples,
        "evaluation.temperature": config.evaluation.temperature,
        "checkpoint.keep": config.checkpoint.keep,
        "verifier.timeout_seconds": config.verifier.timeout_seconds,
        "verifier.memory_mb": config.verifier.memory_mb,
        "parallel.timeout_minutes": parallel.timeout_minutes,
    }
    for key, number in positive.items():
        if not number > 0:
            raise UserError(f"{key} must be greater than 0, not {number}")
        _finite(key, number)
    _check_not_negative(config)
    for key, number in {"beta1": config.optimizer.beta1, "beta2": config.optimizer.beta2}.items():
        if not 0 <= number < 1:
            raise UserError(f"optimizer.{key} must lie in [0, 1), not {number}")
    if rollout.samples_per_prompt < 2:
        raise UserError(
            f"rollout.samples_per_prompt must be at least 2, not {rollout.samples_per_prompt}: "
            "advantages compare the samples of one prompt"
        )
    if not 0 < rollout.top_p <= 1:
        raise UserError(f"rollout.top_p must lie in (0, 1], not {rollout.top_p}")
    if rollout.prompts_per_step % algorithm.minibatches:
        raise UserError(
            f"algorithm.minibatches={algorithm.minibatches} does not divide rollout.prompts_per_step="
            f"{rollout.prompts_per_step}: choose a divisor"
        )
    if rollout.engine == "recorded" and not rollout.recording:
        raise UserError(
            "rollout.engine=recorded needs rollout.recording: the rollouts/ folder of a run with rollout.record=true"
        )
    if config.rollout.dynamic_sampling and config.data.stratify_key is not None:
        raise UserError("rollout.dynamic_sampling replaces prompts that data.stratify_key has spread: set only one")
    _check_sampling(rollout, config.evaluation)
    _check_sglang(rollout.sglang)
    if parallel.sequence and parallel.tensor == 1:
        raise UserError("parallel.sequence=true needs parallel.tensor > 1: set it false or raise parallel.tensor")
    _one_of("parallel.recompute", parallel.recompute, ("none", "selective", "full"))
    for module in parallel.recompute_modules:
        _one_of("parallel.recompute_modules", module, ("core_attn", "mlp", "layernorm", "moe_act", "moe"))
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise UserError(
            "parallel.virtual_pipeline > 1 needs parallel.pipeline > 1: it interleaves the parts of pipeline stages"
        )
    if parallel.expert_tensor not in (1, parallel.tensor):
        raise UserError(
            f"parallel.expert_tensor={parallel.expert_tensor} must be 1 or parallel.tensor={parallel.tensor}"
        )
    if (config.checkpoint.keep_best or "").startswith("evaluation/") and not config.data.heldout:
        raise UserError(f"checkpoint.keep_best={config.checkpoint.keep_best} needs data.heldout: set it")
    if not 0 <= config.optimizer.cpu_offload <= 1:
        raise UserError(f"optimizer.cpu_offload must lie in [0, 1], not {config.optimizer.cpu_offload}")
    if config.optimizer.cpu_offload and not parallel.distributed_optimizer:
        raise UserError("optimizer.cpu_offload needs parallel.distributed_optimizer=true: set it, or offload nothing")
    with as_user_error():
        build_schedule(algorithm.schedule, config.steps)
        build_objective(**algorithm.objective)
    longest = config.data.max_prompt_tokens + rollout.max_tokens
    if parallel.microbatch_tokens and parallel.microbatch_sequences:
        raise UserError(
            "parallel.microbatch_tokens packs sequences, parallel.microbatch_sequences pads them: set one of the two"
        )
    if parallel.microbatch_tokens and parallel.microbatch_tokens < longest:
        raise UserError(
            f"parallel.microbatch_tokens={parallel.microbatch_tokens} is less than data.max_prompt_tokens + "
            f"rollout.max_tokens = {longest}: a sequence of that length must fit into a microbatch"
        )


def _check_not_negative(config: Config) -> None:
    rollout, parallel = config.rollout, config.parallel
    for key, number in {
        "seed": config.seed,
        "threads": config.threads,
        "model.router_aux_loss": config.model.router_aux_loss,
        "verifier.workers": config.verifier.workers or 0,
        "rollout.top_k": rollout.top_k,
        "rollout.refill_rounds": rollout.refill_rounds,
        "rollout.max_staleness": rollout.max_staleness,
        "rollout.mismatch_alarm": rollout.mismatch_alarm,
        "optimizer.warmup_steps": config.optimizer.warmup_steps,
        "optimizer.min_learning_rate": config.optimizer.min_learning_rate or 0.0,
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "optimizer.epsilon": config.optimizer.epsilon,
        "parallel.microbatch_sequences": parallel.microbatch_sequences,
        "parallel.microbatch_tokens": parallel.microbatch_tokens,
        "evaluation.every": config.evaluation.every,
        "evaluation.top_k": config.evaluation.top_k,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep_hours": config.checkpoint.keep_hours,
    }.items():
        if not number >= 0:
            raise UserError(f"{key} must not be negative, found {number}")
        _finite(key, number)
    if config.seed >= 2**63:
        raise UserError(f"seed must be less than 2**63, not {config.seed}")


def _check_sampling(rollout: RolloutConfig, evaluation: EvaluationConfig) -> None:
    if not 0 < evaluation.top_p <= 1:
        raise UserError(f"evaluation.top_p must lie in (0, 1], not {evaluation.top_p}")
    if evaluation.max_tokens is not None and evaluation.max_tokens < 1:
        raise UserError(f"evaluation.max_tokens must be greater than 0, not {evaluation.max_tokens}")
    if not 0 <= rollout.overlong_buffer < rollout.max_tokens:
        raise UserError(
            f"rollout.overlong_buffer={rollout.overlong_buffer} must be less than rollout.max_tokens="
            f"{rollout.max_tokens}"
        )
    if rollout.over_sampling < 1:
        raise UserError(f"rollout.over_sampling must be at least 1, not {rollout.over_sampling}")
    if rollout.engine == "recorded" and rollout.dynamic_sampling:
        raise UserError("rollout.engine=recorded replays groups that were chosen before: set dynamic_sampling=false")
    if rollout.engine != "sglang" and rollout.max_staleness:
        raise UserError(
            f"rollout.max_staleness={rollout.max_staleness} needs rollout.engine=sglang: the {rollout.engine} engine "
            "generates in the processes that train"
        )
    if rollout.max_staleness and rollout.sglang.release_memory:
        raise UserError(
            "rollout.sglang.release_memory=true needs rollout.max_staleness=0: servers must not generate then"
        )


def _check_sglang(sglang: SGLangConfig) -> None:
    for url in sglang.urls:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"rollout.sglang.urls: {url!r} is no URL: write http://host:port")
    ours = {"model_path", "port", "weight_version", "skip_tokenizer_init", "model"}
    for name in sglang.server:
        if name.replace("-", "_") in ours:
            raise UserError(f"rollout.sglang.server.{name} is set by the trainer itself: leave it out")


def warnings_of(config: Config) -> list[str]:
    """What is allowed but probably not meant, one line each."""
    found = []
    if config.algorithm.minibatches * config.algorithm.epochs == 1:
        found.append(
            "algorithm.minibatches x algorithm.epochs = 1: with one update per rollout the importance ratio is 1 and "
            "every clip threshold is inert; raise one of the two to let a schedule act"
        )
    if config.rollout.max_staleness and not config.algorithm.objective.get("importance_cap"):
        found.append(
            f"rollout.max_staleness={config.rollout.max_staleness} without algorithm.objective.importance_cap: tokens "
            "of older weights count as if the present ones had drawn them; set it, for example to 2.0"
        )
    return found


def _finite(key: str, number: float) -> None:
    # Two limits that infinity lifts.
    if math.isinf(number) and key not in ("optimizer.clip_grad", "rollout.mismatch_alarm"):
        raise UserError(f"{key} must be a finite number, not {number}")


def _one_of(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{key} must be one of {', '.join(choices)}, not {value!r}")
