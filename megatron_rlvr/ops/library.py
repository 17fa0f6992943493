"""Registers operators with torch, under ``torch.ops.megatron_rlvr``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import compiled

NAMESPACE = "megatron_rlvr"

_library = torch.library.Library(NAMESPACE, "DEF")  # kept alive: torch drops the operators of a collected library


def define(
    schema: str,
    *,
    eager: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable[[Any, tuple, Any], None] | None = None,
    has_kernel: bool = True,
) -> None:
    """Define an operator: ``schema`` is its name, arguments and results in torch's notation.

    The compiled library holds kernels for CPU and CUDA tensors, which take precedence over ``eager``; where it has
    none, ``eager`` runs. ``fake`` gives shapes and types to FakeTensor and torch.compile. ``backward`` and
    ``setup_context`` are the autograd formula, as for torch.library.register_autograd. ``has_kernel=False`` means that
    the operator is composed of others. Raises ImportError if the compiled library lacks a kernel that it should have:
    it was built from other sources, and running the rest of it would mix two versions.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if has_kernel:
        compiled.require_kernel(f"{NAMESPACE}::{name}")
    _library.impl(name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library)
