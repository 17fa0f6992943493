"""The configuration: one tree of dataclasses, read from YAML and ``key=value`` overrides.

Unknown keys, wrong types and impossible values are refused with one line that says what to write instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from megatron_rlvr.control import build_schedule
from megatron_rlvr.errors import UserError, mendable
from megatron_rlvr.objectives import build_objective


@dataclass
class ModelConfig:
    path: str = "???"
    """Folder of the Hugging Face model that training starts from (config.json, safetensors, tokenizer)."""
    dtype: str = "auto"
    """``float32`` or ``bfloat16``; ``auto`` is bfloat16 on a GPU and float32 on the CPU."""
    layer_spec: str = "auto"
    """``transformer_engine``, ``local``, or ``auto``: Transformer Engine on a GPU, local layers on the CPU."""
    router_aux_loss: float = 0.0
    """Coefficient of the load-balancing loss of a mixture of experts, averaged over microbatches; 0 leaves it out."""


@dataclass
class DataConfig:
    train: str = "???"
    """JSONL or parquet file of training problems."""
    heldout: str | None = None
    """File of held-out problems for evaluation; without it there is no evaluation."""
    prompt_key: str | None = None
    """Field of the prompt; by default recognised (prompt)."""
    answer_key: str | None = None
    """Field of the answer; by default recognised (answer, label, reward_model.ground_truth)."""
    stratify_key: str | None = None
    """Field of the training data with a number by which prompts are stratified: every step draws evenly from all of its
    range, so that reward, entropy and length of a step vary less with the mix of prompts. Alike prompts should have
    near numbers."""
    max_prompt_tokens: int = 1024
    """A longer prompt is refused before training starts."""


@dataclass
class VerifierConfig:
    name: str = "math"
    """``math``, ``exact``, ``countdown`` or ``module:function``."""
    workers: int = 0
    """Worker processes; 0 verifies in the training process, for verifiers that cannot hang."""
    timeout_seconds: float = 10.0
    """Time for one completion in a worker; a longer one is worth 0 and is counted."""
    memory_mb: int = 2048
    """Memory of one worker."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to the verifier by name."""


@dataclass
class SGLangConfig:
    urls: list[str] = field(default_factory=list)
    """Servers run elsewhere, ``http://host:port``; empty: the trainer starts `servers` of its own."""
    servers: int = 1
    """Servers that the trainer starts on the machine of its main process."""
    python: str | None = None
    """Python of the environment that SGLang is installed in; by default the trainer's own."""
    server: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``sglang.launch_server`` by name, such as ``tensor_parallel_size: 2``; true is a bare flag."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the servers, on top of the trainer's."""
    concurrency: int = 256
    """Completions that one data-parallel rank has under way at one server; those of one prompt travel together."""
    weight_sync: str = "auto"
    """``tensor``: through shared memory (CUDA IPC on a GPU), for servers on the main process's machine.
    ``distributed``: broadcasts in a process group with the servers (NCCL, gloo on the CPU).
    ``disk``: a Hugging Face folder in the run directory, which the servers must see under the same path.
    ``auto``: ``tensor`` for servers that the trainer starts, ``disk`` for `urls`."""
    bucket_mb: int = 256
    """Mebibytes of weights that ``tensor`` and ``distributed`` send at once."""
    recovery_copy: bool = True
    """Beside ``tensor`` and ``distributed``, write the weights to disk in the background, for servers that are lost and
    come back before the next update; without it they stay out until then."""
    interrupt: str = "retract"
    """What becomes of completions under way when weights change (`max_staleness` > 0): ``retract`` computes their cache
    anew under the new weights and goes on, ``in_place`` goes on with the old cache, ``finish`` lets them end before."""
    release_memory: bool = False
    """Servers on the trainer's GPUs give up their memory while the policy trains (set server.enable_memory_saver)."""
    check_weights: bool = False
    """After ``tensor`` and ``distributed``, compare checksums of the norms' weights (servers on the CPU)."""
    start_timeout_seconds: float = 900.0
    """Longest wait for a server to become ready, and for any server to come back when none is left."""
    request_timeout_seconds: float = 1800.0
    """Longest time for the completions of one prompt."""
    update_timeout_seconds: float = 600.0
    """Longest time for one server to load new weights."""
    health_timeout_seconds: float = 10.0
    """A server that does not answer a health check for this long is hung: its requests go to others."""
    attempts: int = 10
    """Servers that may die under one prompt before the run ends with an error."""
    when_all_lost: str = "stop"
    """No server left for `start_timeout_seconds`: ``stop`` with a checkpoint and status 75, or ``wait`` for one."""


@dataclass
class RolloutConfig:
    engine: str = "local"
    """``local`` generates with the training weights; ``sglang`` on SGLang servers; ``recorded`` replays `recording`."""
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    prompts_per_step: int = 64
    samples_per_prompt: int = 16
    max_tokens: int = 1024
    """Longest response, in tokens, end-of-sequence included."""
    temperature: float = 1.0
    """Divides the logits in sampling and in training alike."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    stop: list[str] = field(default_factory=list)
    """Texts, one token each, that end a completion beside the end of sequence."""
    dynamic_sampling: bool = False
    """Train on groups whose rewards differ only: the others are dropped and other prompts drawn instead (DAPO)."""
    over_sampling: float = 1.0
    """Prompts drawn for every group that dynamic sampling still needs; SGLang drops the surplus under way, which
    favours short responses."""
    refill_rounds: int = 3
    """Times that dynamic sampling draws again; what is missing then is filled with groups it would have dropped."""
    overlong_buffer: int = 0
    """Tokens before `max_tokens` over which a penalty grows to 1, for the advantages alone (DAPO); 0 is none."""
    max_staleness: int = 0
    """0 rolls out with the weights that train; n lets SGLang generate the rollouts of the next n steps meanwhile, whose
    tokens are at most n versions old."""
    mismatch_alarm: float = 0.1
    """KL(rollout || train), nats a token, above which a step is warned of; 0 never."""
    mismatch_patience: int = 3
    """So many such steps in a row end the run, with a checkpoint."""
    ignore_eos: bool = False
    """Generate `max_tokens` tokens whatever they are (for benchmarks)."""
    local_batch: int = 1024
    """Sequences that the local engine decodes together."""
    record: bool = False
    """Keep every step's completions in ``rollouts/`` of the run directory."""
    recording: str | None = None
    """Folder of recorded rollouts that the ``recorded`` engine replays."""


@dataclass
class AlgorithmConfig:
    advantage: str = "grpo"
    """``grpo``, ``grpo-no-std`` (Dr. GRPO) or ``rloo``."""
    aggregation: str = "token-mean"
    """``token-mean`` (DAPO), ``sequence-mean`` (GRPO) or ``constant`` (Dr. GRPO)."""
    objective: dict[str, Any] = field(default_factory=lambda: {"name": "clip"})
    """The token objective, by name, with its parameters."""
    schedule: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    """The schedule of clip thresholds, by name, with its parameters."""
    minibatches: int = 8
    """Optimizer steps that one pass over a rollout is split into."""
    epochs: int = 1
    """Passes over each rollout."""
    fused_linear: bool = False
    """Form logits a chunk at a time inside the loss instead of whole (the operators' fused head)."""
    drop_zero_advantage: bool = True
    """Leave sequences out of the update when their whole group earned the same reward: their gradient is zero."""


@dataclass
class OptimizerConfig:
    learning_rate: float = 1.0e-6
    warmup_steps: int = 0
    """Rollout steps over which the learning rate rises linearly."""
    min_learning_rate: float | None = None
    """Cosine decay to this value at the last step; None keeps the rate constant."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1.0e-8
    clip_grad: float = 1.0
    """Largest gradient norm."""
    cpu_offload: float = 0.0
    """Share of the optimizer's state that lies in the host's memory, where it is updated, too; on a GPU only."""


@dataclass
class ParallelConfig:
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Parts that every pipeline stage is cut into for the interleaved schedule, which has a smaller bubble."""
    context: int = 1
    """Ranks that share every sequence of a data-parallel rank."""
    expert: int = 1
    """Ranks that share the experts of a layer; out of the tensor, context and data ranks of a pipeline stage."""
    expert_tensor: int = 1
    """Ranks that share every expert."""
    sequence: bool = False
    """Sequence parallelism; needs tensor > 1."""
    distributed_optimizer: bool = False
    """Shard the optimizer state over data-parallel ranks."""
    microbatch_sequences: int = 0
    """Sequences in one forward pass of training, padded to one width; 0 takes the minibatch in one."""
    microbatch_tokens: int = 0
    """Tokens in one forward pass of training, its sequences packed without padding; 0 pads them instead."""
    recompute: str = "none"
    """What the backward pass computes again: ``none``, ``full`` layers, or ``selective``: `recompute_modules`."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """megatron-core's names: core_attn, mlp, layernorm, moe_act, moe; read under ``recompute: selective``."""
    timeout_minutes: float = 30.0
    """Longest wait in a collective before the job fails with an error that names it."""


@dataclass
class EvaluationConfig:
    every: int = 0
    """Steps between evaluations; 0 evaluates before the first step and after the last one only."""
    prompts: int = 200
    samples: int = 16
    """Completions a held-out prompt; pass@k is estimated for k = 1, 2, 4 ... up to this."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int | None = None
    """Longest response; as long as in training by default."""


@dataclass
class CheckpointConfig:
    every: int = 50
    """Steps between checkpoints; the last step is always saved. 0 saves at the end only."""
    keep: int = 2
    """Newest checkpoints that stay on disk."""
    keep_hours: float = 0.0
    """Of older ones, one for every so many hours stays, too; 0 keeps none."""
    keep_best: str | None = None
    """The checkpoint with the largest value of this metric stays, too: ``reward``, ``evaluation/pass@1`` ..."""
    asynchronous: bool = False
    """Go on training while a checkpoint is written, from a copy in the host's memory."""
    export_huggingface: bool = True
    """Write the final policy as a Hugging Face folder ``huggingface/``."""


@dataclass
class TelemetryConfig:
    tensorboard: bool = True
    wandb_project: str | None = None
    """Also log to this Weights & Biases project."""
    plots: bool = True
    """Draw ``plots/`` at the end of the run."""


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
        raise UserError(f"{path} is not valid YAML: {_one_line(error)}") from None
    for text in overrides:
        if "=" not in text:
            raise UserError(f"override {text!r} is not key=value: write for example optimizer.learning_rate=1e-6")
    for chosen in ("algorithm.schedule", "algorithm.objective"):
        if any(text.startswith(f"{chosen}.name=") for text in overrides):
            # Another schedule has other parameters: those in the file belong to the one that is replaced.
            OmegaConf.update(tree, chosen, {}, merge=False)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), tree, OmegaConf.from_dotlist(list(overrides)))
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise UserError(_unknown_key(error)) from None
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise UserError(
            f"configuration key {key}: {_one_line(error)}" if key else f"{path}: {_one_line(error)}"
        ) from None
    assert isinstance(config, Config)
    check(config)
    return config


def save_config(config: Config, path: Path, begun: bool = False) -> None:
    """Write the resolved configuration as YAML that `load_config` reads back; over that of a run which has `begun`
    only if `check_same_run` lets it."""
    if begun and path.is_file():
        check_same_run(config, path)
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


# What makes a run the run it is. The rest (more steps, another layout, other telemetry) may change on the way.
_IDENTITY = ("seed", "data", "verifier", "rollout", "algorithm", "optimizer")
_MAY_CHANGE = ("rollout.record", "rollout.recording", "rollout.engine", "rollout.local_batch", "rollout.sglang")


def check_same_run(config: Config, path: Path) -> None:
    """Refuse to resume a run under settings that would make it another one.

    Args:
        config: of now.
        path: the resolved configuration that the run began with.

    Raises:
        UserError: naming the first setting that differs.
    """
    then = OmegaConf.to_container(OmegaConf.load(path))
    now = OmegaConf.to_container(OmegaConf.structured(config))
    for key, old, new in _differences(then, now):
        if key.split(".")[0] in _IDENTITY and not key.startswith(_MAY_CHANGE):
            raise UserError(
                f"{path.parent} holds a run with {key}={old}, this one has {new}: "
                "choose another run_directory, or set it back"
            )


def _differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new


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
    }
    for key, number in positive.items():
        if not number > 0:
            raise UserError(f"{key} must be greater than 0, not {number}")
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
    if config.model.router_aux_loss < 0:
        raise UserError(f"model.router_aux_loss must not be negative, found {config.model.router_aux_loss}")
    if (config.checkpoint.keep_best or "").startswith("evaluation/") and not config.data.heldout:
        raise UserError(f"checkpoint.keep_best={config.checkpoint.keep_best} needs data.heldout: set it")
    if config.checkpoint.keep_hours < 0:
        raise UserError(f"checkpoint.keep_hours must not be negative, found {config.checkpoint.keep_hours}")
    if not 0 <= config.optimizer.cpu_offload <= 1:
        raise UserError(f"optimizer.cpu_offload must lie in [0, 1], not {config.optimizer.cpu_offload}")
    if config.optimizer.cpu_offload and not parallel.distributed_optimizer:
        raise UserError("optimizer.cpu_offload needs parallel.distributed_optimizer=true: set it, or offload nothing")
    with mendable():
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
    for key, number in {
        "refill_rounds": rollout.refill_rounds,
        "max_staleness": rollout.max_staleness,
        "mismatch_alarm": rollout.mismatch_alarm,
    }.items():
        if number < 0:
            raise UserError(f"rollout.{key} must not be negative, but is {number}")
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


def _one_of(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{key} must be one of {', '.join(choices)}, not {value!r}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())


def _unknown_key(error: ConfigKeyError) -> str:
    import dataclasses
    import difflib

    full = str(error.full_key or error.key)
    *path, last = full.split(".")
    node: Any = Config()
    for part in path:
        node = getattr(node, part)
    known = [f.name for f in dataclasses.fields(node)]
    close = difflib.get_close_matches(last, known, n=1)
    hint = f"did you mean {'.'.join([*path, close[0]])}?" if close else f"known keys: {', '.join(known)}"
    return f"unknown configuration key {full}: {hint}"
