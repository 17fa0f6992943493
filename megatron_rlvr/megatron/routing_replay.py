"""Routing replay: the routers of a policy use the experts that the rollout used, or report those that they choose.

In a mixture of experts, tiny differences between the arithmetic of the rollout engine and of training send some tokens
to other experts, whose outputs are unrelated. Rollout routing replay (R3, arXiv 2510.11370) replays the experts of the
rollout in training. A router still computes its scores, and the gates are those scores on the replayed experts, so it
still learns.

megatron-core calls `RouterReplay.get_replay_topk` of each router. Its own class keeps one list for all models of a
process and the data of one microbatch, so this module puts its own object in the same place.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_rlvr.data.routes import MicrobatchRoutes, RouterShape
from megatron_rlvr.megatron import device

if TYPE_CHECKING:
    from megatron_rlvr.megatron.model import PolicyModel


def router_shape(config: Any) -> RouterShape:
    """Return the routers of a mixture of experts, from its TransformerConfig."""
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        frequency = [int(layer % frequency == 0) for layer in range(config.num_layers)]
    routed = tuple(layer for layer, has_router in enumerate(frequency) if has_router)
    return RouterShape(config.num_layers, routed, config.num_moe_experts, config.moe_router_topk)


def connect(chunks: Sequence[PolicyModel], shape: RouterShape) -> None:
    """Let the routers of all model chunks of this process replay and record routes."""
    for chunk in chunks:
        chunk.routing = RoutingReplay(chunk, shape)


@dataclass
class _Pass:
    """One forward pass of a model chunk.

    Attributes:
        differentiated: whether a backward pass follows.
        experts: [routers, T, experts per token], the routes to replay on the device; None to replay none.
        replayed: bool [T], which tokens have a route; the routers choose for the others.
        chosen: [T, experts per token] of each router so far, the experts that they chose; filled while recording.
    """

    differentiated: bool
    experts: Tensor | None = None
    replayed: Tensor | None = None
    chosen: list[Tensor] = field(default_factory=list)


class RoutingReplay:
    """Replays and records the routes of one model chunk. Creating it connects it to the chunk's routers.

    Args:
        chunk: the model chunk.
        shape: routers of the whole model.

    Attributes:
        routers: which of the model's routers the chunk has.
        counts: int64 [2] on the device: replayed experts that the router itself did not choose, and all replayed
            experts, in passes without gradient.
    """

    def __init__(self, chunk: PolicyModel, shape: RouterShape):
        self.config, self.shape = chunk.config, shape
        self._tensor_group = chunk.pg_collection.tp
        routers = [module for module in chunk.modules() if isinstance(module, TopKRouter)]
        numbers = [shape.routed.index(router.layer_number - 1) for router in routers]
        first = numbers[0] if numbers else 0
        if numbers != list(range(first, first + len(numbers))):
            raise RuntimeError(f"the routers {numbers} of a model chunk are not consecutive")
        self.routers = slice(first, first + len(numbers))
        self.counts = torch.zeros(2, dtype=torch.int64, device=device.device())
        self._pass: _Pass | None = None
        self._recording = False
        self._recorded: _Pass | None = None
        # A backward pass that recomputes activations calls the router again, in the order of the forward passes.
        self._recomputed: list[deque[_Pass]] = [deque() for _ in routers]
        for index, router in enumerate(routers):
            router.router_replay = _Choice(self, index)
            # The fused router chooses experts by itself. The configuration of the model stays as it is, because it is
            # compared with that of a reference.
            router.config = copy.copy(router.config)
            router.config.moe_router_fusion = False

    @contextmanager
    def forward_pass(self, routes: MicrobatchRoutes | None) -> Iterator[None]:
        """Replay `routes` in the routers' calls within the context, or let the routers choose (None)."""
        started = _Pass(torch.is_grad_enabled())
        if routes is not None:
            group = self._tensor_group
            share, shares = (group.rank(), group.size()) if self.config.sequence_parallel else (0, 1)
            experts, replayed = routes.select(self.routers, share, shares)
            started.experts = device.to_device(experts, self.counts.device)
            started.replayed = device.to_device(replayed, self.counts.device)
        self._pass = started
        try:
            yield
        finally:
            self._pass = None
            self._recorded = started if self._recording else None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the experts that the routers choose in forward passes within the context."""
        self._recording = True
        try:
            yield
        finally:
            self._recording, self._recorded = False, None

    def recorded(self) -> list[Tensor]:
        """Return the experts of the latest pass, [T, experts per token] for each router of the chunk, on the device."""
        assert self._recorded is not None
        return [chosen.to(self.shape.torch_dtype) for chosen in self._recorded.chosen]

    def check_finished(self) -> None:
        """Raise a RuntimeError if a router was not called again for each pass that must be recomputed."""
        left = [len(passes) for passes in self._recomputed]
        for passes in self._recomputed:
            passes.clear()
        if any(left):
            raise RuntimeError(f"routing replay: {left} forward passes of the routers were not recomputed")

    def choose(self, index: int, scores: Tensor, values: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores and the indices of the experts of a router's tokens, [T, experts per token].

        Args:
            index: number of the router in the chunk.
            scores: [T, experts], the router's scores.
            values, own: scores and indices of the experts that the router chooses, [T, experts per token].
        """
        current = self._pass
        if current is None:
            current = self._recomputed[index].popleft()
        elif current.differentiated and not torch.is_grad_enabled():
            self._recomputed[index].append(current)  # the forward pass of a checkpointed layer
        if self._recording:
            current.chosen.append(own)
        if current.experts is None or current.replayed is None:
            return values, own
        routes, replayed = current.experts[index].long(), current.replayed[:, None]
        if not current.differentiated:
            differs = ~(routes[:, :, None] == own[:, None, :]).any(-1) & replayed
            self.counts += torch.stack([differs.sum(), replayed.sum() * routes.size(1)])
        indices = torch.where(replayed, routes, own)
        return scores.gather(1, indices), indices


@dataclass(frozen=True)
class _Choice:
    """What megatron-core calls in place of its `RouterReplay`."""

    replay: RoutingReplay
    index: int

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """See `RouterReplay.get_replay_topk`."""
        values, own = default_compute_topk(scores, topk, num_groups, group_topk)
        return self.replay.choose(self.index, scores, values, own)
