"""The interface of rollout engines: token ids in, token ids and log-probs out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_STOPPED
from megatron_rlvr.rollout.sampling import SamplingSettings


@dataclass(frozen=True)
class GroupRequest:
    """A request for the completions of one prompt.

    Attributes:
        prompt: token ids.
        seeds: one per completion. With the same weights, the same seed draws the same completion, whatever else is
            generated at the same time.
        place: (step, slot) of a training prompt, where `slot` counts the prompts of the step; None in an evaluation.
    """

    prompt: Sequence[int]
    seeds: Sequence[int]
    place: tuple[int, int] | None = None


OnGroup = Callable[[int, list[Completion]], Awaitable[bool]]
"""Called with a request's index and its completions when they are complete; returns True to cancel the other requests.
"""


class EngineLostError(Exception):
    """No server can generate any more, for reasons outside the run. The run saves a checkpoint and can be resumed."""

    exit_status: ClassVar[int] = EXIT_STOPPED


class RolloutError(UserError):
    """A user error during a rollout. Every process of the job raises it, so that a checkpoint can be written first.

    If one process raised a UserError alone, the others would wait for it in a collective.
    """


class RolloutEngine(Protocol):
    """Generates completions with the weights of the last `update_weights`.

    Only the leader of a model replica calls `generate`; meanwhile the replica's other processes are in `assist`.
    """

    streaming: bool
    """Whether `generate` passes each group to `on_group` as soon as it is complete, and can cancel the others."""
    draws_from_policy: bool
    """Whether completions are sampled from the current policy. Replayed completions are not, so a mismatch between
    rollout and training policy is expected."""

    def generate(
        self, requests: Sequence[GroupRequest], sampling: SamplingSettings, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        """Generate ``sampling.samples`` completions for each request.

        Args:
            requests: prompts and seeds.
            sampling: how to sample.
            on_group: receives each complete group from a streaming engine.

        Returns:
            the completions of each request; none for requests that `on_group` cancelled.

        Raises:
            EngineLostError: if no server is left.
            UserError: if the engine cannot serve these requests.
        """
        ...

    def assist(self) -> None:
        """Take part in the leader's calls of `generate` until it calls `dismiss`."""
        ...

    def dismiss(self) -> None:
        """Let the replica's other processes return from `assist`; called by the leader."""
        ...

    def offload(self) -> None:
        """Free memory that only generation needs, until the next `update_weights`. Collective over the job.

        Called once a step has its rollout. With ``max_staleness``, later rollouts may still be generating.
        """
        ...

    def update_weights(self, version: int) -> dict[str, float]:
        """Generate with the policy's current weights from now on. Collective over the job.

        A failure is raised by the next `generate`, so that the metrics of the finished step are recorded first.

        Args:
            version: version of the weights: the number of training steps before them.

        Returns:
            metrics of the update, on the main process.
        """
        ...
