"""The policy network: megatron-core's GPTModel with a head that answers only where it is asked."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor


class PolicyModel(GPTModel):
    """A GPTModel whose last stage returns logits for chosen positions only.

    Prompt and padding positions never reach the vocabulary projection, and the logits come as the operators read
    them: one row a token, split over the tensor-parallel group, in the model's dtype.
    """

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
                None takes all. Read by the last stage.
            positions: int64 [b, s] rotary positions, or [s] of every sequence; None means 0 .. s-1 for every sequence.
            attention_mask: bool [b, 1, s, keys], True hides a key; None is causal.
            packed: where the packed sequences (b = 1) begin and end; None if padded.
            padding: bool [b, s], tokens that the router of a mixture of experts leaves out of its balance.
            hidden_only: the last stage returns the final hidden states [T, h] for the fused head instead of logits.

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
        """What sequence parallelism leaves to this rank, [b, s / tp]."""
        if padding is None or not self.config.sequence_parallel:
            return padding
        return padding.chunk(self.pg_collection.tp.size(), dim=1)[self.pg_collection.tp.rank()]

    def output_weight(self) -> Tensor:
        """The vocabulary projection of this tensor-parallel rank, [V / tp, h], without the rows that pad it."""
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        own = self.vocabulary - len(weight) * self.pg_collection.tp.rank()
        return weight if own >= len(weight) else weight[:own]

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [T, V / tp] of hidden states [T, h]."""
        weight = self.output_weight()
        return linear_with_grad_accumulation_and_async_allreduce(
            input=hidden,
            weight=weight,
            bias=None,
            # A part of the weight has no gradient buffer of its own to be added to.
            gradient_accumulation_fusion=self.config.gradient_accumulation_fusion and weight.is_leaf,
            # Under sequence parallelism the gather's backward already adds the partial gradients.
            allreduce_dgrad=self.config.tensor_model_parallel_size > 1 and not self.config.sequence_parallel,
            sequence_parallel=False,
            tp_group=self.pg_collection.tp,
        )


def packed_sequences(boundaries: Tensor | None, device: torch.device) -> PackedSeqParams | None:
    """What megatron-core wants to know of packed sequences, from int32 [n + 1] where they begin and end."""
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
