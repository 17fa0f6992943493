"""Random numbers that depend on (seed, position) alone, and the draw of a token from them.

A generator that is shared by a batch ties a sample to its neighbours. Here every uniform is a hash of its completion's
seed and the token's position, so a completion is the same in any batch, on any data-parallel layout and after a resume.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def sample_seed(run_seed: int, step: int, prompt: int, sample: int) -> int:
    """The 64-bit seed of one completion of a run; `prompt` is the problem's index in its data set."""
    text = f"{run_seed}/{step}/{prompt}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniforms(seeds: np.ndarray, position: int) -> np.ndarray:
    """float64 [n] in [0, 1) for uint64 seeds [n] at a token position (splitmix64's finaliser of the two)."""
    with np.errstate(over="ignore"):
        z = seeds + _GOLDEN * np.uint64(position + 1)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        logits: [n, V], any float dtype.
        uniform: float64 [n] in [0, 1).
        temperature, top_p, top_k: see `SamplingPolicy`.

    Returns:
        tokens int64 [n] and their log-probs float32 [n] under the whole vocabulary at this temperature.
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
    # side "right": the first entry whose cumulative mass exceeds the threshold, so a token of probability 0 never wins.
    token = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.size(-1) - 1)
    return token[:, 0], logprob.gather(1, token)[:, 0]
