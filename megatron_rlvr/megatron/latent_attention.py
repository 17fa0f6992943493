"""Multi-head latent attention (MLA, arXiv 2405.04434, section 2.1), the same for both kinds of layers.

Queries may pass through a latent of low rank; keys and values always do. A part of each query and key is rotated. All
heads share that part of their keys, which does not pass through the latent.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.post_training.modelopt.layers import Linear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor


class LatentProjection(Linear):
    """A projection to latents that all tensor-parallel ranks hold whole, as Transformer Engine's layers have it.

    The state that Transformer Engine expects of every linear layer in a checkpoint is empty, as in other local layers.
    """

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None:
        pass


multi_latent_attention.Linear = LatentProjection  # megatron-core refuses a class that it does not know
# megatron-core 0.16 infers this from the import of its own module, which succeeds without Transformer Engine.
multi_latent_attention.HAVE_TE = transformer_engine.HAVE_TE

LATENT_NORM_EPSILON = 1e-6
"""Of the norms of latents in transformers and in DeepSeek's published code, whatever ``rms_norm_eps`` is."""


class LatentAttention(MLASelfAttention):
    """megatron-core's latent attention under the rotation that the model computes for all of its layers.

    megatron-core's class computes angles itself, for positions 0 .. s-1. Generation needs the positions of each
    sequence, and packed or split sequences would make it wait for the GPU four times per layer.

    Args of `forward`:
        rotary_pos_emb: cosine and sine, from `latent_rotary`.
    """

    _rotary: Tensor | None = None

    def __init__(self, config: MLATransformerConfig, *arguments: Any, **named: Any):
        with_epsilon = copy.copy(config)
        with_epsilon.layernorm_epsilon = LATENT_NORM_EPSILON
        super().__init__(with_epsilon, *arguments, **named)
        self.config = config  # the local engine changes settings of the model's one configuration
        self.rotary_pos_emb = None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, rotary_pos_emb: Tensor | None = None, **named: Any
    ) -> Any:
        self._rotary = rotary_pos_emb
        try:
            return super().forward(hidden_states, attention_mask, **named)
        finally:
            self._rotary = None

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: Any = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return queries and keys [s, b, heads, nope + rope], values [s, b, heads, v], and both latents.

        Packed sequences have no dimension b.
        """
        config, rotary = self.config, self._rotary
        assert rotary is not None
        if config.q_lora_rank is None:
            query_latent, up_projection = hidden_states, self.linear_q_proj
        else:
            query_latent = self.q_layernorm(self.linear_q_down_proj(hidden_states)[0])
            up_projection = self.linear_q_up_proj
        # Both kinds of layers compute latents of this rank's tokens on every tensor-parallel rank, without splitting.
        joined = self.linear_kv_down_proj(hidden_states)[0]
        latent, shared_key = joined.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        latent = self.kv_layernorm(latent)
        # Each tensor-parallel rank has the gradient of its own heads; the backward passes of these sum them.
        if config.sequence_parallel:
            shared_key = gather_from_sequence_parallel_region(shared_key, group=self.tp_group)
        else:
            shared_key = copy_to_tensor_model_parallel_region(shared_key, group=self.tp_group)

        heads = self.num_attention_heads_per_partition
        query = up_projection(query_latent)[0].unflatten(-1, (heads, -1))
        key_value = self.linear_kv_up_proj(latent)[0].unflatten(-1, (heads, -1))
        query_content, query_rotary = query.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        key_content, value = key_value.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        key_rotary = rotate_pairs(shared_key.unsqueeze(-2), rotary).expand(-1, -1, heads, -1)
        query = torch.cat([query_content, rotate_pairs(query_rotary, rotary)], dim=-1)
        key = torch.cat([key_content, key_rotary], dim=-1)
        if packed_seq_params is not None:
            query, key, value = (x.squeeze(1) for x in (query, key, value))
        return query, key, value.contiguous(), query_latent, latent


def latent_rotary(angles: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """Return cosine and sine [2, s, b, 1, d / 2] of `angles` [s, b, 1, d], whose halves are equal, times `factor`."""
    half = angles[..., : angles.size(-1) // 2]
    return (torch.stack([half.cos(), half.sin()]) * factor).to(dtype)


def rotate_pairs(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate the pairs (x0, x1), (x2, x3), ... of `x` [s, b, heads, d]; first elements come first in the result.

    Queries and keys have the same order in it, so scores do not depend on it. transformers and megatron-core use it.
    """
    first, second = x[..., 0::2], x[..., 1::2]
    cosine, sine = rotary
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def packed_positions(boundaries: Tensor, width: int, size: int, rank: int) -> Tensor:
    """Return the position of every packed token in its sequence, int64 [width], without waiting for the GPU.

    Args:
        boundaries: int32 [n + 1], where the sequences begin and end in the full width.
        width: tokens on this rank.
        size, rank: size of the context-parallel group and rank in it, which holds the tokens of `zigzag`.
    """
    starts = boundaries.long() // size
    column = torch.arange(width, device=boundaries.device)
    sequence = torch.searchsorted(starts, column, right=True) - 1
    position = column - starts[sequence]
    if size == 1:
        return position
    chunk = (starts[sequence + 1] - starts[sequence]) // 2
    return position + torch.where(position < chunk, rank, 2 * size - 2 - rank) * chunk
