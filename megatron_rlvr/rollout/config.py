"""The `rollout` and `evaluation` sections of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig


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
