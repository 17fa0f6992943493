"""An engine with scripted completions, and a verifier for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.rollout.engines.base import EngineLostError, GroupRequest, OnGroup
from megatron_rlvr.rollout.sampling import SamplingSettings

# Tokens of the small model that decode to their own numbers.
WRONG, RIGHT = 10, 11


def repeats_the_right_token(completion: str, answer: Any) -> float:
    """A verifier: 1 for completions of RIGHT, 0 for completions of WRONG."""
    return float(completion.replace(" ", "").startswith(str(RIGHT)))


class ScriptedEngine:
    """Completion s of a group repeats one token 1 + s times: WRONG if s is even, RIGHT if s is odd.

    Prompts whose first token is in `dull` get only WRONG.

    Attributes:
        asked: number of requests of each call.
        lost: whether calls raise EngineLostError.
    """

    draws_from_policy = True

    def __init__(self, streaming: bool, dull: Sequence[int] = ()):
        self.streaming, self.dull = streaming, dull
        self.asked: list[int] = []
        self.lost = False
        self.version = 0

    def generate(
        self, requests: Sequence[GroupRequest], sampling: SamplingSettings, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        if self.lost:
            raise EngineLostError("gone")
        self.asked.append(len(requests))
        seeds = [seed for request in requests for seed in request.seeds]
        assert len(seeds) == len(requests) * sampling.samples == len(set(seeds))
        assert (on_group is not None) <= self.streaming
        groups: list[list[Completion]] = [[] for _ in requests]
        for index, request in enumerate(requests):
            for sample in range(sampling.samples):
                token = WRONG if request.prompt[0] in self.dull or sample % 2 == 0 else RIGHT
                length = 1 + sample
                groups[index].append(Completion([token] * length, [-1.0] * length, "stop", self.version))
            if on_group is not None and asyncio.run(on_group(index, groups[index])):  # type: ignore[arg-type]
                break
        return groups

    def assist(self) -> None:
        raise AssertionError("there is one process")

    def dismiss(self) -> None:
        pass

    def offload(self) -> None:
        pass

    def update_weights(self, version: int) -> dict[str, float]:
        self.version = version
        return {}
