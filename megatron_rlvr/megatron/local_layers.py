"""megatron-core's local layers with two pieces of them as one differentiable function each.

megatron-core joins the projections of queries, keys and values, and those of gate and up, and leaves it to fused
kernels of Transformer Engine that their parts are not copied apart and back together. Here the forward pass writes each
part once where it stays, and the backward pass writes the parts' gradients straight into that of the whole: a twentieth
of a small model's update on the CPU, and a sixth of what a layer keeps for its backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import silu


class LocalSelfAttention(SelfAttention):
    """Self-attention that splits queries, keys and values and rotates the first two in one pass."""

    _rotary: Tensor | None = None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **arguments: Any) -> Any:
        rotary = arguments.get("rotary_pos_emb")
        if rotary is not None and not isinstance(rotary, tuple) and self._can_rotate(rotary, arguments):
            self._rotary, arguments["rotary_pos_emb"] = rotary, None  # for the call that comes from within this one
        try:
            return super().forward(hidden_states, attention_mask, **arguments)
        finally:
            self._rotary = None

    def _can_rotate(self, rotary: Tensor, arguments: dict[str, Any]) -> bool:
        """Whether `rotary` has an angle of every position and dimension, and every rank has whole groups of heads."""
        return (
            arguments.get("packed_seq_params") is None
            and not self.config.rotary_interleaved
            and rotary.size(-1) == self.hidden_size_per_attention_head
            and self.config.num_query_groups >= self.world_size
            and not self.config.qk_layernorm
        )

    def get_query_key_value_tensors(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        if self._rotary is None:
            return super().get_query_key_value_tensors(hidden_states, *arguments, **named)
        mixed, sizes = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        angles = self._rotary[..., : self._rotary.size(-1) // 2].unsqueeze(-2)  # its halves are the same
        return SplitAndRotate.apply(mixed, angles.cos().to(mixed.dtype), angles.sin().to(mixed.dtype), sizes)


class SplitAndRotate(torch.autograd.Function):
    """Queries, keys and values out of one tensor, queries and keys rotated (RoFormer, arXiv 2104.09864).

    ``mixed`` [s, b, groups, (r + 2) d] holds, a group, r query heads, a key and a value head of d; ``cosine`` and
    ``sine`` [s, 1 or b, 1, 1, d / 2]; ``sizes`` are r d, d, d. Gives [s, b, groups r, d] and twice [s, b, groups, d],
    each contiguous. A head's halves (a, b) become (a cos - b sin, b cos + a sin).
    """

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, cosine: Tensor, sine: Tensor, sizes: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cosine, sine)
        ctx.sizes = sizes
        query, key, value = (_heads(part, sizes[1]) for part in mixed.split(sizes, dim=-1))
        rotated = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in (query, key)]
        for part, out in zip((query, key), rotated, strict=True):
            _rotate(part, cosine, sine, out)
        return rotated[0].flatten(2, 3), rotated[1].flatten(2, 3), value.flatten(2, 3).contiguous()

    @staticmethod
    def backward(ctx: Any, of_query: Tensor, of_key: Tensor, of_value: Tensor) -> tuple[Tensor, None, None, None]:
        cosine, sine = ctx.saved_tensors
        heads, groups = ctx.sizes[0] // ctx.sizes[1], of_key.size(2)
        gradient = of_key.new_empty(*of_key.shape[:3], sum(ctx.sizes))
        query, key, value = (_heads(part, ctx.sizes[1]) for part in gradient.split(ctx.sizes, dim=-1))
        _rotate(of_query.unflatten(2, (groups, heads)), cosine, -sine, query)
        _rotate(of_key.unsqueeze(3), cosine, -sine, key)
        value.copy_(of_value.unsqueeze(3))
        return gradient, None, None, None


def _heads(part: Tensor, size: int) -> Tensor:
    """[s, b, groups, heads d] as [s, b, groups, heads, d]."""
    return part.unflatten(-1, (-1, size))


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor, out: Tensor) -> None:
    a, b = heads.chunk(2, dim=-1)
    to_a, to_b = out.chunk(2, dim=-1)
    torch.mul(a, cosine, out=to_a).addcmul_(b, sine, value=-1)
    torch.mul(b, cosine, out=to_b).addcmul_(a, sine)


class GatedSiLU(MegatronModule):
    """silu(gate) * up of ``both`` [..., 2 f], gate first: [..., f] (SwiGLU, arXiv 2002.05202).

    Stands where megatron-core has Transformer Engine's activations (`use_te_activation_func`).
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config=config)
        if config.activation_func is not silu or not config.gated_linear_unit:
            raise NotImplementedError("the local layers know silu(gate) * up alone")

    def forward(self, both: Tensor) -> Tensor:
        return _GatedSiLU.apply(both)


class _GatedSiLU(torch.autograd.Function):
    """Keeps its input alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, of_product: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, dim=-1)
        gradient = torch.empty_like(both)
        of_gate, of_up = gradient.chunk(2, dim=-1)
        torch.mul(of_product, silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(of_product * up, gate, grad_input=of_gate)
        return gradient
