"""Advantages within the group of completions of a prompt, and the length penalty on their rewards."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_rlvr.objectives.tokens import saturated

Advantage = Literal["grpo", "grpo-no-std", "rloo"]
ADVANTAGES: tuple[str, ...] = get_args(Advantage)


def group_advantages(rewards: Tensor, method: str = "grpo") -> Tensor:
    """Advantages of G completions of each of P prompts: [P, G] for float ``rewards`` [P, G].

    - ``grpo``: (reward - mean) / (std + 1e-6), with the sample standard deviation. arXiv 2402.03300, section 4.1.
    - ``grpo-no-std``: reward - mean. Dr.GRPO, arXiv 2503.20783.
    - ``rloo``: reward - mean of the other completions of the group. arXiv 2402.14740, section 2.

    A group whose rewards are all equal gets exactly 0: a rounding error in its mean, divided by a tiny standard
    deviation, would otherwise become an advantage. Advantages of finite rewards are finite: one that overflows is the
    largest finite number of its sign. Raises ValueError for an unknown method, for another shape and for
    groups of fewer than two.
    """
    if method not in ADVANTAGES:
        raise ValueError(f"advantages: unknown method {method!r}; valid: {', '.join(ADVANTAGES)}")
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(
            f"advantages: rewards must be [prompts, completions] with at least 2 completions per prompt, "
            f"found shape {list(rewards.shape)}"
        )
    wide = rewards.double()  # the sum of two float32 numbers may overflow float32
    centred = wide - wide.mean(dim=1, keepdim=True)
    if method == "grpo":
        centred = centred / (wide.std(dim=1, keepdim=True) + 1e-6)
    elif method == "rloo":
        centred = centred * (rewards.shape[1] / (rewards.shape[1] - 1))
    advantages = saturated(centred, rewards.dtype)
    return torch.where(informative_groups(rewards)[:, None], advantages, torch.zeros_like(advantages))


def informative_groups(rewards: Tensor) -> Tensor:
    """Whether the rewards of each group differ: bool [P] for ``rewards`` [P, G].

    The other groups have no gradient; DAPO (arXiv 2503.14476) drops them.
    """
    return rewards.amax(dim=1) > rewards.amin(dim=1)


def overlong_penalty(lengths: Tensor, max_tokens: int, buffer_tokens: int) -> Tensor:
    """The length penalty of DAPO, to be added to the reward: float32, of the shape of ``lengths`` (response tokens).

    It is 0 up to max_tokens - buffer_tokens, falls linearly to -1 at max_tokens and stays there. Source: arXiv
    2503.14476, equation 13. Raises ValueError unless 0 < buffer_tokens < max_tokens.
    """
    if not 0 < buffer_tokens < max_tokens:
        raise ValueError(f"overlong penalty: needs 0 < buffer_tokens < max_tokens, found {buffer_tokens}, {max_tokens}")
    over = lengths.to(torch.float32) - (max_tokens - buffer_tokens)
    return -(over / buffer_tokens).clamp(0.0, 1.0)
