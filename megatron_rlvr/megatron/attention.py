"""Core attention for the local layer spec, with torch's fused scaled-dot-product kernel.

megatron-core's `DotProductAttention` materialises the [batch, heads, queries, keys] scores and repeats the keys of
grouped queries. `SDPAttention` does neither. It also has the key/value cache of the local rollout engine, which stores
keys after the rotary embedding. megatron-core's static cache stores them before it, and rotates the whole cache again
for every new token.

Under context parallelism, every rank gathers all keys and values and computes its own queries. Transformer Engine's
attention splits sequences in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from megatron_rlvr.data.microbatch import zigzag
from megatron_rlvr.megatron import batch_invariance


class KeyValueCache:
    """Rotated keys and values of one layer.

    Args:
        capacity: tokens per sequence.

    Attributes:
        keys, values: [batch, key heads, capacity, head size], allocated by the first `append`.
        length: number of tokens in the cache.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [batch, key heads, new tokens, head size]; returns all keys and values as views."""
        if self.length == 0:
            self.keys, self.values = (x.new_empty(*x.shape[:2], self.capacity, x.size(3)) for x in (keys, values))
        end = self.length + keys.size(2)
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reorder(self, rows: Tensor, capacity: int) -> None:
        """Keep only the sequences `rows`, and allocate room for `capacity` tokens.

        Args:
            rows: int64, indices in the batch, which may repeat.
            capacity: tokens per sequence.
        """
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(len(rows), old.size(1), capacity, old.size(3))
            new[:, :, : self.length] = old[rows, :, : self.length]
            setattr(self, name, new)


class SDPAttention(MegatronModule):
    """Compute softmax(q k^T / sqrt(d)) v [s, b, heads * d] from q [s, b, heads, d] and k, v [s, b, key heads, d].

    Heads of values may be narrower than those of queries and keys. Without a mask, attention is causal. A mask is bool
    [b, 1, queries, keys]; as in megatron-core, True hides a key. Packed sequences (thd) have no batch
    dimension and attend only to themselves. Under context parallelism, s is this rank's share in the order of `zigzag`;
    the forward pass has one all-gather of keys and values, and the backward pass one reduce-scatter of their gradients.

    Attributes:
        cache: key/value cache of the local rollout engine; None in training.
        window: number of latest keys, its own included, that a query attends to; None for all.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_sizes: int,
    ):
        super().__init__(config=config)
        if config.attention_dropout:
            raise NotImplementedError("attention_dropout must be 0: RLVR needs the same probabilities in every pass")
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window: int | None = config.window_size[0] + 1 if windowed else None
        self.cache: KeyValueCache | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        if attention_bias is not None:
            raise NotImplementedError("SDPAttention does not support an attention bias")
        if packed_seq_params is not None:
            boundaries = packed_seq_params.cu_seqlens_q.tolist()
            return self._segments(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), boundaries).flatten(1)
        if self.config.context_parallel_size > 1 and self.cache is None:
            if attention_mask is not None:
                raise NotImplementedError("SDPAttention does not support a mask under context parallelism")
            full_width = query.size(0) * self.config.context_parallel_size
            return self._segments(query, key, value, [0, full_width]).flatten(2)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.cache is not None:
            k, v = self.cache.append(k, v)
        visible = None if attention_mask is None else ~attention_mask
        if self.window is not None and k.size(2) > self.window:
            # A mask of prompts is causal already, and one of a single new token hides only padding.
            causal = visible if visible is not None else True
            visible = _latest_keys(q.size(2), k.size(2), self.window, q.device) & causal
        context = self._attend(q, k, v, visible)
        return context.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _segments(self, query: Tensor, key: Tensor, value: Tensor, boundaries: Sequence[int]) -> Tensor:
        """Compute causal attention within each segment of the full width; arguments and result are [s, b, heads, d]."""
        size = self.config.context_parallel_size
        if size > 1:
            group = parallel_state.get_context_parallel_group()
            key_value = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=group)
            gathered_order = torch.cat([zigzag(boundaries, size, rank) for rank in range(size)])
            key_value = key_value.index_select(0, gathered_order.argsort().to(key_value.device))
            key, value = key_value.split([key.size(-1), value.size(-1)], dim=-1)
            rank = group.rank()
        contexts = []
        for start, end in pairwise(boundaries):
            if size == 1:
                contexts.append(self._causal(query[start:end], key[start:end], value[start:end]))
                continue
            chunk, first_query = (end - start) // (2 * size), start // size
            for number in (rank, 2 * size - 1 - rank):
                visible = slice(start, start + (number + 1) * chunk)
                contexts.append(self._causal(query[first_query : first_query + chunk], key[visible], value[visible]))
                first_query += chunk
        return torch.cat(contexts)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute causal attention of queries at the end of a segment to all its keys: [s, b, heads, d]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        queries, keys = q.size(2), k.size(2)
        mask = None
        if self.window is not None and keys > self.window:
            mask = _latest_keys(queries, keys, self.window, q.device)
        elif keys > queries:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        return self._attend(q, k, v, mask).permute(2, 0, 1, 3)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        """Compute attention [b, heads, queries, d] to the keys that `visible` marks; causal if it is None."""
        if batch_invariance.is_active():
            return batch_invariance.attention(q, k, v, visible, self.scale)
        narrower = q.size(3) - v.size(3)
        if narrower:  # without this, torch would use its kernel that materialises all scores
            v = pad(v, (0, narrower))
        context = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible,
            is_causal=visible is None and q.size(2) > 1,
            scale=self.scale,
            enable_gqa=k.size(1) != q.size(1),
        )
        return context[..., : context.size(3) - narrower]


def _latest_keys(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Return which keys the last `queries` positions attend to, their latest `window`: bool [queries, keys].

    Keys are counted by position in the batch. Padding is on the left or on the right, so it does not change distances.
    """
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance >= 0) & (distance < window)
