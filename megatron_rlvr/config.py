"""The configuration of a run: one section from each package, read from YAML and ``key=value`` overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from glob import has_magic
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_rlvr.atomic_write import write_text
from megatron_rlvr.checked_input import one_line
from megatron_rlvr.checked_yaml import read_yaml
from megatron_rlvr.config_reader import merge, read
from megatron_rlvr.config_schema import REQUIRED, Bounds, PositiveInt, check_values, to_dict
from megatron_rlvr.config_yaml import read_document, read_overrides, type_of
from megatron_rlvr.control import ClipSchedule, build_schedule
from megatron_rlvr.control.build import has_end
from megatron_rlvr.data.config import DataConfig, is_gym
from megatron_rlvr.errors import UserError, as_user_error
from megatron_rlvr.megatron.config import LoRAConfig, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rlvr.node import node_name
from megatron_rlvr.objectives import build_objective
from megatron_rlvr.rollout.config import EvaluationConfig, RolloutConfig
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.registry import read_registry
from megatron_rlvr.telemetry.config import TelemetryConfig
from megatron_rlvr.training.config import AlgorithmConfig, CheckpointConfig, ReferenceConfig, ResumeConfig
from megatron_rlvr.verifiers.config import DEFAULT_WORKERS, NEED_NO_WORKERS, VerifierConfig


@dataclass
class Config:
    """The configuration of a run."""

    name: str = "run"
    """Name of the run in plots and tables; Weights & Biases calls it the run's display name."""
    seed: Annotated[int, Bounds(at_least=0, below=2**63)] = 0
    """Seed of everything that is drawn at random. A run with the same seed draws the same prompts and samples."""
    steps: PositiveInt = 100
    """Steps of the run: each is one rollout and the updates on it."""
    run_directory: str = REQUIRED
    """Folder that the run writes to. Starting it again with the same folder resumes from its newest checkpoint."""
    threads: Annotated[int, Bounds(at_least=0, cap=1024)] = 0
    """CPU threads per process; 0 leaves the choice to torch."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    def schedule(self) -> ClipSchedule:
        """Build the schedule of clip thresholds for a run of `steps` steps.

        Raises:
            ValueError: if a parameter of the schedule is impossible.
        """
        return build_schedule(self.algorithm.schedule, self.steps)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key=value`` overrides and check every value. `resolve` replaces ``auto`` later.

    Raises:
        UserError: one line that names the file or override, what was found, and what to write instead.
    """
    tree = read_config_file(path)
    merged = merge(to_dict(Config()), OmegaConf.to_container(tree))
    for section in ("schedule", "objective"):
        if any(text.startswith(f"algorithm.{section}.name=") for text in overrides):
            # The parameters in the file belong to the schedule or objective that is replaced.
            merged = merge(merged, {"algorithm": {section: None}})
    for key in (text.partition("=")[0] for text in overrides):
        if type_of(key, Config).type is dict:  # an override of a whole mapping replaces it
            emptied = OmegaConf.create({})
            OmegaConf.update(emptied, key, None)
            merged = merge(merged, OmegaConf.to_container(emptied))
    try:
        merged = merge(merged, OmegaConf.to_container(read_overrides(overrides, Config)))
        values: Any = OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
    except OmegaConfBaseException as error:
        place = f"configuration key {error.full_key}" if error.full_key else str(path)
        raise UserError(f"{place}: {one_line(error)}") from None
    config = read(Config, values)
    check(config)
    return config


def read_config_file(path: str | Path) -> Any:
    """Read the keys and values of a configuration file, with ``${...}`` as it stands.

    Raises:
        UserError: if the file does not exist, is too large, is not YAML, or does not hold keys and values.
    """
    return read_yaml(path, parse=lambda text: read_document(text, Config))


def save_config(config: Config, path: Path) -> None:
    """Write the configuration as YAML that `load_config` reads back, with ``auto`` as the user wrote it."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))


def resolve(config: Config, on_gpu: bool) -> Config:
    """Replace every ``auto``, and a null that stands for a value, by that value; returns the new configuration.

    A program calls this once, before it builds anything. A run's config.yaml keeps ``auto``, so that a run on GPUs can
    be evaluated on a CPU.

    Args:
        on_gpu: whether the training processes compute on GPUs.
    """
    model, verifier, rollout, parallel = config.model, config.verifier, config.rollout, config.parallel
    if not parallel.width_step:
        parallel = replace(parallel, width_step=128 if on_gpu else 1)
    if model.dtype == "auto":
        model = replace(model, dtype="bfloat16" if on_gpu else "float32")
    if model.layer_spec == "auto":
        model = replace(model, layer_spec="transformer_engine" if on_gpu else "local")
    if verifier.name == "auto":
        paths = [*(source.path for source in config.data.sources()), config.data.heldout or ""]
        verifier = replace(verifier, name="reasoning_gym" if any(map(is_gym, paths)) else "math")
    if verifier.workers is None:
        verifier = replace(verifier, workers=0 if verifier.name in NEED_NO_WORKERS else DEFAULT_WORKERS)
    sglang = rollout.sglang
    if sglang.weight_sync == "auto":
        sglang = replace(sglang, weight_sync=_weight_sync(sglang))
    if sglang.bucket_mb is None:
        sglang = replace(sglang, bucket_mb=1024 if on_gpu else 256)
    rollout = replace(rollout, sglang=sglang)
    if rollout.mismatch_alarm is None:
        rollout = replace(rollout, mismatch_alarm=1e-4 if model.dtype == "float32" else 0.01)
    return replace(config, model=model, verifier=verifier, rollout=rollout, parallel=parallel)


def _weight_sync(sglang: SGLangConfig) -> Literal["disk", "tensor", "distributed"]:
    """Return how servers receive weights. All nodes come to the same result: each of them has a server, or none has."""
    if not sglang.urls:
        return "tensor"
    if sglang.registry is None:
        return "disk"
    nodes = {place.node for place in read_registry(Path(sglang.registry))}
    return "tensor" if node_name() in nodes else "distributed"


def check(config: Config) -> None:
    """Refuse values and combinations that cannot work.

    Raises:
        UserError: for the first of them.
    """
    check_values(config)
    algorithm, data, rollout, parallel = config.algorithm, config.data, config.rollout, config.parallel
    if rollout.prompts_per_step % algorithm.minibatches:
        raise UserError(
            f"algorithm.minibatches={algorithm.minibatches} does not divide rollout.prompts_per_step="
            f"{rollout.prompts_per_step}: choose a divisor"
        )
    if rollout.dynamic_sampling and data.stratify_key is not None:
        raise UserError(
            "rollout.dynamic_sampling would replace prompts that data.stratify_key chose: set only one of them"
        )
    best = config.checkpoint.keep_best or ""
    if best.startswith("evaluation/") and not data.heldout:
        raise UserError(f"checkpoint.keep_best={best} needs data.heldout: set it")
    if best.startswith("evaluation/") and best not in config.evaluation.metrics:
        raise UserError(
            f"checkpoint.keep_best={best} is not a metric of evaluations with evaluation.samples="
            f"{config.evaluation.samples}: use one of {', '.join(config.evaluation.metrics)}"
        )
    if config.lora.rank and config.model.fp8 != "none":
        raise UserError(
            f"lora.rank={config.lora.rank} with model.fp8={config.model.fp8} is not supported: set fp8=none"
        )
    if config.optimizer.cpu_offload and not parallel.distributed_optimizer:
        raise UserError("optimizer.cpu_offload needs parallel.distributed_optimizer=true: set it, or offload nothing")
    if rollout.engine == "sglang":
        for key, path in (("run_directory", config.run_directory), ("model.path", config.model.path)):
            if has_magic(str(Path(path).absolute())):
                raise UserError(
                    f"{key}={path}: the path contains one of * ? [, which keeps SGLang from finding weights: rename it"
                )
    with as_user_error():
        config.schedule()
    longest = data.max_prompt_tokens + rollout.max_tokens
    if parallel.microbatch_tokens and parallel.microbatch_tokens < longest:
        raise UserError(
            f"parallel.microbatch_tokens={parallel.microbatch_tokens} is less than data.max_prompt_tokens + "
            f"rollout.max_tokens = {longest}: set it to at least {longest}, so that every sequence fits, or to 0"
        )


def warnings_of(config: Config) -> list[str]:
    """Return one line for each setting that is allowed but probably not intended."""
    warnings = []
    algorithm, stale = config.algorithm, config.rollout.max_staleness
    if algorithm.minibatches * algorithm.epochs == 1 and not (algorithm.old_policy == "rollout" and stale):
        ratio = "1" if algorithm.old_policy == "recomputed" else "1 but for rounding in the engine"
        warnings.append(
            "algorithm.minibatches x algorithm.epochs = 1: with one update per rollout the importance ratio is "
            f"{ratio} and every clip threshold is inert; raise one of the two to let a schedule act"
            + ("; until then only algorithm.objective.importance bounds what stale tokens do" if stale else "")
        )
    if algorithm.old_policy == "rollout" and stale:
        warnings.append(
            f"algorithm.old_policy=rollout with rollout.max_staleness={stale}: the importance ratio starts from "
            "weights up to that many steps old, so that clip thresholds bound staleness instead of updates; use "
            "algorithm.old_policy=recomputed with algorithm.objective.importance=decoupled"
        )
    warnings += [
        f"data.reasoning_gym.options.{task} has no effect: data has no source reasoning_gym:{task}"
        for task in config.data.unused_options()
    ]
    objective, aggregation = config.algorithm.objective.name, config.algorithm.aggregation
    if objective == "gspo" and aggregation != "sequence-mean":
        warnings.append(
            f"algorithm.objective.name=gspo with algorithm.aggregation={aggregation}: GSPO gives every sequence the "
            "same weight, but this aggregation weighs a sequence by its length; set algorithm.aggregation=sequence-mean"
        )
    if config.algorithm.kl_in == "reward" and config.algorithm.kl_estimator in ("k2", "k3"):
        estimator = config.algorithm.kl_estimator
        warnings.append(
            f"algorithm.kl_estimator={estimator} in the reward: its gradient is that of no divergence; set "
            "algorithm.kl_estimator=k1, or algorithm.kl_in=loss"
        )
    if config.reference.path is not None and not config.algorithm.kl_coefficient:
        warnings.append("reference.path has no effect with algorithm.kl_coefficient=0: set the coefficient")
    best = config.checkpoint.keep_best or ""
    if best.startswith("evaluation/") and not config.evaluation.every:
        warnings.append(
            f"checkpoint.keep_best={best} with evaluation.every=0: the policy is evaluated only before the first step "
            "and after the last, so no checkpoint in between is compared; set evaluation.every"
        )
    total = config.algorithm.schedule.total_steps
    if total is not None and total < config.steps and has_end(config.algorithm.schedule.name):
        warnings.append(
            f"algorithm.schedule.total_steps={total} is less than steps={config.steps}: from step {total} on the "
            f"schedule stays at its end; to stretch it, add algorithm.schedule.total_steps={config.steps} "
            f"resume.allow=[{','.join([*config.resume.allow, 'algorithm.schedule.total_steps'])}]"
        )
    corrections = build_objective(algorithm.objective).importance
    if corrections is not None and corrections.weighing > 1:
        warnings.append(
            f"algorithm.objective.importance={algorithm.objective.importance}: {corrections.weighing} of the "
            "corrections weigh every token by pi / pi_rollout, so that its weight is a power of the ratio; keep one of "
            "them, and add only corrections that leave tokens out (geometric, k3, opsm)"
        )
    if stale and corrections is None and algorithm.old_policy == "recomputed":
        warnings.append(
            f"rollout.max_staleness={stale} without algorithm.objective.importance: tokens of "
            "older weights count as if the current weights had sampled them; set it, for example to decoupled or tis"
        )
    return warnings
