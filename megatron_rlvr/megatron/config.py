"""The sections ``model``, ``optimizer`` and ``parallel`` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_rlvr.config_schema import (
    REQUIRED,
    Bounds,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
)
from megatron_rlvr.errors import UserError

Beta = Annotated[float, Bounds(at_least=0, below=1)]
LearningRate = Annotated[float, Bounds(above=0, cap=1e3)]
Ranks = Annotated[int, Bounds(above=0, cap=2**16)]


@dataclass
class ModelConfig:
    """The trained policy: its weights, number format and layers."""

    path: str = REQUIRED
    """Hugging Face folder that training starts from: config.json, safetensors and tokenizer."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of weights and activations; ``auto`` means bfloat16 on a GPU and float32 on a CPU."""
    layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Implementation of the layers: megatron-core's ``local`` layers or those of ``transformer_engine``; ``auto`` means
    transformer_engine on a GPU and local on a CPU."""
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    """fp8 format of matrix multiplications in Transformer Engine: ``e4m3``, or ``hybrid`` for e4m3 in the forward and
    e5m2 in the backward pass. Weights stay bfloat16. Untested, because it needs a GPU that computes in fp8."""
    fp8_recipe: Literal["delayed", "tensorwise", "mxfp8", "blockwise"] = "delayed"
    """How fp8 scaling factors are computed; which recipes work depends on the GPU and on Transformer Engine."""
    router_aux_loss: NonNegativeFloat = 0.0
    """Coefficient of the load-balancing loss of a mixture of experts, averaged over microbatches; 0 disables it."""

    batch_invariant: bool = False
    """Compute a token's log-prob with the same bits whatever else is in its batch, in blocks of fixed shapes, on the
    CPU. The log-probs of the local engine, of the scoring pass and of the first update are then equal bit for bit.
    Slower."""

    def check(self) -> None:
        """Refuse combinations of keys that cannot work."""
        if self.fp8 != "none" and self.dtype == "float32":
            raise UserError(f"model.fp8={self.fp8} needs model.dtype=bfloat16: set it, or model.fp8=none")


ALL_LINEAR = "all-linear"
"""Stands for every module that can have an adapter, as in PEFT."""


@dataclass
class LoRAConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685), which are trained in place of the weights of the model.

    An adapter adds ``alpha / rank * B A x`` to the output of a linear layer. There is no dropout.
    """

    rank: Annotated[int, Bounds(at_least=0, cap=4096)] = 0
    """Rank of every adapter: rows of A and columns of B. 0 trains all weights of the model and no adapters."""
    alpha: Annotated[float, Bounds(above=0, cap=1e6)] = 32.0
    """Numerator of the factor of the adapters, ``alpha / rank``."""
    target_modules: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    """Modules with an adapter, by the last part of their Hugging Face name: of most models, q_proj, k_proj, v_proj,
    o_proj, gate_proj, up_proj and down_proj, also those of experts. ``[all-linear]`` means all of them."""

    def check(self) -> None:
        """Refuse a list that names nothing, or something twice."""
        if not self.target_modules:
            raise UserError("lora.target_modules=[] leaves nothing to train: name modules, or write [all-linear]")
        if twice := [name for name in self.target_modules if self.target_modules.count(name) > 1]:
            raise UserError(f"lora.target_modules names {twice[0]} twice: name every module once")
        if ALL_LINEAR in self.target_modules and len(self.target_modules) > 1:
            raise UserError("lora.target_modules: all-linear includes every other module: write it alone")


@dataclass
class OptimizerConfig:
    """Adam and its learning-rate schedule."""

    learning_rate: LearningRate = 1.0e-6
    """Peak learning rate."""
    warmup_steps: NonNegativeInt = 0
    """Steps of the run over which the learning rate rises linearly to its peak."""
    min_learning_rate: Annotated[float, Bounds(at_least=0, cap=1e3)] | None = None
    """Learning rate at the end of a cosine decay; null keeps the rate constant after warm-up."""
    decay_steps: PositiveInt | None = None
    """Steps of the decay to `min_learning_rate`; later steps keep that rate. Null means the ``steps`` that the run is
    first started with."""
    weight_decay: Annotated[float, Bounds(at_least=0, cap=1e3)] = 0.0
    """Decoupled weight decay (AdamW) of matrices; norms and biases do not decay."""
    beta1: Beta = 0.9
    """Decay rate of the first moment."""
    beta2: Beta = 0.95
    """Decay rate of the second moment."""
    epsilon: Annotated[float, Bounds(at_least=0, cap=1)] = 1.0e-8
    """Added to the square root of the second moment."""
    clip_grad: Annotated[float, Bounds(above=0, cap=1e20, infinite=True)] = 1.0
    """Largest norm of the gradient; larger gradients are scaled down to it. ``inf`` disables clipping."""
    nonfinite_patience: PositiveInt = 5
    """Updates in a row with a loss or a gradient that is not finite after which the run stops, with a checkpoint of the
    weights before them. Until then, each such update is skipped and counted; 1 stops at the first."""
    cpu_offload: Fraction = 0.0
    """Fraction of the optimizer state that is stored and updated in host memory; a value above 0 needs a GPU."""


@dataclass
class ParallelConfig:
    """How the model, its sequences and its memory are divided over the processes of a job."""

    tensor: Ranks = 1
    """Tensor-parallel size: ranks that every matrix of the model is split over."""
    pipeline: Ranks = 1
    """Pipeline-parallel size: stages that the layers are divided into."""
    virtual_pipeline: Ranks = 1
    """Model chunks per pipeline stage; more than 1 selects the interleaved schedule, which has a smaller bubble."""
    last_stage_layers: NonNegativeInt = 0
    """Layers of the last pipeline stage; the others share the rest equally. 0 gives every stage the same number."""
    context: Ranks = 1
    """Context-parallel size: ranks that every sequence is split over."""
    expert: Ranks = 1
    """Expert-parallel size: ranks that the experts of a layer are distributed over. They are taken from the tensor,
    context and data ranks of a pipeline stage."""
    expert_tensor: Ranks = 1
    """Ranks that the matrices of every expert are split over: 1 or the tensor-parallel size."""
    sequence: bool = False
    """Sequence parallelism: outside tensor-parallel regions, divide activations by sequence; needs `tensor` > 1."""
    distributed_optimizer: bool = False
    """Shard the optimizer state over data-parallel ranks."""
    microbatch_sequences: NonNegativeInt = 0
    """Sequences per forward pass of training, padded to one length; 0 means the whole minibatch of a rank."""
    microbatch_tokens: NonNegativeInt = 0
    """Tokens per forward pass of training, in sequences packed without padding; 0 pads sequences instead."""
    width_step: Annotated[int, Bounds(at_least=0, cap=2**16)] = 0
    """Pad the width of every forward pass of training to a multiple of this many tokens, so that few widths occur:
    Transformer Engine plans its attention anew for each. 0 means 128 on a GPU and 1 on a CPU."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass recomputes instead of storing: ``none``, those of whole layers (``full``), or
    those of some modules (``selective``, see `recompute_modules`)."""
    recompute_modules: list[Literal["core_attn", "mlp", "layernorm", "moe_act", "moe"]] = field(
        default_factory=lambda: ["core_attn"]
    )
    """Modules to recompute with ``recompute: selective``, by megatron-core's names."""
    timeout_minutes: Annotated[float, Bounds(at_least=0.01, cap=43200)] = 30.0
    """Minutes that a collective may take before the job fails with an error that names it."""
    wait_timeout_minutes: Annotated[float, Bounds(at_least=0.01, cap=43200)] = 720.0
    """Minutes that a process may wait for others that are busy with servers, verifiers or disks, before the job fails
    with an error that names what it waited for. The longest rollout or checkpoint must take less. These processes wait
    outside NCCL, so `timeout_minutes` does not apply."""

    def check(self) -> None:
        """Refuse combinations of keys that cannot work."""
        if self.sequence and self.tensor == 1:
            raise UserError("parallel.sequence=true needs parallel.tensor > 1: set it false or raise parallel.tensor")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise UserError(
                "parallel.virtual_pipeline > 1 needs parallel.pipeline > 1, because it interleaves the model chunks of "
                "pipeline stages: set it to 1 or raise parallel.pipeline"
            )
        if self.last_stage_layers and self.pipeline == 1:
            raise UserError("parallel.last_stage_layers needs parallel.pipeline > 1: set it to 0")
        if self.expert_tensor not in (1, self.tensor):
            raise UserError(f"parallel.expert_tensor={self.expert_tensor} must be 1 or parallel.tensor={self.tensor}")
        if self.microbatch_tokens and self.microbatch_sequences:
            raise UserError(
                "parallel.microbatch_tokens packs sequences, parallel.microbatch_sequences pads them: set only one"
            )
