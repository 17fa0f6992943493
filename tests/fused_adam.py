"""Train as `train_each.py` does, with a stand-in for Apex: the interface and the arithmetic of its FusedAdam.

Its state differs from that of torch's Adam: there is one step count per parameter group, and the state of a parameter
holds moments only. Transformer Engine's FusedAdam keeps its state alike. Usage: ``fused_adam.py RUN...``, where
a run is the JSON list of a trainer's arguments.
"""

from __future__ import annotations

import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    """AdamW that keeps its state as Apex does."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **_unused: Any,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                mean = state["exp_avg"].lerp_(parameter.grad, 1 - first)
                square = state["exp_avg_sq"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
                root = (square / (1 - second ** group["step"])).sqrt_().add_(group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(mean, root, value=-group["lr"] / (1 - first ** group["step"]))


def install() -> None:
    apex, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    for module in (apex, optimizers):
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    optimizers.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    optimizers.FusedSGD = torch.optim.SGD  # type: ignore[attr-defined]


if __name__ == "__main__":
    install()
    runpy.run_path(str(Path(__file__).with_name("train_each.py")))
    from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER, Adam

    assert Adam is FusedAdam and not USING_PYTORCH_OPTIMIZER
