"""The interface of rollout engines: token ids in, token ids and log-probs out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.sampling import SamplingPolicy


@dataclass(frozen=True)
class GroupRequest:
    """One prompt, and the completions to draw for it.

    Attributes:
        prompt: token ids.
        seeds: one per completion. Under the same weights, the same seed draws the same completion, whatever else is
            generated with it.
        place: (step, slot) of a training prompt, where `slot` counts the prompts of the step; None in an evaluation.
    """

    prompt: Sequence[int]
    seeds: Sequence[int]
    place: tuple[int, int] | None = None


OnGroup = Callable[[int, list[Completion]], Awaitable[bool]]
"""Called with a request's index and its completions when they are complete; returns True to cancel the other requests.
"""


class EngineLostError(Exception):
    """Nothing can generate any more, for reasons outside this run: save a checkpoint, stop, and let the run resume."""


class RolloutError(UserError):
    """A user error that a rollout met. Every process of the job raises it, so that a checkpoint can be written first.

    A UserError that one process raises alone would leave the others waiting in a collective.
    """


class RolloutEngine(Protocol):
    """Generates completions under the weights that it was last given.

    Only the leader of a model replica calls `generate`; meanwhile the replica's other processes are in `assist`.
    """

    streaming: bool
    """Whether `generate` passes each group to `on_group` as soon as it is complete, and can cancel the others."""
    draws_from_policy: bool
    """Whether completions are drawn under the weights that the engine was last given. Those of a replay are not, so a
    mismatch between them and the trained policy is expected."""

    def generate(
        self, requests: Sequence[GroupRequest], sampling: SamplingPolicy, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        """Draw ``sampling.samples`` completions for each request; returns one list per request.

        Args:
            requests: prompts and seeds.
            sampling: how to draw.
            on_group: for streaming engines. Lists of requests that it cancelled are empty.

        Raises:
            EngineLostError: when no server is left.
            UserError: when the engine cannot serve these requests.
        """
        ...

    def assist(self) -> None:
        """Take part in the leader's calls of `generate` until it calls `dismiss`."""
        ...

    def dismiss(self) -> None:
        """Let the replica's other processes return from `assist`; called by the leader."""
        ...

    def offload(self) -> None:
        """Free what only generation needs, until the next `update_weights`. Collective over the job.

        Called when a step has its rollout. Rollouts ahead of training (``max_staleness``) may still be generating.
        """
        ...

    def update_weights(self, version: int) -> None:
        """Serve the policy's present weights from now on, under this version. Collective over the job.

        A failure is raised by the next `generate`, so that the step that made the weights is recorded first.
        """
        ...
