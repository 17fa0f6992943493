"""What every rollout engine offers: tokens in, tokens out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.config import RolloutConfig


@dataclass(frozen=True)
class SamplingPolicy:
    """How completions are drawn.

    Attributes:
        samples: completions a prompt.
        max_tokens: longest completion, the stop token included.
        temperature: divides the logits; log-probs are those of the divided logits.
        top_p, top_k: what is left to draw from (1 and 0 leave all); log-probs stay those of the whole vocabulary.
        stop_token_ids: a completion ends with the first of these; empty means that only `max_tokens` ends it.
    """

    samples: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()

    @classmethod
    def for_training(cls, config: RolloutConfig, stop_token_ids: Sequence[int]) -> SamplingPolicy:
        return cls(
            samples=config.samples_per_prompt,
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            stop_token_ids=() if config.ignore_eos else tuple(stop_token_ids),
        )


Finished = Callable[[int, list[Completion]], Awaitable[bool]]
"""Called with a prompt's index and its completions as soon as they are complete; True: no others are needed."""


class EngineLostError(Exception):
    """Nothing can generate any more, for reasons outside this run: save what there is and stop, to be started again."""


class RolloutError(UserError):
    """What a rollout met cannot be gone on with and is the user's to mend; every process of the job raises it.

    All of them know, so a checkpoint can be written before the run ends.
    """


class RolloutEngine(Protocol):
    """Generates completions under weights it was last given."""

    collective: bool
    """True: every process of a model replica calls `generate` together; False: only its leader does."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingPolicy, seeds: Sequence[int]
    ) -> list[Completion]:
        """Draw ``sampling.samples`` completions for each prompt, prompt by prompt.

        Args:
            prompts: token ids.
            sampling: how to draw.
            seeds: one for each completion, ``len(prompts) * sampling.samples``; the same seed under the same weights
                draws the same completion, whatever else is in the batch.
        """
        ...

    def offload(self) -> None:
        """Free what only generation needs, until the next `update_weights`. Collective over the job.

        Called when a step has its rollout. Rollouts ahead of training (``max_staleness``) may still be generating.
        """
        ...

    def update_weights(self, version: int) -> None:
        """Serve the policy's present weights from now on, under this version. Collective over the job.

        What goes wrong is raised by the next `generate`: the step that made the weights is whole.
        """
        ...


class StreamingEngine(RolloutEngine, Protocol):
    """An engine that is not collective: it tells of each prompt when it is complete, and can stop before the others."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingPolicy,
        seeds: Sequence[int],
        finished: Finished | None = None,
    ) -> list[Completion]:
        """See `RolloutEngine.generate`; prompts that `finished` no longer wants are aborted, and missing in the result.

        Raises:
            EngineLostError: when no server is left.
        """
        ...
