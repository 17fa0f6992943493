"""The configuration: one tree of dataclasses. config_file.py reads it, config_checks.py refuses what cannot be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    path: str = "???"
    """Folder of the Hugging Face model that training starts from (config.json, safetensors, tokenizer)."""
    dtype: str = "auto"
    """``float32`` or ``bfloat16``; ``auto`` is bfloat16 on a GPU and float32 on the CPU."""
    layer_spec: str = "auto"
    """``transformer_engine``, ``local``, or ``auto``: Transformer Engine on a GPU, local layers on the CPU."""
    fp8: str = "none"
    """``hybrid`` (e4m3 forward, e5m2 backward) or ``e4m3``: matrices multiply in fp8, by Transformer Engine; weights
    stay bfloat16. Handed on and never run here, for want of a GPU."""
    fp8_recipe: str = "delayed"
    """How scales are found: ``delayed``, ``tensorwise``, ``mxfp8`` or ``blockwise``, by GPU and Transformer Engine."""
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
    workers: int | None = None
    """Worker processes of each data-parallel rank; 0 verifies in the training process, for verifiers that cannot hang.
    By default 0 for ``countdown`` and ``exact``, which cannot, and 4 for the others."""
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
