"""The policy network: megatron-core's GPTModel with logits of selected positions only."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import (
    linear_with_frozen_weight,
    linear_with_grad_accumulation_and_async_allreduce,
)
from torch import Tensor

from megatron_rlvr.data.routes import MicrobatchRoutes
from megatron_rlvr.megatron import device
from megatron_rlvr.megatron.fusions import output_layer_is_fused
from megatron_rlvr.megatron.latent_attention import latent_rotary, packed_positions
from megatron_rlvr.megatron.routing_replay import RoutingReplay


class PolicyModel(GPTModel):
    """One pipeline stage, or virtual stage, of a GPTModel.

    The vocabulary projection skips prompt and padding positions. Its logits have the form that the operators expect:
    one row per token, split over the tensor-parallel group, in the model's dtype.

    Attributes:
        vocabulary: vocabulary size without the rows that pad the embedding; set by `PolicyBridge.build`.
        embedding_scale: factor of the embeddings; set by `PolicyBridge.build`.
        adapted: whether the weights are frozen and adapters are trained (`lora.py`).
        rotary_factor: factor of the rotated part of queries and keys in latent attention; set by `PolicyBridge.build`.
        routing: replays and records the routes of this chunk; None unless ``rollout.routing_replay`` is set.
    """

    vocabulary: int
    embedding_scale: float = 1.0
    adapted: bool = False
    rotary_factor: float = 1.0
    routing: RoutingReplay | None = None

    def forward(
        self,
        tokens: Tensor,
        rows: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        packed: PackedSeqParams | None = None,
        padding: Tensor | None = None,
        routes: MicrobatchRoutes | None = None,
        hidden_only: bool = False,
    ) -> Tensor:
        """Run this pipeline stage.

        Args:
            tokens: int64 [b, s].
            rows: int64 [T], indices (``position * b + sequence``) of the positions that get logits; None means all.
                Only the last stage reads it.
            positions: int64, rotary positions of every token [b, s], or [s] for all sequences; None means 0 .. s-1.
            attention_mask: bool [b, 1, s, keys], True hides a key; None means causal attention.
            packed: where the packed sequences (b = 1) begin and end; None if padded.
            padding: bool [b, s], tokens that the load-balancing loss of a mixture of experts must ignore.
            routes: the experts that the routers must use, on the host; None if they choose.
            hidden_only: return final hidden states instead of logits on the last stage, for the fused head.

        Returns:
            logits [T, V / tp], or hidden states [T, h] with `hidden_only`, on the last stage; hidden states [s, b, h]
            on the other stages.
        """
        decoder_input, rotary, *_ = self._preprocess(tokens, positions, packed_seq_params=packed)
        if decoder_input is not None and self.embedding_scale != 1.0:
            # The factor has the dtype of the weights, as in transformers.
            decoder_input = decoder_input * decoder_input.new_tensor(self.embedding_scale)
        if decoder_input is not None and self.config.recompute_granularity and torch.is_grad_enabled():
            # The output of a recomputed module has a gradient only if its input has one. A frozen embedding has none.
            decoder_input.requires_grad_()
        rotary = self._rotary(rotary, tokens, positions, packed)
        with self.routing.forward_pass(routes) if self.routing is not None else nullcontext():
            hidden = self.decoder(
                hidden_states=decoder_input,
                attention_mask=attention_mask,
                rotary_pos_emb=rotary,
                packed_seq_params=packed,
                padding_mask=self._local_padding(padding),
            )
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=not hidden_only, group=self.pg_collection.tp
            )
        hidden = hidden.flatten(0, 1)
        if rows is not None:
            hidden = hidden.index_select(0, rows)
        return hidden if hidden_only else self.project(hidden)

    def _rotary(self, rotary: Any, tokens: Tensor, positions: Tensor | None, packed: PackedSeqParams | None) -> Any:
        """Return what the layers rotate by: `rotary`, which megatron-core made for 0 .. s-1, or that of `positions`."""
        latent = self.config.multi_latent_attention
        if latent and positions is None:
            positions = self._positions(tokens, packed)
        if positions is not None:
            # The positions of a training microbatch end with its width. Reading their largest would wait for the GPU.
            width = tokens.size(1) * self.config.context_parallel_size
            longest = width if positions.dim() == 1 else int(positions.max()) + 1
            angles = self.rotary_pos_emb(longest)[:, 0, 0][positions]  # [b, s, d] or [s, d]
            rotary = angles[:, None, None] if positions.dim() == 1 else angles.transpose(0, 1).unsqueeze(2)
        return latent_rotary(rotary, self.rotary_factor, self.config.params_dtype) if latent else rotary

    def _positions(self, tokens: Tensor, packed: PackedSeqParams | None) -> Tensor:
        """Return the positions of this rank's tokens in their sequences, int64 [s], for latent attention."""
        width = tokens.size(1)
        if packed is None:
            return torch.arange(width, device=tokens.device)
        group = self.pg_collection.cp
        return packed_positions(packed.cu_seqlens_q, width, group.size(), group.rank())

    def _local_padding(self, padding: Tensor | None) -> Tensor | None:
        """Return this rank's share of `padding`: [b, s / tp] under sequence parallelism, otherwise all of it."""
        if padding is None or not self.config.sequence_parallel:
            return padding
        return padding.chunk(self.pg_collection.tp.size(), dim=1)[self.pg_collection.tp.rank()]

    def output_weight(self) -> Tensor:
        """Return the vocabulary projection of this tensor-parallel rank, [V / tp, h], without padding rows."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        local_vocabulary = self.vocabulary - len(weight) * self.pg_collection.tp.rank()
        return weight if local_vocabulary >= len(weight) else weight[:local_vocabulary]

    def project(self, hidden: Tensor) -> Tensor:
        """Compute logits [T, V / tp] from hidden states [T, h]."""
        weight = self.output_weight()
        trained = linear_with_grad_accumulation_and_async_allreduce
        return (trained if weight.requires_grad else linear_with_frozen_weight)(
            input=hidden,
            weight=weight,
            bias=None,
            # A slice of the weight has no gradient buffer to add to.
            gradient_accumulation_fusion=self.config.gradient_accumulation_fusion
            and output_layer_is_fused()
            and weight.is_leaf,
            # Under sequence parallelism, the backward pass of the gather sums the partial gradients.
            allreduce_dgrad=self.config.tensor_model_parallel_size > 1 and not self.config.sequence_parallel,
            sequence_parallel=False,
            tp_group=self.pg_collection.tp,
        )


def packed_sequences(
    boundaries: Tensor | None, target: torch.device, longest: int | None = None
) -> PackedSeqParams | None:
    """Return megatron-core's description of packed sequences with boundaries int32 [n + 1]; None for padded ones.

    Args:
        boundaries: where the sequences begin and end, on the host.
        target: where the model computes.
        longest: an upper bound of their lengths; None takes the longest.
    """
    if boundaries is None:
        return None
    longest = longest or int(boundaries.diff().max())
    boundaries = device.to_device(boundaries, target)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
