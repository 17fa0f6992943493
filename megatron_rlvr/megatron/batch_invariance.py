"""Forward passes on the CPU in which a token's result does not depend, in any bit, on what else is in its batch.

A matrix product sums in another order when its shape is another. So a token's log-prob differs by about 1e-6 between
generation, which computes one token per sequence, and scoring, which computes whole sequences; and a little between two
ways of forming microbatches. Here every product is computed in blocks of a fixed shape, and attention in blocks of
queries and keys that begin at fixed positions of the sequence. Keys that a query does not see add exact zeros.

The idea is that of batch-invariant kernels (He et al., "Defeating Nondeterminism in LLM Inference", 2025). That a row
of a block does not depend on its place in the block is a property of the CPU's matrix library: `check_products` tests
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_rlvr.errors import UserError

_ROWS = 32
"""Rows of a matrix product."""
_COLUMNS = 2048
"""Columns of a matrix product, as in `ops.vocab_projection`, which computes the output layer in parts of this width."""
_QUERIES, _KEYS = 16, 64
"""Queries and keys of a block of attention."""

_active = False


@contextmanager
def batch_invariant(enabled: bool) -> Iterator[None]:
    """Compute every forward pass in the block with blocks of fixed shapes, if `enabled`."""
    global _active
    if not enabled:
        yield
        return
    before, _active = _active, True
    try:
        with _FixedBlocks():
            yield
    finally:
        _active = before


def is_active() -> bool:
    """Whether this process is in a block of `batch_invariant`."""
    return _active


class _FixedBlocks(TorchDispatchMode):
    """Computes matrix products in blocks of `_ROWS` rows. Gradients are computed so, too, which does them no harm."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        aten, named = torch.ops.aten, dict(kwargs or {})
        if func is aten.mm.default and not named:
            return product(*args)
        if func is aten.mm.out:
            return named["out"].copy_(product(*args))
        if func is aten.addmm.default and not named:
            bias, a, b = args
            return product(a, b).add_(bias)
        return func(*args, **named)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b [m, n] of matrices [m, k] and [k, n]. A row depends on that row of `a` alone."""
    rows, columns = a.size(0), b.size(1)
    padded = pad(a, (0, 0, 0, -rows % _ROWS))
    result = a.new_empty(padded.size(0), columns)
    for start in range(0, padded.size(0), _ROWS):
        for left in range(0, columns, _COLUMNS):
            block = slice(start, start + _ROWS), slice(left, left + _COLUMNS)
            result[block] = torch.mm(padded[block[0]], b[:, block[1]])
    return result[:rows]


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Compute softmax(scale q k^T) v [b, heads, queries, d].

    Args:
        q: [b, heads, queries, d].
        k, v: [b, key heads, keys, d], the first key of each sequence first.
        visible: bool, broadcastable to [b, 1, queries, keys]: keys that a query sees; None means all keys for a single
            query, and the keys up to its own for as many queries as keys.
        scale: factor of the scores.
    """
    queries, keys = q.size(2), k.size(2)
    if visible is None:
        visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
        visible = visible.tril() if queries > 1 else visible
    more_queries, more_keys = -queries % _QUERIES, -keys % _KEYS
    visible = pad(visible.expand(*visible.shape[:-2], queries, keys), (0, more_keys))
    visible = pad(visible, (0, 0, 0, more_queries), value=True)  # without a visible key, softmax would be 0 / 0
    blocks_q, blocks_k = (queries + more_queries) // _QUERIES, (keys + more_keys) // _KEYS
    visible = visible.unflatten(-2, (blocks_q, _QUERIES)).unflatten(-1, (blocks_k, _KEYS)).transpose(-3, -2)
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
    q = pad(q, (0, 0, 0, more_queries)).unflatten(2, (blocks_q, 1, _QUERIES))
    k, v = (pad(x, (0, 0, 0, more_keys)).unflatten(2, (1, blocks_k, _KEYS)) for x in (k, v))
    # [b, heads, query blocks, key blocks, queries, keys]
    scores = _batched(q, k.transpose(-2, -1)).mul(scale).masked_fill(~visible, -torch.inf)
    weight = (scores - scores.amax((-3, -1), keepdim=True)).exp()
    parts, sums = _batched(weight, v), weight.sum(-1, keepdim=True)
    context, total = parts[:, :, :, 0], sums[:, :, :, 0]
    for block in range(1, blocks_k):  # in this order; blocks after the last visible key add zeros
        context, total = context + parts[:, :, :, block], total + sums[:, :, :, block]
    return (context / total).flatten(2, 3)[:, :, :queries]


def _batched(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of matrices in the last two dimensions, with broadcasting, contiguous."""
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (a, b))
    return torch.bmm(a, b).unflatten(0, batch)


def check_products(weights: Iterable[Tensor]) -> None:
    """Test, for the shape of every weight, that a row of a block does not depend on its place or the other rows.

    Args:
        weights: the weights of linear layers, [n, k].

    Raises:
        UserError: if it does.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(_ROWS, generator=generator)
    for weight in {weight.shape: weight.detach() for weight in weights}.values():
        if weight.is_cuda:
            raise UserError("model.batch_invariant computes on the CPU only: set it to false on a GPU")
        rows = torch.randn(_ROWS, weight.size(1), generator=generator).to(weight.dtype)
        others = torch.randn(_ROWS, weight.size(1), generator=generator).to(weight.dtype)
        expected = product(rows, weight.t())
        mixed = torch.where((order < _ROWS // 2)[:, None], rows[order], others)
        found = product(mixed, weight.t())[order < _ROWS // 2]
        if not torch.equal(found, expected[order[order < _ROWS // 2]]):
            raise UserError(
                f"model.batch_invariant: with this CPU, a row of a product with a weight {list(weight.shape)} depends "
                "on the other rows: set it to false"
            )
