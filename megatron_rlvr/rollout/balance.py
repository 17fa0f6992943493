"""Move groups between data-parallel ranks before training, so that all ranks have about the same amount of work.

All ranks wait for the slowest one in every minibatch, so the rank with the longest responses determines the time.
Groups are not split and stay in their minibatch, and every rank keeps the same number of groups, so the loss is the
same sum in another order. Leaders exchange only the groups that move; no process sees the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rlvr.megatron import waiting
from megatron_rlvr.rollout.groups import Group
from megatron_rlvr.rollout.prompts import PromptSet
from megatron_rlvr.training.config import AlgorithmConfig


def balanced_owners(costs: Sequence[Sequence[float]]) -> list[list[int]]:
    """Assign each group of one minibatch to the rank that trains on it.

    The most expensive remaining group goes to the rank with the smallest load that still has room; in a tie, it stays
    on its rank. This is longest processing time first (Graham, SIAM J. Appl. Math. 17, 1969), with the same number of
    groups on every rank.

    Args:
        costs: [D, k], costs of the k groups of each of D ranks.

    Returns:
        [D, k], the rank that trains on each group; every rank occurs k times. No group moves if moving does not lower
        the largest load.
    """
    ranks, groups_per_rank = range(len(costs)), len(costs[0])
    owners = [[rank] * groups_per_rank for rank in ranks]
    loads, counts = [0.0] * len(costs), [0] * len(costs)
    order = sorted(((rank, i) for rank in ranks for i in range(groups_per_rank)), key=lambda at: -costs[at[0]][at[1]])
    for rank, i in order:
        owner = min((r for r in ranks if counts[r] < groups_per_rank), key=lambda r: (loads[r], r != rank, r))
        owners[rank][i] = owner
        loads[owner] += costs[rank][i]
        counts[owner] += 1
    if max(loads) < max(map(sum, costs)):
        return owners
    return [[rank] * groups_per_rank for rank in ranks]


def group_cost(group: Group, prompt_tokens: int, epochs: int, drop: bool) -> float:
    """Return the number of tokens of a group times its forward passes; a backward pass counts as two forward passes.

    Args:
        group: the verified group.
        prompt_tokens: length of its prompt.
        epochs: passes over the rollout, each a forward and a backward pass.
        drop: whether updates skip groups whose advantages are all 0.
    """
    tokens = sum(prompt_tokens + len(completion.token_ids) for completion in group.completions)
    return tokens * (1 if drop and not group.informative else 1 + 3 * epochs)


def balance(groups: Sequence[Group], prompts: PromptSet, algorithm: AlgorithmConfig, rank: int) -> list[Group]:
    """Exchange groups between data-parallel ranks. Collective over leaders.

    Args:
        groups: groups that this rank generated, in the order of its minibatches.
        prompts: training data.
        algorithm: number of epochs and minibatches, and whether groups without advantage are skipped.
        rank: data-parallel rank of this process.

    Returns:
        the groups that this rank trains on, in the order of its minibatches.
    """
    costs = waiting.all_gather_over_leaders(
        [
            group_cost(g, len(prompts.token_ids[g.example]), algorithm.epochs, algorithm.drop_zero_advantage)
            for g in groups
        ],
        "the lengths of the rollouts of other leaders",
    )
    per_minibatch = len(groups) // algorithm.minibatches
    outgoing: list[list[tuple[int, Group]]] = [[] for _ in range(len(costs))]
    for minibatch in range(algorithm.minibatches):
        members = slice(minibatch * per_minibatch, (minibatch + 1) * per_minibatch)
        owners = balanced_owners([row[members] for row in costs])[rank]
        for group, owner in zip(groups[members], owners, strict=True):
            outgoing[owner].append((minibatch, group))
    kept, outgoing[rank] = outgoing[rank], []
    what = "groups that other leaders send to balance the load"
    received = [entry for entries in waiting.all_to_all_over_leaders(outgoing, what) for entry in entries]
    return [group for _, group in sorted([*kept, *received], key=lambda entry: (entry[0], entry[1].slot))]
