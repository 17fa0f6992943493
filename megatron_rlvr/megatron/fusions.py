"""Fused operations of Transformer Engine's layers: which of them are switched on, and whether they are installed.

A fusion is on wherever the layer has the operation that it fuses. The plan counts activations for exactly these
settings (`megatron_rlvr.planning.activations`), so one that is off would make a job need more memory than its plan.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.moe import moe_utils

from megatron_rlvr.doctor import SUPPORTED_TRANSFORMER_ENGINE
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import device

_NEEDED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "apply_rope_fusion": (rope_utils, ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd")),
    "moe_permute_fusion": (
        moe_utils,
        (
            "fused_permute",
            "fused_permute_with_probs",
            "fused_sort_chunks_by_index",
            "fused_sort_chunks_by_index_with_probs",
            "fused_unpermute",
        ),
    ),
    "moe_router_fusion": (moe_utils, ("fused_topk_with_score_function",)),
}
"""Where megatron-core keeps the functions of a fusion; they are missing or None if Transformer Engine has none."""


def fusion_settings(mixture: bool, router_aux_loss: float, latent: bool = False) -> dict[str, bool]:
    """Return the fields of TransformerConfig that fuse operations of Transformer Engine's layers.

    Args:
        mixture: whether the model is a mixture of experts.
        router_aux_loss: coefficient of the load-balancing loss.
        latent: whether attention is `LatentAttention`, which rotates queries and keys itself, without synchronizing.
    """
    settings = {
        # SwiGLU keeps its input and its product, 3 f per token, instead of 5 f.
        "bias_activation_fusion": True,
        # Unfused, packed sequences cost four synchronizations of the host with the GPU per layer.
        "apply_rope_fusion": not latent,
        # The gradient of a weight is added to the float32 buffer by the matrix multiplication that computes it.
        "gradient_accumulation_fusion": True,
        # There is no dropout and no bias after the linear layers, so this would compile one addition.
        "bias_dropout_fusion": False,
    }
    if mixture:
        settings |= {
            "moe_permute_fusion": True,
            # The fused load-balancing loss takes the number of tokens as an int, but where padding is masked
            # megatron-core passes a tensor.
            "moe_router_fusion": router_aux_loss == 0,
        }
    return settings


def check_fusions(settings: Mapping[str, Any]) -> None:
    """Refuse settings whose fused functions the installed Transformer Engine does not have.

    Raises:
        UserError: naming what is missing and what to install.
    """
    for name, (module, functions) in _NEEDED.items():
        missing = [function for function in functions if getattr(module, function, None) is None]
        if settings.get(name) and missing:
            raise UserError(
                f"Transformer Engine {_installed_version()} lacks what megatron-core calls {', '.join(missing)}: "
                f"install transformer-engine{SUPPORTED_TRANSFORMER_ENGINE}, built for this torch"
            )
    if settings.get("bias_activation_fusion") and device.on_gpu():
        _check_compiler()


def _check_compiler() -> None:
    """Refuse a GPU node on which torch.compile, which fuses SwiGLU in megatron-core, would fail in the first step."""
    if find_spec("triton") is None:
        raise UserError("megatron-core's fused SwiGLU needs triton, which is not installed: pip install triton")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise UserError(
            "megatron-core's fused SwiGLU needs a C compiler on every node, but PATH has neither gcc nor clang: "
            "install one, load its module, or set CC"
        )


def _installed_version() -> str:
    for name in ("transformer-engine", "transformer-engine-torch"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "(version unknown)"


def output_layer_is_fused() -> bool:
    """Whether the output layer can add the gradient of its weight to the gradient buffer: only with NVIDIA Apex.

    Transformer Engine's layers do this themselves. The output layer is megatron-core's, which calls Apex.
    """
    return layers._grad_accum_fusion_available


@contextmanager
def output_layer_without_apex() -> Iterator[None]:
    """Let megatron-core build its output layer under ``gradient_accumulation_fusion`` without Apex.

    It would refuse. The layer is only built, never called: `PolicyModel.project` computes the logits, and fuses the
    gradient only if `output_layer_is_fused`.
    """
    available = layers._grad_accum_fusion_available
    layers._grad_accum_fusion_available = True
    try:
        yield
    finally:
        layers._grad_accum_fusion_available = available
