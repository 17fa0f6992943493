"""The clipped objective of tokens under affine clip thresholds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import library as _library  # noqa: F401  (registers torch.ops.megatron_rlvr)


class Affine(Protocol):
    """A threshold intercept + slope * p."""

    @property
    def slope(self) -> float: ...
    @property
    def intercept(self) -> float: ...


class Thresholds(Protocol):
    """What is read of ``megatron_rlvr.control.ClipThresholds``; any object with these four numbers will do."""

    @property
    def upper(self) -> Affine: ...
    @property
    def lower(self) -> Affine: ...


@dataclass(frozen=True)
class ClippedObjective:
    """``objective`` float32 [T], differentiable in the log-prob; the counts are 0-d int64 tensors, ``region_counts``
    int64 [4] (E1 to E4) or None without entropy. Nothing here waits for the device."""

    objective: Tensor
    clip_high: Tensor
    clip_low: Tensor
    region_counts: Tensor | None = None


def four_scalars(thresholds: Thresholds) -> tuple[float, float, float, float]:
    """(upper slope, upper intercept, lower slope, lower intercept) as floats.

    An infinite intercept is no clip on that side. Raises ValueError where the closed form of a bound has a pole at some
    probability in [0, 1], and for NaN.
    """
    upper, lower = thresholds.upper, thresholds.lower
    scalars = float(upper.slope), float(upper.intercept), float(lower.slope), float(lower.intercept)
    if not -math.inf < scalars[0] < 1.0:
        raise ValueError(f"thresholds: the upper slope must be a number below 1, found {scalars[0]}")
    if not -1.0 < scalars[2] < math.inf:
        raise ValueError(f"thresholds: the lower slope must be a number above -1, found {scalars[2]}")
    if not (-math.inf <= scalars[1] <= math.inf and -math.inf <= scalars[3] <= math.inf):  # isnan cannot be traced
        raise ValueError(f"thresholds: the intercepts must be numbers, found {scalars[1]} and {scalars[3]}")
    return scalars


def clipped_objective(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    thresholds: Thresholds,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    entropy: Tensor | None = None,
) -> ClippedObjective:
    """Token objective weight * min(r A, clip(r, low, high) A), to be maximised, with its clip and region counts.

    All tensors are [T] on one device, float32, ``mask`` bool; r = e^(logprob - old_logprob). The bounds follow from the
    thresholds in closed form (arXiv 2602.09782): low = (1 - b_l) / (1 + a_l p_old), high = (1 + b_u) / (1 - a_u p_old).
    Counts: ``clip_high`` tokens with A > 0 and r > high, ``clip_low`` with A < 0 and r < low; regions, where
    ``entropy`` H is given: E1 (-ln p < H, A > 0), E2 (-ln p >= H, A > 0), E3 (-ln p < H, A < 0),
    E4 (-ln p >= H, A < 0).
    Tokens outside ``mask`` give objective and gradient 0 and count nowhere. Gradient flows to ``logprob`` only.
    Raises ValueError for a wrong type, shape or device, and thresholds whose bounds do not exist.
    """
    tensors = {"old_logprob": old_logprob, "advantage": advantage, "mask": mask, "weight": weight, "entropy": entropy}
    check_token_tensors(logprob, tensors)
    objective, _, counts = torch.ops.megatron_rlvr.clipped_objective(
        logprob.contiguous(),
        *(None if t is None else t.detach().contiguous() for t in tensors.values()),
        *four_scalars(thresholds),
    )
    return ClippedObjective(objective, counts[0], counts[1], None if entropy is None else counts[2:])


def check_token_tensors(logprob: Tensor, others: dict[str, Any], first: str = "logprob") -> None:
    """Raise ValueError unless every tensor is [T] like ``logprob``, on its device, and float32 (``mask``: bool)."""
    if logprob.dim() != 1 or logprob.dtype != torch.float32:
        raise ValueError(f"{first}: must be float32 [T], found {logprob.dtype} {list(logprob.shape)}")
    for name, tensor in others.items():
        if tensor is None:
            continue
        expected = torch.bool if name == "mask" else torch.float32
        if tensor.dtype != expected:
            raise ValueError(f"{name}: must be {expected}, found {tensor.dtype}")
        if tensor.shape != logprob.shape:
            raise ValueError(f"{name}: must be [T] with T = {logprob.shape[0]} tokens, found {list(tensor.shape)}")
        if tensor.device != logprob.device:
            raise ValueError(f"{name}: must be on the device of log-probs, {logprob.device}, found {tensor.device}")
