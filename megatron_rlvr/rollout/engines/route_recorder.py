"""The routes of completions that the local engine generates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from megatron_rlvr.data.routes import RouterShape, Routes
from megatron_rlvr.megatron import collectives
from megatron_rlvr.megatron.model import PolicyModel


class RouteRecorder:
    """Collects the routes of a batch of sequences while they are generated.

    Args:
        model_chunks: model chunks of this process, connected to `RoutingReplay`.
        shape: routers of the whole model.
    """

    def __init__(self, model_chunks: Sequence[PolicyModel], shape: RouterShape):
        self.shape = shape
        self._routing = [chunk.routing for chunk in model_chunks if chunk.routing is not None]
        if len(self._routing) != len(model_chunks):
            raise RuntimeError("the routers of the policy record no routes: it was built without routing_replay")
        self._prompts: list[Tensor] = []
        self._responses = torch.empty(0)
        self._sequences_per_prompt = 1

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the routes of all forward passes within the context."""
        with ExitStack() as stack:
            for routing in self._routing:
                stack.enter_context(routing.recording())
            yield

    def prefilled(self, padding: Tensor, width: int, samples: int, max_tokens: int) -> None:
        """Store the routes of prompts, which the latest pass computed.

        Args:
            padding: int64 [n], padding tokens on the left of each prompt.
            width: length of the prompts with their padding.
            samples: sequences per prompt.
            max_tokens: longest response.
        """
        routes = self._latest(width * len(padding)).unflatten(0, (width, len(padding)))
        self._prompts = [routes[first:, prompt] for prompt, first in enumerate(padding.tolist())]
        self._sequences_per_prompt = samples
        # The engine computes no token after the last one.
        self._responses = routes.new_zeros(len(padding) * samples, max_tokens - 1, *routes.shape[2:])

    def decoded(self, sequences: Tensor, position: int) -> None:
        """Store the routes of one more response token, at `position`, of each of `sequences`, int64 [n]."""
        self._responses[sequences, position] = self._latest(len(sequences))

    def routes(self, lengths: Tensor) -> list[Routes]:
        """Return the routes of all sequences in all layers of the model.

        Collective over the pipeline-parallel group: one all-gather.

        Args:
            lengths: int64 [N], length of each response.
        """
        numbers = torch.cat([torch.arange(r.routers.start, r.routers.stop) for r in self._routing])
        own = [
            torch.cat([self._prompts[i // self._sequences_per_prompt], self._responses[i, : length - 1]])
            for i, length in enumerate(lengths.tolist())
        ]
        # In the order of the layers: a stage of an interleaved pipeline has several runs of them.
        stages = collectives.objects_of_stages((numbers, own))
        order = torch.cat([numbers for numbers, _ in stages]).argsort()
        of_sequences = zip(*(sequences for _, sequences in stages), strict=True)
        return [Routes(torch.cat(parts, dim=1)[:, order].numpy()) for parts in of_sequences]

    def _latest(self, tokens: int) -> Tensor:
        """Return the routes of the latest pass in the layers of this process, [tokens, routers, experts per token]."""
        chosen = [experts for routing in self._routing for experts in routing.recorded()]
        if not chosen:  # a stage without routers
            return torch.zeros(tokens, 0, self.shape.chosen, dtype=self.shape.torch_dtype)
        return torch.stack(chosen, dim=1).cpu()  # one copy, because each of them waits for the GPU
