"""The groups of a step: generated, verified, and replaced if all their rewards are equal."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_rlvr.data import Sampler
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.rollout.engines.base import GroupRequest, RolloutEngine
from megatron_rlvr.rollout.grading import Grader
from megatron_rlvr.rollout.prompts import PromptSet
from megatron_rlvr.rollout.sampling import SamplingSettings, sample_seed
from megatron_rlvr.verifiers import Verdict

_PROGRESS_PERIOD_S = 0.5
# Takes the place of the sample in the seed that draws a replacement prompt. No completion has this number.
_REPLACEMENT_DRAW = 2**31


@dataclass
class Group:
    """A prompt with its verified completions.

    Attributes:
        slot: place among the prompts of the step, from which seeds are derived. A replacement is generated under a slot
            beyond those of the step, and gets the slot that it fills when it is chosen for training.
        example: index in the training data.
        completions, verdicts, texts: one per sample.
    """

    slot: int
    example: int
    completions: list[Completion]
    verdicts: list[Verdict]
    texts: list[str]

    @property
    def informative(self) -> bool:
        """Whether the rewards differ. If not, all advantages and the gradient are 0 (DAPO, arXiv 2503.14476)."""
        return len({verdict.reward for verdict in self.verdicts}) > 1


@dataclass
class RankRollout:
    """The rollout of one data-parallel rank in a step.

    Attributes:
        groups: groups to train on.
        generated: number of groups that were completed, including dropped ones.
        reward: sum of the rewards of all their completions.
        verify_seconds: seconds spent verifying while nothing was generated.
    """

    groups: list[Group]
    generated: int
    reward: float
    verify_seconds: float


class GroupSource:
    """Generates and verifies the groups of one data-parallel rank. Its methods run on the rank's leader.

    Args:
        rollout: section ``rollout`` of the configuration.
        seed: seed of the run.
        slots: this rank's places among the prompts of a step.
        prompts: training data.
        sampler: draws the prompts of a step.
        engine: generates completions.
        grader: verifies completions.
        sampling: how completions are sampled.

    Attributes:
        report_progress: called with a line of text while a step is generated.
    """

    def __init__(
        self,
        rollout: RolloutConfig,
        seed: int,
        slots: Sequence[int],
        prompts: PromptSet,
        sampler: Sampler,
        engine: RolloutEngine,
        grader: Grader,
        sampling: SamplingSettings,
    ):
        self.rollout, self.seed, self.slots = rollout, seed, slots
        self.prompts, self.sampler = prompts, sampler
        self.engine, self.grader, self.sampling = engine, grader, sampling
        self.report_progress: Callable[[str], None] = lambda _: None
        self._reported = 0.0

    def roll_out(self, step: int) -> RankRollout:
        """Generate and verify groups until there are enough to train on, or `refill_rounds` is reached."""
        rollout, needed = self.rollout, len(self.slots)
        indices = self.sampler.indices(step)
        kept: list[Group] = []
        dropped: list[Group] = []
        verify_seconds, replacements = 0.0, 0
        for attempt in range(1 + rollout.refill_rounds if rollout.dynamic_sampling else 1):
            missing = needed - len(kept)
            candidates = [(slot, indices[slot]) for slot in self.slots] if attempt == 0 else []
            if rollout.dynamic_sampling:
                while len(candidates) < math.ceil(missing * rollout.over_sampling):
                    candidates.append(self._replacement(step, replacements))
                    replacements += 1
            groups, seconds = self._complete(step, candidates, missing)
            verify_seconds += seconds
            for group in groups:
                (kept if group.informative or not rollout.dynamic_sampling else dropped).append(group)
            if len(kept) >= needed:
                break
        groups = kept + dropped
        reward = math.fsum(verdict.reward for group in groups for verdict in group.verdicts)
        chosen = groups[:needed]
        for slot, group in zip(self.slots, chosen, strict=True):
            group.slot = slot
        return RankRollout(chosen, len(groups), reward, verify_seconds)

    def _replacement(self, step: int, number: int) -> tuple[int, int]:
        """Return (slot, example) of the `number`-th replacement prompt of this rank in a step."""
        slot = self.rollout.prompts_per_step * (1 + number // len(self.slots))
        slot += self.slots[number % len(self.slots)]
        return slot, self.sampler.replacement(sample_seed(self.seed, step, slot, _REPLACEMENT_DRAW))

    def _complete(self, step: int, candidates: Sequence[tuple[int, int]], enough: int) -> tuple[list[Group], float]:
        """Generate and verify the groups of `candidates`, which are pairs of (slot, example).

        With dynamic sampling, a streaming engine cancels the remaining groups once `enough` groups are informative.

        Returns:
            the groups in order, and the seconds of verification during which nothing was generated.
        """
        requests = [
            GroupRequest(
                prompt=self.prompts.token_ids[example],
                seeds=[sample_seed(self.seed, step, slot, sample) for sample in range(self.sampling.samples)],
                place=(step, slot),
            )
            for slot, example in candidates
        ]
        if self.engine.streaming:
            return self._stream(requests, candidates, enough), 0.0
        completions = self.engine.generate(requests, self.sampling)
        began = time.perf_counter()
        graded = self.grader.grade([self.prompts.examples[example] for _, example in candidates], completions)
        groups = [
            Group(slot, example, group, verdicts, texts)
            for (slot, example), group, (texts, verdicts) in zip(candidates, completions, graded, strict=True)
        ]
        return groups, time.perf_counter() - began

    def _stream(
        self, requests: Sequence[GroupRequest], candidates: Sequence[tuple[int, int]], enough: int
    ) -> list[Group]:
        """Verify each group while others are still being generated."""
        done: dict[int, Group] = {}

        def verify(index: int, completions: list[Completion]) -> None:
            slot, example = candidates[index]
            ((texts, verdicts),) = self.grader.grade([self.prompts.examples[example]], [completions])
            done[index] = Group(slot, example, completions, verdicts, texts)

        async def on_group(index: int, completions: list[Completion]) -> bool:
            await asyncio.to_thread(verify, index, completions)
            self._report(f"rolling out: {len(done)} of {len(candidates)} prompts")
            informative = sum(group.informative for group in list(done.values()))
            return self.rollout.dynamic_sampling and informative >= enough

        self.engine.generate(requests, self.sampling, on_group)
        return [group for _, group in sorted(done.items())]

    def _report(self, text: str) -> None:
        # Progress of prefetched rollouts is not shown, because they run while other phases are displayed. Redrawing the
        # display for every prompt would be slow.
        if not self.rollout.max_staleness and time.monotonic() - self._reported > _PROGRESS_PERIOD_S:
            self._reported = time.monotonic()
            self.report_progress(text)
