"""The policy network: megatron-core's GPTModel, which returns logits of chosen positions only."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor


class PolicyModel(GPTModel):
    """One pipeline stage of a GPTModel, or one virtual stage of it.

    The vocabulary projection skips prompt and padding positions. Its logits have the form that the operators read: one
    row per token, split over the tensor-parallel group, in the model's dtype.

    Attributes:
        vocabulary: number of tokens, without the rows that pad the embedding; set by `PolicyBridge.build`.
    """

    vocabulary: int

    def forward(
        self,
        tokens: Tensor,
        rows: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        packed: PackedSeqParams | None = None,
        padding: Tensor | None = None,
        hidden_only: bool = False,
    ) -> Tensor:
        """Run this pipeline stage.

        Args:
            tokens: int64 [b, s].
            rows: int64 [T], indices into the flattened [s * b] positions (``position * b + sequence``) that get logits;
                None takes all. Only the last stage reads it.
            positions: int64, rotary positions of every token [b, s], or [s] for all sequences; None is 0 .. s-1.
            attention_mask: bool [b, 1, s, keys], True hides a key; None is causal.
            packed: where the packed sequences (b = 1) begin and end; None if padded.
            padding: bool [b, s], tokens that the load-balancing loss of a mixture of experts must ignore.
            hidden_only: the last stage returns final hidden states instead of logits, for the fused head.

        Returns:
            hidden states [s, b, h] before the last stage; on it logits [T, V / tp] or hidden states [T, h].
        """
        decoder_input, rotary, *_ = self._preprocess(tokens, positions, packed_seq_params=packed)
        if positions is not None:
            longest = int(positions.max()) + 1
            angles = self.rotary_pos_emb(longest)[:, 0, 0][positions]  # [b, s, d] or [s, d]
            rotary = angles[:, None, None] if positions.dim() == 1 else angles.transpose(0, 1).unsqueeze(2)
        hidden = self.decoder(
            hidden_states=decoder_input,
            attention_mask=attention_mask,
            rotary_pos_emb=rotary,
            packed_seq_params=packed,
            padding_mask=self._own_padding(padding),
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

    def _own_padding(self, padding: Tensor | None) -> Tensor | None:
        """This rank's share of `padding` under sequence parallelism, [b, s / tp]."""
        if padding is None or not self.config.sequence_parallel:
            return padding
        return padding.chunk(self.pg_collection.tp.size(), dim=1)[self.pg_collection.tp.rank()]

    def output_weight(self) -> Tensor:
        """The vocabulary projection of this tensor-parallel rank, [V / tp, h], without the rows that pad it."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        own_tokens = self.vocabulary - len(weight) * self.pg_collection.tp.rank()
        return weight if own_tokens >= len(weight) else weight[:own_tokens]

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [T, V / tp] of hidden states [T, h]."""
        weight = self.output_weight()
        return linear_with_grad_accumulation_and_async_allreduce(
            input=hidden,
            weight=weight,
            bias=None,
            # A slice of the weight has no gradient buffer to add to.
            gradient_accumulation_fusion=self.config.gradient_accumulation_fusion and weight.is_leaf,
            # Under sequence parallelism the backward pass of the gather adds up the partial gradients.
            allreduce_dgrad=self.config.tensor_model_parallel_size > 1 and not self.config.sequence_parallel,
            sequence_parallel=False,
            tp_group=self.pg_collection.tp,
        )


def packed_sequences(boundaries: Tensor | None, device: torch.device) -> PackedSeqParams | None:
    """megatron-core's description of packed sequences, from int32 [n + 1] boundaries; None for padded ones."""
    if boundaries is None:
        return None
    longest = int(boundaries.diff().max())
    boundaries = boundaries.to(device)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
