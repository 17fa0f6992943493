"""Layers whose attention and feed-forward outputs are normalized before they are added to the residual stream.

megatron-core's transformer layer has no place for these norms, so they are part of the modules whose output they take.
Gemma 3, the family that has them, also rotates its kinds of layers by different angles; its attention selects its own.
"""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import is_layer_window_attention, sharded_state_dict_default

from megatron_rlvr.megatron.rotary import angles_of_kind


def add_post_norms(layer: ModuleSpec, norm: type) -> None:
    """Change the spec of a layer so that its attention and its feed-forward layer end with a norm.

    Args:
        layer: spec of a transformer layer with a dense feed-forward layer.
        norm: class of the norms.
    """
    attention, mlp = layer.submodules.self_attention, layer.submodules.mlp
    attention.module = type(f"PostNorm{attention.module.__name__}", (_Attention, attention.module), {"norm": norm})
    # A class instead of a spec: of a spec with a module that megatron-core does not know, it warns.
    settings = {"norm": norm, "submodules": mlp.submodules}
    layer.submodules.mlp = type(f"PostNorm{mlp.module.__name__}", (_FeedForward, mlp.module), settings)


class _PostNorm:
    """Normalizes the output of the class that follows it in the order of resolution."""

    norm: type
    config: Any
    _modules: dict[str, Any]

    def __init__(self, config: Any, *arguments: Any, **named: Any):
        super().__init__(config, *arguments, **named)  # type: ignore[call-arg]
        self.post_layernorm = self.norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        output, bias = super().forward(*arguments, **named)  # type: ignore[misc]
        return self.post_layernorm(output), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        # megatron-core asks every module of a feed-forward layer for its own, which a norm does not have.
        norm = self._modules.pop("post_layernorm")
        try:
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        finally:
            self._modules["post_layernorm"] = norm
        # Without a group, every tensor-parallel rank would claim to be the one that saves the norm.
        tp_group = parallel_state.get_tensor_model_parallel_group()
        return state | sharded_state_dict_default(norm, f"{prefix}post_layernorm.", sharded_offsets, metadata, tp_group)


class _FeedForward(_PostNorm):
    submodules: Any  # megatron-core passes this attribute of a class to its constructor

    def __init__(self, config: Any, **named: Any):
        super().__init__(config, tp_group=parallel_state.get_tensor_model_parallel_group(), **named)


class _Attention(_PostNorm):
    layer_number: int

    def forward(self, *arguments: Any, **named: Any) -> Any:
        config = self.config
        if (rotary := named.get("rotary_pos_emb")) is not None:
            kinds = rotary.size(-1) // config.kv_channels
            # In the order of `rope_parameters`, full attention comes before sliding attention.
            windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number)
            named["rotary_pos_emb"] = angles_of_kind(rotary, int(windowed), kinds)
        return super().forward(*arguments, **named)
