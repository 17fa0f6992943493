"""Core attention for the local layer spec, on torch's fused scaled-dot-product kernel.

megatron-core's own `DotProductAttention` materialises the [batch, heads, queries, keys] scores and repeats the keys of
grouped queries; this one does neither. It also holds the key/value cache of the local rollout engine, because it is
the one place that sees keys after the rotary embedding: megatron-core's static cache stores them before it and rotates
the whole cache again for every new token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class KeyValueCache:
    """Rotated keys and values of one layer, each [batch, key heads, capacity, head size]; `length` are filled."""

    def __init__(self, batch: int, heads: int, capacity: int, head_size: int, dtype: torch.dtype, device: torch.device):
        self.keys = torch.empty(batch, heads, capacity, head_size, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [batch, heads, new, head size] behind what is there; return all keys and values so far."""
        end = self.length + keys.size(2)
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reorder(self, rows: Tensor, capacity: int) -> None:
        """Keep batch rows `rows` (int64, may repeat) with room for `capacity` tokens."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(len(rows), old.size(1), capacity, old.size(3))
            new[:, :, : self.length] = old[rows, :, : self.length]
            setattr(self, name, new)


class SDPAttention(MegatronModule):
    """softmax(q k^T / sqrt(d)) v on q [s, b, heads, d] and k, v [s, b, key heads, d], giving [s, b, heads * d].

    Without a mask attention is causal. A mask is boolean [b, 1, queries, keys], megatron's way round: True hides a key.
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
    ):
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise NotImplementedError("SDPAttention does not split a sequence over ranks: set parallel.context to 1")
        if config.attention_dropout:
            raise NotImplementedError("SDPAttention has no dropout: RLVR needs the same probabilities in every pass")
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
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
        if attention_bias is not None or packed_seq_params is not None:
            raise NotImplementedError("SDPAttention takes neither an attention bias nor packed (thd) sequences")
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if self.cache is not None:
            k, v = self.cache.append(k, v)
        context = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attention_mask is None and q.size(2) > 1,
            scale=self.scale,
            enable_gqa=k.size(1) != q.size(1),
        )
        return context.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)
