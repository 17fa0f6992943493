"""The `model`, `parallel` and `optimizer` sections of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field


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
