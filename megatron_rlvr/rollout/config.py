"""The sections ``rollout`` and ``evaluation`` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_rlvr.config_schema import Bounds, NonNegativeInt, PositiveInt, Temperature
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig

TopP = Annotated[float, Bounds(above=0, at_most=1)]


@dataclass
class RolloutConfig:
    """Prompts and completions of a step, and the engine that generates them."""

    engine: Literal["local", "sglang", "recorded"] = "local"
    """What generates completions: the training processes themselves (``local``), SGLang servers (``sglang``), or a
    recording of an earlier run (``recorded``, see `recording`)."""
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    quantization: Literal["none", "fp8"] = "none"
    """Form of the weights that generate. ``fp8``: projections in blocks of 128 x 128 FP8 numbers (e4m3) with a scale
    each, quantized from the policy's weights after every step, so that half of the bytes travel. The policy still
    trains its own weights; `importance` corrects for the difference. SGLang servers compute with them and need
    `sglang.model_path`. The local engine generates with weights that are rounded in the same way."""
    prompts_per_step: Annotated[int, Bounds(above=0, cap=2**20)] = 64
    """Prompts per step, over all data-parallel ranks; divisible by `algorithm.minibatches`."""
    samples_per_prompt: Annotated[
        int, Bounds(at_least=2, cap=2**16, reason="advantages compare the samples of a prompt")
    ] = 16
    """Completions per prompt: the group within which advantages are computed, so at least 2."""
    max_tokens: Annotated[int, Bounds(above=0, cap=2**24)] = 1024
    """Longest response, in tokens, including the end-of-sequence token."""
    temperature: Temperature = 1.0
    """Divisor of the logits, both in sampling and in training. It is applied before `top_p` and `top_k`."""
    top_p: TopP = 1.0
    """Sample from the most probable tokens whose probabilities sum to this; 1 keeps the whole vocabulary. The policy
    that is trained is the same distribution: the kept tokens of each position are recorded with the completion."""
    top_k: NonNegativeInt = 0
    """Sample from this many of the most probable tokens, and train that distribution; 0 keeps the whole vocabulary.
    With `top_p`, a token must pass both cuts of the whole distribution. With SGLang, also the most tokens that a
    server returns per position: set it if `top_p` is set and the vocabulary is large."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a completion besides the end-of-sequence token. Each must be a single token."""
    dynamic_sampling: bool = False
    """Train only on groups whose rewards differ: drop the others and draw more prompts instead (DAPO)."""
    over_sampling: Annotated[float, Bounds(at_least=1, cap=1000)] = 1.0
    """Prompts drawn per group that dynamic sampling still needs. With SGLang, groups that are no longer needed are
    cancelled, which favours short responses."""
    refill_rounds: Annotated[int, Bounds(at_least=0, cap=10_000)] = 3
    """How often dynamic sampling draws again; after that, groups whose rewards are equal fill the batch."""
    overlong_buffer: NonNegativeInt = 0
    """Length penalty (DAPO): over the last this many tokens before `max_tokens`, a penalty on the reward grows from 0
    to 1. It affects only the advantages, not the reported reward. 0 disables it."""
    max_staleness: Annotated[int, Bounds(at_least=0, cap=1000)] = 0
    """How many versions old the weights of a rollout may be. 0 generates each rollout with the current weights; n lets
    SGLang generate the rollouts of the next n steps during training."""
    mismatch_alarm: Annotated[float, Bounds(at_least=0, cap=1e6, infinite=True)] | None = None
    """KL(rollout || train), in nats per token, above which a step prints a warning; 0 disables the alarm. Null is 1e-4
    for a policy in float32 and 0.01 for one in bfloat16. The page on mismatch says what else the alarm compares."""
    mismatch_growth: Annotated[float, Bounds(at_least=0, cap=1e6)] = 30.0
    """The alarm also warns of a KL that exceeds that of the run's first steps this many times; 0 disables this."""
    mismatch_stop: Annotated[float, Bounds(at_least=0, cap=1e6)] = 0.1
    """KL(rollout || train), in nats per token, above which a step counts towards `mismatch_patience`; at least
    `mismatch_alarm`."""
    mismatch_patience: PositiveInt = 3
    """Consecutive steps above `mismatch_stop` after which the run writes a checkpoint and ends."""
    routing_replay: bool = False
    """Rollout routing replay (R3) for mixtures of experts: scoring and updates use the experts that the rollout used
    for each token, with the gates of the router that is trained. The ``recorded`` engine needs a recording with it."""
    routing_replay_compare_every: NonNegativeInt = 0
    """With `routing_replay`, steps between measurements of the mismatch without replay, each of which costs one more
    scoring pass; 0 disables them."""
    ignore_eos: bool = False
    """Always generate `max_tokens` tokens, past any end-of-sequence token; for benchmarks."""
    local_batch: Annotated[int, Bounds(above=0, cap=2**20)] = 1024
    """Sequences that the local engine decodes at once."""
    record: bool = False
    """Store token ids and log-probs of every step in ``rollouts/`` of the run directory, for the ``recorded`` engine.
    To read samples, see ``telemetry.samples_every``."""
    recording: str | None = None
    """Folder of stored completions that the ``recorded`` engine replays."""

    def compares_routing(self, step: int) -> bool:
        """Whether a step measures the mismatch without routing replay."""
        return self.routing_replay_compare_every > 0 and step % self.routing_replay_compare_every == 0

    def check(self) -> None:
        """Refuse combinations of keys that cannot work."""
        if self.overlong_buffer >= self.max_tokens:
            raise UserError(
                f"rollout.overlong_buffer={self.overlong_buffer} must be less than rollout.max_tokens={self.max_tokens}"
            )
        if self.top_k == 1:
            raise UserError(
                "rollout.top_k=1 always draws the most probable token, so that no update changes the policy: "
                "set rollout.top_k to 0 or at least 2"
            )
        if self.engine == "recorded" and not self.recording:
            raise UserError(
                "rollout.engine=recorded needs rollout.recording: the rollouts/ folder of a run with "
                "rollout.record=true"
            )
        if self.engine == "recorded" and self.dynamic_sampling:
            raise UserError(
                "rollout.engine=recorded replays groups and cannot replace any: set rollout.dynamic_sampling=false"
            )
        if self.quantization == "fp8" and self.engine == "sglang" and self.sglang.model_path is None:
            raise UserError(
                "rollout.quantization=fp8 needs rollout.sglang.model_path, a folder with FP8 weights that servers "
                "start from: make it with tools/convert_checkpoint.py to-fp8 MODEL FOLDER"
            )
        if self.engine != "sglang" and self.max_staleness:
            raise UserError(
                f"rollout.max_staleness={self.max_staleness} needs rollout.engine=sglang, because the {self.engine} "
                "engine cannot generate during training: set rollout.max_staleness=0, or change the engine"
            )
        if self.routing_replay_compare_every and not self.routing_replay:
            raise UserError(
                f"rollout.routing_replay_compare_every={self.routing_replay_compare_every} needs "
                "rollout.routing_replay=true: set it to 0, or enable routing replay"
            )
        if self.routing_replay and self.max_staleness and self.sglang.interrupt == "retract":
            raise UserError(
                "rollout.sglang.interrupt=retract recomputes the routes of tokens that were already sampled, so "
                "rollout.routing_replay would replay others: set rollout.sglang.interrupt to in_place or finish, or "
                "rollout.max_staleness=0"
            )
        if self.max_staleness and self.sglang.release_memory:
            raise UserError(
                "rollout.sglang.release_memory=true needs rollout.max_staleness=0, because servers cannot generate "
                "while their memory is released: set only one of them"
            )


@dataclass
class EvaluationConfig:
    """Evaluation on held-out problems: pass@k, reward and length."""

    every: NonNegativeInt = 0
    """Steps between evaluations; 0 evaluates only before the first step and after the last."""
    prompts: PositiveInt = 200
    """Held-out problems per evaluation, from the start of the file."""
    samples: Annotated[int, Bounds(above=0, cap=2**16)] = 16
    """Completions per problem; pass@k is estimated for k = 1, 2, 4 ... up to this."""
    temperature: Temperature = 1.0
    """Divisor of the logits in sampling."""
    top_p: TopP = 1.0
    """Sample from the most probable tokens whose probabilities sum to this; 1 keeps the whole vocabulary."""
    top_k: NonNegativeInt = 0
    """Sample from this many of the most probable tokens; 0 keeps the whole vocabulary."""
    max_tokens: Annotated[int, Bounds(above=0, cap=2**24)] | None = None
    """Longest response, in tokens; null means `rollout.max_tokens`."""

    @property
    def pass_at(self) -> list[int]:
        """The k for which pass@k is estimated: 1, 2, 4 ... up to `samples`."""
        return [2**exponent for exponent in range(self.samples.bit_length())]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that an evaluation records, as other sections name them."""
        names = (*(f"pass@{k}" for k in self.pass_at), "distinct_solutions", "reward", "response_tokens")
        return [f"evaluation/{name}" for name in names]
