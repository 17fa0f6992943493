"""The operators of other libraries, as contenders of this project's operators in benchmark_ops.py.

A library that is not installed is named and left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import SimpleNamespace

import torch
from contenders import Contender
from torch import Tensor

from megatron_rlvr import ops

THRESHOLDS = SimpleNamespace(
    upper=SimpleNamespace(slope=-0.25, intercept=0.5), lower=SimpleNamespace(slope=-0.13, intercept=0.3)
)


def peer_statistics() -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Log-prob and entropy as other trainers compute them from logits, both with gradient."""
    peers: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}
    try:
        trl = importlib.import_module("trl.trainer.utils")
        peers["trl selective_log_softmax_and_entropy"] = lambda x, t: trl.selective_log_softmax_and_entropy(x, t)
    except ImportError as error:
        print(f"trl: not measured ({error})")
    try:
        verl = importlib.import_module("verl.utils.torch_functional")
        peers["verl logprobs_from_logits + entropy_from_logits"] = lambda x, t: (
            verl.logprobs_from_logits(x, t),
            verl.entropy_from_logits(x),
        )
    except ImportError as error:
        print(f"verl: not measured ({error})")
    return peers


def linear_peers(hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantage: Tensor) -> list[Contender]:
    """Losses from hidden states and weight as other libraries compute them, with gradients to both."""
    peers: list[Contender] = []

    def prepare() -> tuple[Tensor, Tensor]:
        return hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    try:
        liger = importlib.import_module("liger_kernel.chunked_loss")
        loss = liger.LigerFusedLinearGRPOLoss(beta=0.0, compiled=hidden.is_cuda, use_ref_model=False, loss_type="grpo")
        shape = (16, hidden.shape[0] // 16)

        def run_liger(h: Tensor, w: Tensor) -> tuple:
            out = loss(
                h.view(*shape, -1),
                w,
                targets.view(shape),
                torch.ones(shape),
                advantage[: shape[0]],
                old_per_token_logps=old.view(shape),
            )
            out[0].backward()
            return h.grad, w.grad

        peers.append(
            Contender("liger-kernel LigerFusedLinearGRPOLoss (no entropy)", prepare, run_liger, peer="liger-kernel")
        )
    except ImportError as error:
        print(f"liger-kernel: not measured ({error})")
    try:
        cce = importlib.import_module("cut_cross_entropy")

        def run_cce(h: Tensor, w: Tensor) -> tuple:
            nll = cce.linear_cross_entropy(h, w, targets, reduction="none", impl=implementation)
            nll.sum().backward()
            return h.grad, w.grad

        implementation = "cce" if hidden.is_cuda else "torch_compile"
        peers.append(
            Contender(f"cut-cross-entropy {implementation} (no entropy)", prepare, run_cce, peer="cut-cross-entropy")
        )
    except ImportError as error:
        print(f"cut-cross-entropy: not measured ({error})")
    if hidden.is_cuda:
        try:
            kernels = importlib.import_module("verl.utils.kernel.linear_cross_entropy")

            def run_verl(h: Tensor, w: Tensor) -> tuple:
                logprob, _ = kernels.linear_cross_entropy(h, w, targets, 1.0, "none")
                (-ops.clipped_objective(logprob.view(-1), old, advantage, THRESHOLDS).objective.sum()).backward()
                return h.grad, w.grad

            peers.append(Contender("verl linear_cross_entropy", prepare, run_verl, peer="verl"))
        except ImportError as error:
            print(f"verl: not measured ({error})")
    return peers
