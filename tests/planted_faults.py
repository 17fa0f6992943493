"""A local engine that samples with a planted fault: other weights, another precision, or another distribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.rollout.engines.base import GroupRequest, OnGroup
from megatron_rlvr.rollout.engines.local import LocalEngine
from megatron_rlvr.rollout.sampling import SamplingSettings, draw

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Fault:
    """What an engine does wrong.

    Attributes:
        weights: the weights that it samples with, from the current ones and those of one step before.
        age: how many steps old its weights are, as the completions say.
        temperature, top_p, top_k: how it samples, whatever it is asked for.
        reports_own: whether its log-probs are those of the distribution that it samples from, or of the whole one at
            temperature 1.
    """

    weights: Callable[[Weights, Weights], Weights] = lambda current, before: current
    age: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    reports_own: bool = True


def noise(scale: float) -> Callable[[Weights, Weights], Weights]:
    """Matrices with noise of `scale` times their standard deviation."""

    def add(current: Weights, before: Weights) -> Weights:
        generator = torch.Generator().manual_seed(0)
        return {
            name: w + scale * w.std() * torch.randn(w.shape, generator=generator) if w.dim() > 1 else w
            for name, w in current.items()
        }

    return add


def in_float8(current: Weights, before: Weights) -> Weights:
    """Matrices rounded to float8 (e4m3) with one scale per 128 x 128 block, as SGLang serves them."""
    rounded = {}
    for name, weight in current.items():
        rounded[name] = weight.clone()
        if weight.dim() == 2:
            for rows in rounded[name].split(128):
                for block in rows.split(128, dim=1):
                    scale = block.abs().max().clamp(min=1e-12) / 448
                    block.copy_((block / scale).to(torch.float8_e4m3fn).float() * scale)
    return rounded


def stale_layer(current: Weights, before: Weights) -> Weights:
    """The first layer as it was one step before."""
    return {name: before[name] if ".layers.0." in name else w for name, w in current.items()}


def exchanged_layers(current: Weights, before: Weights) -> Weights:
    """The first two layers exchanged."""
    numbers = {".layers.0.": ".layers.1.", ".layers.1.": ".layers.0."}
    found = {name: next((part for part in numbers if part in name), None) for name in current}
    return {name: current[name.replace(part, numbers[part]) if part else name] for name, part in found.items()}


def permuted_expert(current: Weights, before: Weights) -> Weights:
    """The first two experts of every layer exchanged."""
    return {name: current[_exchanged(name)] for name in current}


def _exchanged(name: str) -> str:
    parts = name.split("local_experts.")
    if len(parts) == 1 or parts[1][:2] not in ("0.", "1."):
        return name
    return f"{parts[0]}local_experts.{1 - int(parts[1][0])}{parts[1][1:]}"


FAULTS = {
    "other-weights": Fault(noise(0.28)),
    "fp8": Fault(in_float8),
    "fp8-as-reported": Fault(noise(0.13)),
    "top-p": Fault(top_p=0.9),
    "top-p-unseen": Fault(top_p=0.9, reports_own=False),
    "top-k": Fault(top_k=5),
    "temperature": Fault(temperature=0.9),
    "temperature-unseen": Fault(temperature=0.9, reports_own=False),
    "hot-unseen": Fault(temperature=1.1, reports_own=False),
    "stale-layer": Fault(stale_layer),
}
HEALTHY = {
    "healthy": Fault(),
    "bf16": Fault(lambda current, before: {name: w.bfloat16().float() for name, w in current.items()}),
    "stale-2": Fault(age=2),
}


class FaultyEngine(LocalEngine):
    """A local engine whose rollouts have a fault from step `start` on."""

    def __init__(self, model_chunks: Sequence[torch.nn.Module], batch: int, fault: Fault, start: int = 0):
        super().__init__(model_chunks, batch)  # type: ignore[arg-type]
        self.fault, self.start, self.planted = fault, start, False
        self.history: list[Weights] = [self._weights()]

    def update_weights(self, version: int) -> dict[str, float]:
        self.history = [*self.history, self._weights()][-4:]
        return super().update_weights(version)

    def generate(
        self, requests: Sequence[GroupRequest], sampling: SamplingSettings, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        place = requests[0].place
        self.planted = place is not None and place[0] >= self.start
        if not self.planted:
            return super().generate(requests, sampling, on_group)
        age = min(self.fault.age, len(self.history) - 1)
        current, before = self.history[-1 - age], self.history[max(-len(self.history), -2 - age)]
        with self._sampling_with(self.fault.weights(current, before)):
            groups = super().generate(requests, sampling, on_group)
        version = self.version - age
        return [[replace(completion, weight_version=version) for completion in group] for group in groups]

    def _draw(
        self, logits: Tensor | None, uniform: np.ndarray, sampling: SamplingSettings
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if not self.planted:
            return super()._draw(logits, uniform, sampling)
        assert logits is not None
        fault = self.fault
        token, logprob, _ = draw(logits, torch.from_numpy(uniform), fault.temperature, fault.top_p, fault.top_k)
        if not fault.reports_own:
            logprob = torch.log_softmax(logits.float(), -1).gather(1, token[:, None])[:, 0]
        return token, logprob, None

    def _weights(self) -> Weights:
        return {name: w.detach().clone() for chunk in self.model_chunks for name, w in chunk.named_parameters()}

    @contextmanager
    def _sampling_with(self, weights: Weights) -> Iterator[None]:
        trained = self._weights()
        for chunk in self.model_chunks:
            for name, parameter in chunk.named_parameters():
                parameter.data.copy_(weights[name])
        yield
        for chunk in self.model_chunks:
            for name, parameter in chunk.named_parameters():
                parameter.data.copy_(trained[name])
