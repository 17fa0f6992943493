"""How completions are sampled: the settings, the seed of each completion, and the draw of a token.

A random generator shared by a batch would make each completion depend on the others in the batch. Here every uniform
number is a hash of the completion's seed and the token's position, so a completion is the same in any batch, on any
data-parallel layout and after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_rlvr.data.routes import RouterShape
from megatron_rlvr.rollout.config import EvaluationConfig, RolloutConfig

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled.

    Attributes:
        samples: completions per prompt.
        max_tokens: maximum length of a completion, in tokens, including the stop token.
        temperature: divisor of the logits. Log-probs are computed from the divided logits.
        top_p, top_k: sample only from the most probable tokens, see `kept_tokens`; 1 and 0 disable them. Log-probs are
            those of the distribution over these tokens.
        stop_token_ids: a completion ends with the first of these; if empty, only `max_tokens` ends it.
        returns_kept: whether completions come with their kept sets, which training under `top_p` or `top_k` needs.
        routers: routers of the model, if completions must come with the experts that these chose; otherwise None.
    """

    samples: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    returns_kept: bool = False
    routers: RouterShape | None = None

    @classmethod
    def for_training(
        cls, config: RolloutConfig, stop_token_ids: Sequence[int], routers: RouterShape | None = None
    ) -> SamplingSettings:
        """Return the settings of training rollouts; `routers` if their routes are to be replayed."""
        return cls(
            samples=config.samples_per_prompt,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            stop_token_ids=() if config.ignore_eos else tuple(stop_token_ids),
            returns_kept=config.top_p < 1.0 or config.top_k > 0,
            routers=routers,
        )

    @classmethod
    def for_evaluation(
        cls, config: EvaluationConfig, rollout: RolloutConfig, stop_token_ids: Sequence[int]
    ) -> SamplingSettings:
        """Return the settings of evaluations; what `config` does not set is taken from `rollout`."""
        return replace(
            cls.for_training(rollout, stop_token_ids),
            samples=config.samples,
            max_tokens=config.max_tokens or rollout.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            returns_kept=False,
        )


def sample_seed(run_seed: int, step: int, prompt: int, sample: int) -> int:
    """Return the 64-bit seed of one completion.

    Args:
        run_seed: ``seed`` of the configuration.
        step: training step, or `EVALUATION_SEED`.
        prompt: slot of the prompt in the step; in an evaluation, its index in the data set.
        sample: index of the completion among those of the prompt.
    """
    text = f"{run_seed}/{step}/{prompt}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniforms(seeds: np.ndarray, position: int) -> np.ndarray:
    """Hash seeds, uint64 [n], and a token position to uniform numbers in [0, 1), float64 [n].

    The hash is the finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    with np.errstate(over="ignore"):
        z = seeds + _GOLDEN * np.uint64(position + 1)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def kept_tokens(probability: Tensor, top_p: float, top_k: int) -> Tensor:
    """Return which tokens a cut keeps, as SGLang does: the intersection of both cuts of the same distribution.

    Tokens are sorted by descending probability, and by ascending id where probabilities are equal. The cuts keep the
    first `top_k` of them, and those before which the probabilities sum to less than `top_p`. Tokens of probability 0
    are never kept.

    Args:
        probability: float64 [n, V], over the whole vocabulary, after the temperature.
        top_p, top_k: see `SamplingSettings`.

    Returns:
        bool [n, V].
    """
    ordered, order = probability.sort(dim=-1, descending=True, stable=True)
    total = ordered.sum(-1, keepdim=True)  # 1, but for the rounding of float32 probabilities
    kept = (ordered.cumsum(-1) - ordered < top_p * total) & (ordered > 0)
    if top_k:
        kept[:, top_k:] = False
    return torch.zeros_like(kept).scatter(-1, order, kept)


def draw(
    logits: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw one token per row by inverting the cumulative distribution.

    Args:
        logits: [n, V], any float dtype.
        uniform: float64 [n] in [0, 1), one uniform number per row.
        temperature, top_p, top_k: see `SamplingSettings`.

    Returns:
        the tokens, int64 [n]; their log-probs at this temperature, over the kept tokens, float32 [n]; and the kept
        tokens, bool [n, V], None if nothing is cut.
    """
    scaled = logits.float() / temperature
    logprob = torch.log_softmax(scaled, dim=-1)
    kept = None
    if top_p < 1.0 or 0 < top_k < logits.size(-1):
        kept = kept_tokens(logprob.exp().double(), top_p, top_k)
        logprob = torch.log_softmax(scaled.masked_fill(~kept, -torch.inf), dim=-1)
    cumulative = logprob.exp().double().cumsum(-1)
    threshold = uniform.unsqueeze(-1) * cumulative[:, -1:]
    # right=True finds the first entry whose cumulative mass exceeds the threshold, so a token of probability 0 is never
    # drawn.
    token = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.size(-1) - 1)
    return token[:, 0], logprob.gather(1, token)[:, 0], kept
