"""The tokens from which each token of a completion was drawn, if top-p or top-k cut the distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_rlvr.checked_input import InvalidInputError, checked


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """The kept set of each of n tokens, one after the other.

    The sampler decides which tokens it keeps. Other weights would keep others, so the sets travel with the completion.

    Attributes:
        counts: int32 [n], how many ids each set has, at least 1.
        ids: int32 [sum of counts], the ids of the first set, then those of the second, and so on, each in any order.
    """

    counts: np.ndarray
    ids: np.ndarray

    @classmethod
    def of(cls, sets: Sequence[Sequence[int]]) -> KeptTokens:
        """Build them from one list of ids per token."""
        counts = np.fromiter((len(ids) for ids in sets), np.int32, len(sets))
        return cls(counts, np.fromiter((i for ids in sets for i in ids), np.int32, int(counts.sum())))

    def sets(self) -> list[list[int]]:
        """Return one list of ids per token."""
        return [ids.tolist() for ids in np.split(self.ids, np.cumsum(self.counts)[:-1])]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, KeptTokens):
            return NotImplemented
        return np.array_equal(self.counts, other.counts) and np.array_equal(self.ids, other.ids)

    __hash__ = None  # type: ignore[assignment]


def checked_kept_tokens(sets: Any, token_ids: Sequence[int], *, largest_id: int) -> KeptTokens:
    """Build the kept sets of `token_ids` from a value that a server sent or a file holds.

    Raises:
        InvalidInputError: if there is not one set per token, or a set is empty, has an id that is impossible or occurs
            twice, or lacks the token that was drawn from it.
    """
    rows = checked(sets, list, "kept sets")
    if len(rows) != len(token_ids):
        raise InvalidInputError(f"{len(token_ids)} tokens with {len(rows)} kept sets")
    for position, (ids, token) in enumerate(zip(rows, token_ids, strict=True)):
        if not isinstance(ids, list) or not ids or not set(map(type, ids)) <= {int}:
            raise InvalidInputError(f"the kept set of token {position} is not a list of token ids")
        if min(ids) < 0 or max(ids) > largest_id or len(set(ids)) != len(ids):
            raise InvalidInputError(f"the kept set of token {position} has an impossible id, or an id twice")
        if token not in ids:
            raise InvalidInputError(f"token {position}, {token}, is not in its kept set")
    return KeptTokens.of(rows)
