"""Routes: the experts that the routers of a mixture of experts chose for tokens, as engines report them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rlvr.checked_input import InvalidInputError, checked, describe

LARGEST_BYTE = 256
"""Experts that one byte can number."""


@dataclass(frozen=True)
class RouterShape:
    """The routers of a model.

    Attributes:
        layers: transformer layers of the model, with and without router.
        routed: indices of the layers that have a router, ascending.
        experts: experts per router.
        chosen: experts per token.
    """

    layers: int
    routed: tuple[int, ...]
    experts: int
    chosen: int

    @property
    def dtype(self) -> np.dtype:
        """The smallest integer type that numbers the experts."""
        return np.dtype(np.uint8 if self.experts <= LARGEST_BYTE else np.int16)

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype`, for tensors."""
        return torch.uint8 if self.experts <= LARGEST_BYTE else torch.int16


@dataclass(frozen=True, eq=False)
class Routes:
    """The experts of the first n tokens of a sequence, prompt and response.

    The engine never computes the last token that it samples, so a sequence of L tokens has routes of L - 1.

    Attributes:
        experts: uint8 or int16 [n, routers, experts per token], in the order of `RouterShape.routed`. n = 0 if the
            engine reported routes other than those under which it sampled the tokens.
    """

    experts: np.ndarray

    def encoded(self) -> str:
        """Return the experts in base64, for `decoded_routes`."""
        return base64.b64encode(self.experts.tobytes()).decode()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Routes) and np.array_equal(self.experts, other.experts)

    __hash__ = None  # type: ignore[assignment]


def decoded_routes(text: Any, tokens: int, shape: RouterShape, *, of_server: bool) -> Routes:
    """Decode the routes of the first `tokens` tokens of a sequence.

    Args:
        text: base64 of the experts: int32 [tokens, layers, chosen] in a reply of SGLang, otherwise `Routes.encoded`.
        tokens: the expected number of tokens; a recording may also hold none.
        shape: routers of the model.
        of_server: whether `text` stands in a reply of SGLang.

    Raises:
        InvalidInputError: if it is not base64, holds more or fewer values, an expert that does not exist, or an expert
            twice for one token.
    """
    try:
        data = base64.b64decode(checked(text, str, "the routes").encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise InvalidInputError(f"the routes {describe(text)}, which are not base64") from error
    layers = shape.layers if of_server else len(shape.routed)
    dtype = np.dtype("<i4") if of_server else shape.dtype
    row = layers * shape.chosen * dtype.itemsize
    if not data and not of_server:
        tokens = 0
    if len(data) != tokens * row:
        raise InvalidInputError(
            f"{len(data)} bytes of routes instead of {tokens * row}: {tokens} tokens x {layers} layers x "
            f"{shape.chosen} experts x {dtype.itemsize} bytes"
        )
    experts = np.frombuffer(data, dtype).reshape(tokens, layers, shape.chosen)
    if of_server:
        experts = experts[:, list(shape.routed)]
    return checked_routes(experts, shape)


def checked_routes(experts: np.ndarray, shape: RouterShape) -> Routes:
    """Check routes, integers [n, routers, experts per token], and return them compactly.

    SGLang reports zeros for layers whose experts it did not record, so an expert that occurs twice is an error.
    """
    if experts.size and (experts.min() < 0 or experts.max() >= shape.experts):
        wrong = int(experts.min()) if experts.min() < 0 else int(experts.max())
        raise InvalidInputError(f"a route to expert {wrong} of a model with {shape.experts}")
    compact = experts.astype(shape.dtype)
    # Pairs of columns, each in consecutive memory: 15 times faster than sorting the experts of each token.
    columns = np.ascontiguousarray(compact.reshape(-1, shape.chosen).T)
    twice = np.zeros(columns.shape[1], bool)
    for first, second in combinations(columns, 2):
        twice |= first == second
    if twice.any():
        token, router = divmod(int(twice.argmax()), compact.shape[1])
        raise InvalidInputError(
            f"routes of token {token} in layer {shape.routed[router]} that name an expert twice: "
            f"{experts[token, router].tolist()}"
        )
    return Routes(compact)


@dataclass(frozen=True)
class BatchRoutes:
    """The routes of all sequences of a batch, one after the other.

    Attributes:
        experts: uint8 or int16 [rows, routers, experts per token].
        counts: int64 [N], tokens of each sequence that have routes: the first ones.
        routers: numbers of the routers among those of the model, ascending.
    """

    experts: Tensor
    counts: Tensor
    routers: tuple[int, ...]

    @classmethod
    def of(cls, routes: Sequence[Routes], routers: Sequence[int] | None = None) -> BatchRoutes:
        """Join the routes of N sequences: those of `routers`, or of all routers (None)."""
        numbers = tuple(range(routes[0].experts.shape[1])) if routers is None else tuple(routers)
        experts = np.concatenate([r.experts[:, list(numbers)] for r in routes])
        return cls(torch.from_numpy(experts), torch.tensor([len(r.experts) for r in routes]), numbers)

    def rows_of(self, sequences: Tensor, width: int) -> Tensor:
        """Return the row of `experts` of every position of `sequences`, int64 [n, width]; -1 where there is none."""
        first = (self.counts.cumsum(0) - self.counts)[sequences, None]
        column = torch.arange(width)
        return torch.where(column < self.counts[sequences, None], first + column, -1)


@dataclass
class MicrobatchRoutes:
    """The routes of a microbatch's tokens, selected only when they are moved to the device.

    Attributes:
        batch: those of the whole batch.
        rows: int64 [b, s], the row of every token in `batch`; -1 without a route.
    """

    batch: BatchRoutes
    rows: Tensor

    def select(self, routers: slice, share: int = 0, shares: int = 1) -> tuple[Tensor, Tensor]:
        """Select what one model chunk of one rank needs.

        Args:
            routers: numbers of the routers of the chunk.
            share, shares: the part of the positions that a rank of sequence parallelism holds, and the number of parts.

        Returns:
            experts [routers, T, experts per token], and bool [T], which of the T = s b tokens have a route, in
            megatron-core's order: position by position.
        """
        count = routers.stop - routers.start
        first = self.batch.routers.index(routers.start) if count else 0
        of_chunk = self.batch.experts[:, first : first + count]
        rows = self.rows.t().chunk(shares)[share].flatten()
        has_route = rows >= 0
        experts = of_chunk.new_zeros(len(rows), *of_chunk.shape[1:])
        experts[has_route] = of_chunk[rows[has_route]]
        return experts.transpose(0, 1).contiguous(), has_route
