"""Groups handed from one data-parallel rank to another before training, so that all have about as much to compute.

A minibatch is waited for by all, so the rank with the longest responses sets its time. Groups stay whole and in their
minibatch, and every rank keeps as many of them, so the loss is the same sum in another order. Leaders exchange the
groups that move and nothing else: no process sees the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_rlvr.config import Config
from megatron_rlvr.data import Example
from megatron_rlvr.megatron import collectives, parallel
from megatron_rlvr.rollout.groups import Group, RolledOut


def balanced_owners(costs: Sequence[Sequence[float]]) -> list[list[int]]:
    """Which rank is to train each group of one minibatch.

    The costliest group left goes to the rank with the least so far that still has room, to its own in a tie (longest
    processing time first; Graham, SIAM J. Appl. Math. 17 (1969), with as many groups on every rank).

    Args:
        costs: [D, k], of the k groups of each of D ranks.

    Returns:
        ranks, [D, k]; each occurs k times. The groups stay where they are when that is as good.
    """
    ranks, room = range(len(costs)), len(costs[0])
    owners = [[rank] * room for rank in ranks]
    loads, counts = [0.0] * len(costs), [0] * len(costs)
    order = sorted(((rank, i) for rank in ranks for i in range(room)), key=lambda at: -costs[at[0]][at[1]])
    for rank, i in order:
        taker = min((r for r in ranks if counts[r] < room), key=lambda r: (loads[r], r != rank, r))
        owners[rank][i] = taker
        loads[taker] += costs[rank][i]
        counts[taker] += 1
    if max(loads) < max(map(sum, costs)):
        return owners
    return [[rank] * room for rank in ranks]


def group_cost(group: Group, prompt_tokens: int, epochs: int, drop: bool) -> float:
    """Tokens that a group sends through the model, counting a backward pass as two forward ones.

    Args:
        group: verified.
        prompt_tokens: of its prompt.
        epochs: of updates, each of a forward and a backward pass.
        drop: whether a group without advantage is scored only.
    """
    tokens = sum(prompt_tokens + len(completion.token_ids) for completion in group.completions)
    return tokens * (1 if drop and not group.informative else 1 + 3 * epochs)


def balance(
    rolled: RolledOut, slots: Sequence[int], data: tuple[list[Example], list[list[int]]], config: Config
) -> tuple[RolledOut, list[int]]:
    """The groups that this rank is to train, and their places in the step. Collective over the ranks' leaders.

    Args:
        rolled: by this rank, minibatch by minibatch.
        slots: the places of its groups.
        data: training examples and their prompts' token ids.
        config: of the run.
    """
    algorithm, prompts = config.algorithm, data[1]
    costs = collectives.all_gather_over_leaders(
        [group_cost(g, len(prompts[g.example]), algorithm.epochs, algorithm.drop_zero_advantage) for g in rolled.groups]
    )
    mine, size = parallel.data_rank(), len(costs)
    each = len(rolled.groups) // algorithm.minibatches
    parcels: list[list[tuple[int, int, Group]]] = [[] for _ in range(size)]
    for number in range(algorithm.minibatches):
        part = slice(number * each, (number + 1) * each)
        for i, owner in enumerate(balanced_owners([row[part] for row in costs])[mine], start=part.start):
            parcels[owner].append((number, slots[i], rolled.groups[i]))
    kept, parcels[mine] = parcels[mine], []
    received = [entry for parcel in collectives.all_to_all_over_leaders(parcels) for entry in parcel]
    entries = sorted([*kept, *received], key=lambda entry: entry[:2])
    return replace(rolled, groups=[group for _, _, group in entries]), [slot for _, slot, _ in entries]
