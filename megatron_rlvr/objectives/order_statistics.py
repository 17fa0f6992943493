"""Order statistics of values that are spread over processes, found exactly without gathering the values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]
"""Sums a float64 tensor of the same shape over the processes that hold values."""

_CUTS_PER_ROUND = 255
_INFINITY_BITS = 0x7FF0000000000000


def of_this_process(sums: Tensor) -> Tensor:
    """The sums unchanged: `Total` of a process that holds all values."""
    return sums


def largest_cut(values: Tensor, holds: Callable[[Tensor, Tensor], Tensor], total: Total = of_this_process) -> float:
    """The largest float64 c >= 0 at which ``holds(count, sum)`` of the values <= c is true; -1 if it is true nowhere.

    Non-negative floats are ordered like their bits, so that a search over bits finds c exactly in eight rounds, each
    with one call of ``total``.

    Args:
        values: float64 [n], not negative; those that are NaN are above every cut.
        holds: whether a cut is low enough, bool [k], from float64 [k] counts and sums; true up to some cut and false
            beyond it.
        total: sums over processes; each of them must call this function.
    """
    ordered = values[~values.isnan()].sort().values  # a search among NaN finds nothing
    sums = torch.cat([ordered.new_zeros(1), ordered.clamp(max=torch.finfo(torch.float64).max).cumsum(0)])
    low, high = -1, _INFINITY_BITS + 1  # the condition holds at low and not at high
    while high - low > 1:
        step = max(1, -(-(high - low) // (_CUTS_PER_ROUND + 1)))
        bits = torch.arange(low + step, high, step, device=values.device)
        count = torch.searchsorted(ordered, bits.view(torch.float64), right=True)
        counts_and_sums = total(torch.stack([count.double(), sums[count]])).to(values.device)
        below = int(holds(*counts_and_sums).sum())
        low, high = low + below * step, min(high, low + (below + 1) * step)
    return -1.0 if low < 0 else float(torch.tensor(low).view(torch.float64))


def quantile(values: Tensor, share: float, count: float, total: Total = of_this_process) -> float:
    """The smallest of all processes' ``count`` values that at least ``share`` of them do not exceed.

    0 without values, NaN if too many of them are NaN. ``values`` and ``total`` are those of `largest_cut`.
    """
    below = largest_cut(values, lambda counts, _: counts < share * count, total)
    if below == torch.inf:
        return torch.nan
    beyond = torch.tensor(torch.inf, dtype=torch.float64)
    return float(torch.nextafter(torch.tensor(below, dtype=torch.float64), beyond)) if below >= 0 else 0.0
