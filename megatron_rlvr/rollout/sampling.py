"""How completions are sampled: the settings, the seed of each completion, and the draw of a token.

A random generator shared by a batch would make each sample depend on its neighbours. Here every uniform number is a
hash of its completion's seed and the token's position, so a completion is the same in any batch, on any data-parallel
layout and after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_rlvr.rollout.config import EvaluationConfig, RolloutConfig

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class SamplingPolicy:
    """How completions are drawn.

    Attributes:
        samples: completions per prompt.
        max_tokens: maximum length of a completion, stop token included.
        temperature: divides the logits; log-probs are those of the divided logits.
        top_p, top_k: restrict the draw to the most likely tokens (1 and 0 do not); log-probs stay those of the whole
            vocabulary.
        stop_token_ids: a completion ends with the first of these; if empty, only `max_tokens` ends it.
    """

    samples: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()

    @classmethod
    def for_training(cls, config: RolloutConfig, stop_token_ids: Sequence[int]) -> SamplingPolicy:
        """The settings of training rollouts."""
        return cls(
            samples=config.samples_per_prompt,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            stop_token_ids=() if config.ignore_eos else tuple(stop_token_ids),
        )

    @classmethod
    def for_evaluation(
        cls, config: EvaluationConfig, rollout: RolloutConfig, stop_token_ids: Sequence[int]
    ) -> SamplingPolicy:
        """The settings of evaluations. What they do not set is as in training."""
        return replace(
            cls.for_training(rollout, stop_token_ids),
            samples=config.samples,
            max_tokens=config.max_tokens or rollout.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )


def sample_seed(run_seed: int, step: int, prompt: int, sample: int) -> int:
    """The 64-bit seed of completion `sample` of a prompt.

    Args:
        run_seed: of the configuration.
        step: of training, or `EVALUATION_SEED`.
        prompt: the prompt's slot in the step; in an evaluation, its index in the data set.
        sample: counts the completions of the prompt.
    """
    text = f"{run_seed}/{step}/{prompt}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniforms(seeds: np.ndarray, position: int) -> np.ndarray:
    """float64 [n] in [0, 1) for uint64 seeds [n] at a token position: the finaliser of splitmix64 applied to both."""
    with np.errstate(over="ignore"):
        z = seeds + _GOLDEN * np.uint64(position + 1)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    Args:
        logits: [n, V], any float dtype.
        uniform: float64 [n] in [0, 1).
        temperature, top_p, top_k: see `SamplingPolicy`.

    Returns:
        tokens int64 [n], and their log-probs float32 [n] over the whole vocabulary at this temperature.
    """
    logprob = torch.log_softmax(logits.float() / temperature, dim=-1)
    probability = logprob.exp().double()
    if top_k and top_k < probability.size(-1):
        smallest = probability.topk(top_k, dim=-1).values[:, -1:]
        probability = probability.where(probability >= smallest, 0.0)
    if top_p < 1.0:
        ordered, order = probability.sort(dim=-1, descending=True, stable=True)
        total = ordered.sum(-1, keepdim=True)
        before = ordered.cumsum(-1) - ordered
        probability = torch.zeros_like(probability).scatter(-1, order, ordered.where(before < top_p * total, 0.0))
    cumulative = probability.cumsum(-1)
    threshold = uniform.unsqueeze(-1) * cumulative[:, -1:]
    # right=True finds the first entry whose cumulative mass exceeds the threshold, so a token of probability 0 is never
    # drawn.
    token = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.size(-1) - 1)
    return token[:, 0], logprob.gather(1, token)[:, 0]
