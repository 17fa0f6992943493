"""The eager reference of every operator: the formulas in plain torch, on any device.

It runs where no kernel was compiled, and the compiled kernels are tested against it and against float64.
Notation, per row (one token): x are the raw logits, beta = 1 / temperature, M = max x over the whole vocabulary,
d_j = beta (x_j - M) <= 0, S = sum_j e^(d_j), p_j = e^(d_j) / S.

Two choices make the results exact on rows that are almost certain, where training spends most of its tokens. Sums run
over the shifted d, so that nothing of size M cancels. S is stored as *excess* = S - 1, summed without the maximum's
own 1, so that ln S = log1p(excess) and 1 - p of an almost certain token keep their relative accuracy.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of the partial statistics of a row, the only numbers that tensor-parallel ranks exchange.
MAXIMUM, EXCESS, SHIFTED, TARGET, SQUARED_EXCESS, SQUARED_SHIFTED = range(6)
# Columns of the row state, all that is saved for the gradient.
STATE_MAXIMUM, STATE_LOG_SUM, STATE_ENTROPY, STATE_LOGPROB = range(4)
# Values of a token's gate: the gradient flows, or which bound makes the objective flat.
OPEN, CLIPPED_HIGH, CLIPPED_LOW, DUAL_CLIPPED = range(4)
NOT_A_TARGET = -100  # the target of a row that has none, as in torch.nn.functional.cross_entropy


def row_statistics(
    logits: Tensor, targets: Tensor, vocab_start: int, vocab_size: int, inverse_temperature: float, second_moments: bool
) -> Tensor:
    """Reduce each row of a vocabulary shard to the few numbers from which the statistics of the whole row follow.

    ``logits`` [T, V/tp] of any floating type, ``targets`` int64 [T] ids in [0, vocab_size) or -100, ``vocab_start``
    the id of column 0. Returns float32 [T, 4], or [T, 6] with ``second_moments``: the maximum logit m; excess =
    sum_j e^(beta (x_j - m)) - 1; shifted = sum_j d_j e^(d_j) with d_j = beta (x_j - m); the target's logit, -inf where
    it is not in this shard; and the excess and shifted sum of the squares, sum_j e^(2 d_j) - 1 and sum_j d_j e^(2 d_j).
    """
    if targets.device.type == "cpu":
        check_targets(targets, vocab_size)
    width = logits.shape[1]
    x = logits.float()
    maximum, position = x.max(dim=-1, keepdim=True)
    shifted = (x - maximum).mul_(inverse_temperature)
    shifted = torch.where(
        x == -torch.inf, torch.full_like(shifted, -torch.inf), shifted
    )  # where 0 * inf or -inf - -inf gave NaN
    exponential = shifted.exp()
    product = torch.where(exponential > 0, shifted * exponential, exponential)  # e = 0 adds 0, and a NaN stays NaN
    others = exponential.scatter(-1, position, 0.0)  # without the maximum's own 1: see the top of this file
    column, inside = target_columns(targets, vocab_start, width)
    picked = x.gather(-1, column)
    columns = [
        maximum.squeeze(-1),
        others.sum(-1),
        product.sum(-1),
        torch.where(inside, picked, torch.full_like(picked, -torch.inf)).squeeze(-1),
    ]
    if second_moments:
        columns += [others.square().sum(-1), (product * exponential).sum(-1)]
    return torch.stack(columns, dim=-1)


def target_columns(targets: Tensor, vocab_start: int, width: int) -> tuple[Tensor, Tensor]:
    """The columns of the targets in a vocabulary shard of ``width`` ids from ``vocab_start`` on.

    Returns the column of each target, int64 [T, 1], and whether the shard has it, bool [T, 1]. Where it has not, the
    column is one of the shard's, so that it can be read.
    """
    local = targets - vocab_start
    inside = (local >= 0) & (local < width) & (targets >= 0)
    return local.clamp(0, width - 1).unsqueeze(-1), inside.unsqueeze(-1)


def combine_statistics(
    gathered: Tensor, targets: Tensor, vocab_size: int, inverse_temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Combine the partial statistics of all shards into log-prob, entropy, row state and second moments.

    ``gathered`` float32 [W, T, 4 or 6] from :func:`row_statistics` of the W shards. Returns log-prob [T], entropy [T],
    state [T, 4] and moments [2, T] (sum p^2 and sum p^2 ln p; [0, T] without second moments), all float32. Log-prob is
    0 for a row without target. On the CPU a row with NaN, with +inf or with nothing above -inf raises RuntimeError. On
    a GPU, where a check would wait for the device, such a row and a row whose target is outside the vocabulary give
    NaN.
    """
    partials = gathered.double()
    local_maximum = partials[..., MAXIMUM]
    maximum, leader = local_maximum.max(dim=0, keepdim=True)
    delta = inverse_temperature * (local_maximum - maximum)  # 0 for the leader, -inf for a shard of -inf only
    delta = torch.where(local_maximum == maximum, torch.zeros_like(delta), delta)
    scale = delta.exp()

    def merge(excess_column: int, shifted_column: int, power: int) -> tuple[Tensor, Tensor]:
        shard_excess, weight = partials[..., excess_column], scale**power
        # Every shard sums to 1 + excess. The leader's 1 is that of the maximum, which excess leaves out.
        ones_except_leader = torch.ones_like(scale).scatter(0, leader, 0.0)
        excess = ((ones_except_leader + shard_excess) * weight).sum(0)
        moved = torch.where(weight > 0, delta * (1 + shard_excess), torch.zeros_like(delta))
        return excess, ((partials[..., shifted_column] + moved) * weight).sum(0)

    excess, shifted = merge(EXCESS, SHIFTED, 1)
    top = maximum.squeeze(0)
    log_sum = torch.log1p(excess)
    entropy = log_sum - shifted / (1 + excess)
    target = partials[..., TARGET].amax(0)
    logprob = inverse_temperature * (target - top) - log_sum
    logprob = torch.where(targets >= 0, logprob, torch.zeros_like(logprob))
    broken = ~(torch.isfinite(top) & torch.isfinite(log_sum))
    if gathered.device.type == "cpu":
        check_rows(broken)
    broken = broken | (targets >= vocab_size) | ((targets < 0) & (targets != NOT_A_TARGET))
    logprob = torch.where(broken, torch.full_like(logprob, torch.nan), logprob)
    entropy = torch.where(broken, torch.full_like(entropy, torch.nan), entropy)
    state = torch.stack([top, log_sum, entropy, logprob], dim=-1).float()
    moments = partials.new_empty((0, partials.shape[1]))
    if partials.shape[-1] > SQUARED_EXCESS:
        square_excess, square_shifted = merge(SQUARED_EXCESS, SQUARED_SHIFTED, 2)
        square = (1 + square_excess) / (1 + excess) ** 2
        moments = torch.stack([square, square_shifted / (1 + excess) ** 2 - log_sum * square])
    return logprob.float(), entropy.float(), state, moments.float()


def logits_gradient(
    logits: Tensor,
    targets: Tensor,
    state: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    vocab_start: int,
    inverse_temperature: float,
) -> Tensor:
    """The gradient of both statistics with respect to a vocabulary shard of the logits, recomputed from the logits.

    ``state`` is from :func:`combine_statistics`, ``grad_logprob`` (g) and ``grad_entropy`` (h) are float32 [T]. Returns
    [T, V/tp] in the logits' type:
        beta * (g (1[j = target] - p_j) - h p_j (ln p_j + H)).
    At the target 1 - p is computed as -expm1(log-prob), which keeps its relative accuracy where p is almost 1.
    """
    maximum, log_sum, entropy, logprob = state.unbind(-1)
    g, h = grad_logprob.unsqueeze(-1), grad_entropy.unsqueeze(-1)
    g = torch.where((targets >= 0).unsqueeze(-1), g, torch.zeros_like(g))
    logp = (logits.float() - maximum.unsqueeze(-1)) * inverse_temperature - log_sum.unsqueeze(-1)
    prob = logp.exp()
    gradient = prob * (-g - h * (logp + entropy.unsqueeze(-1)))
    gradient = torch.where(prob == 0, prob, gradient)  # p ln p = 0 at p = 0, also where ln p = -inf
    column, inside = target_columns(targets, vocab_start, logits.shape[-1])
    target_prob = logprob.exp()
    spread = torch.where(target_prob > 0, target_prob * (logprob + entropy), target_prob)
    at_target = g * -torch.expm1(logprob.unsqueeze(-1)) - h * spread.unsqueeze(-1)
    gradient.scatter_(-1, column, torch.where(inside, at_target, gradient.gather(-1, column)))
    return gradient.mul_(inverse_temperature).to(logits.dtype)


def clipped_objective(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    entropy: Tensor | None,
    upper_slope: float,
    upper_intercept: float,
    lower_slope: float,
    lower_intercept: float,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`bounded_objective` under the bounds that affine thresholds imply (arXiv 2602.09782, in closed form).

    With p_old = e^old_logprob, intercepts b and slopes a: low = (1 - b_l) / (1 + a_l p_old) and
    high = (1 + b_u) / (1 - a_u p_old).
    """
    old_prob = old_logprob.exp()
    low = (1.0 - lower_intercept) / (1.0 + lower_slope * old_prob)
    high = (1.0 + upper_intercept) / (1.0 - upper_slope * old_prob)
    return bounded_objective(logprob, old_logprob, advantage, low, high, mask, weight, entropy, dual_clip)


def bounded_objective(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    low: Tensor,
    high: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    entropy: Tensor | None,
    dual_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The clipped objective of each token, its derivative with respect to log-prob, the counts and the gate.

    All tensors are [T] of one floating type, ``mask`` bool. With r = e^(logprob - old_logprob), the objective is
    weight * min(r A, clip(r, low, high) A), and at least weight * dual_clip * A where A < 0. Equal log-probs have
    r = 1, also where both are -inf. A product that its type cannot hold is the largest finite number of its sign.

    Returns objective [T]; derivative [T], which is weight * r A where the gate is open and 0 where a bound acts; counts
    int64 [6], the tokens clipped high (A > 0, r > high), clipped low (A < 0, r < low) and in the regions E1 to E4 (0
    without ``entropy``); gate uint8 [T], one of OPEN, CLIPPED_HIGH, CLIPPED_LOW and DUAL_CLIPPED. Masked tokens give 0
    and are not counted, whatever they hold.
    """
    log_ratio = torch.where(logprob == old_logprob, torch.zeros_like(logprob), logprob - old_logprob)
    ratio = log_ratio.exp()
    kept = torch.ones_like(advantage, dtype=torch.bool) if mask is None else mask
    positive, negative = kept & (advantage > 0), kept & (advantage < 0)
    clipped_high, clipped_low = positive & (ratio > high), negative & (ratio < low)
    gate = torch.where(clipped_high, CLIPPED_HIGH, OPEN) + torch.where(clipped_low, CLIPPED_LOW, OPEN)
    # In float64, where a float32 ratio cannot overflow as long as its product with A and weight is finite in float32.
    factor = torch.where(clipped_high, high, torch.where(clipped_low, low, log_ratio.double().exp()))
    if dual_clip is not None:
        dual_clipped = negative & ~clipped_low & (ratio > dual_clip)
        gate = torch.where(dual_clipped, DUAL_CLIPPED, gate)
        factor = torch.where(dual_clipped, dual_clip, factor)
    scale = advantage.double() if weight is None else advantage.double() * weight.double()
    active = positive | negative | (kept & torch.isnan(advantage))  # A = 0 gives 0 even where r overflows
    objective = torch.where(active, saturated_product(factor, scale, logprob.dtype), torch.zeros_like(logprob))
    derivative = torch.where(gate == OPEN, objective, torch.zeros_like(objective))
    counts = [clipped_high.sum(), clipped_low.sum()]
    if entropy is None:
        counts += [torch.zeros_like(counts[0])] * 4
    else:
        likely, unlikely = -logprob < entropy, -logprob >= entropy
        counts += [(sign & side).sum() for sign in (positive, negative) for side in (likely, unlikely)]
    return objective, derivative, torch.stack(counts), gate.to(torch.uint8)


def saturated_product(factor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``factor`` * ``scale``, both float64, in ``dtype``: the largest finite number of its sign where it overflows.

    NaN and an infinite ``scale`` remain what they are. A scale of 0 gives 0, also where the factor is infinite.
    """
    largest = torch.finfo(dtype).max
    product = factor.clamp(max=torch.finfo(torch.float64).max) * scale
    return torch.where(scale.isinf(), product, product.clamp(-largest, largest)).to(dtype)


def check_targets(targets: Tensor, vocab_size: int) -> None:
    """Raise ValueError if a target is neither an id of the vocabulary nor -100."""
    bad = ((targets < 0) & (targets != NOT_A_TARGET)) | (targets >= vocab_size)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"targets: must be ids in [0, {vocab_size}) or {NOT_A_TARGET} for a row without target, "
            f"found {int(targets[row])} in row {row}"
        )


def check_rows(broken: Tensor) -> None:
    """Raise RuntimeError that names the rows of the logits that have no softmax, if there are any."""
    if broken.any():
        rows = broken.nonzero().flatten().tolist()
        raise RuntimeError(
            f"logits: {len(rows)} of {broken.numel()} rows hold NaN or +inf, or nothing above -inf: "
            f"rows {', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''}"
        )
