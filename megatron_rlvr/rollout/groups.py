"""Groups for a step: completed, verified, and drawn anew where their rewards leave nothing to learn from."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from megatron_rlvr.config import Config
from megatron_rlvr.data import Example, PromptSampler
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.megatron import collectives, parallel
from megatron_rlvr.rollout.engines.base import RolloutEngine, SamplingPolicy, StreamingEngine
from megatron_rlvr.rollout.recording import replay
from megatron_rlvr.rollout.sampling import sample_seed
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.verifiers import Verdict, VerifierPool

_TELL_PERIOD_S = 0.5
_CHOICE = 2**31  # the number of no completion: it draws the prompt that replaces an uninformative one


@dataclass
class Group:
    """A prompt with its verified completions.

    Attributes:
        slot: its place among the step's prompts, from which its seeds come; replacements have places beyond them.
        example: index in the training data.
        texts: of the completions; only where they were verified.
    """

    slot: int
    example: int
    completions: list[Completion]
    verdicts: list[Verdict]
    texts: list[str] = field(default_factory=list)

    @property
    def informative(self) -> bool:
        """Whether the rewards differ: otherwise no advantage is left, and no gradient (DAPO, arXiv 2503.14476)."""
        return len({verdict.reward for verdict in self.verdicts}) > 1


@dataclass
class RolledOut:
    """What a rank rolled out for a step: the groups to train on, how many there were in all, and their rewards' sum."""

    groups: list[Group]
    generated: int
    reward: float
    verify_seconds: float


class GroupSource:
    """Completes and verifies prompts of one rank.

    Its methods run on the rank's leader; on every process of the replica where the engine wants them all.

    Args:
        config: of the run.
        layout: of the job.
        engine: completes.
        tokenization: decodes for the verifier.
        verifiers: judge.
        slots: this rank's places among a step's prompts.
        data: training examples and their prompts' token ids.
        sampling: of training.
    """

    def __init__(
        self,
        config: Config,
        layout: parallel.Layout,
        engine: RolloutEngine,
        tokenization: Tokenization,
        verifiers: VerifierPool,
        slots: Sequence[int],
        data: tuple[list[Example], list[list[int]]],
        sampling: SamplingPolicy,
        sampler: PromptSampler,
    ):
        self.config, self.layout, self.engine = config, layout, engine
        self.tokenization, self.verifiers = tokenization, verifiers
        self.slots, self.train, self.sampling, self.sampler = slots, data, sampling, sampler
        self.tell: Callable[[str], None] = lambda _: None
        self._told = 0.0
        self._decoding = threading.Lock()

    def roll_out(self, step: int) -> RolledOut:
        """Complete and verify prompts until there are enough groups to train on."""
        rollout, wanted = self.config.rollout, len(self.slots)
        indices = self.sampler.indices(step)
        kept: list[Group] = []
        uninformative: list[Group] = []
        seconds, extras = 0.0, 0
        for turn in range(1 + rollout.refill_rounds if rollout.dynamic_sampling else 1):
            missing = wanted - len(kept)
            candidates = [(slot, indices[slot]) for slot in self.slots] if turn == 0 else []
            if rollout.dynamic_sampling:
                ask = math.ceil(missing * rollout.over_sampling)
                while len(candidates) < ask:
                    candidates.append(self._replacement(step, extras))
                    extras += 1
            groups, verifying = self._complete(step, candidates, missing)
            seconds += verifying
            for group in groups:
                (kept if group.informative or not rollout.dynamic_sampling else uninformative).append(group)
            if len(kept) >= wanted:
                break
        every = kept + uninformative
        reward = math.fsum(v.reward for group in every for v in group.verdicts)
        return RolledOut(every[:wanted], len(every), reward, seconds)

    def _replacement(self, step: int, number: int) -> tuple[int, int]:
        """(slot, example) of the `number`-th prompt beyond this rank's own: a function of the run's seed and these."""
        slot = self.config.rollout.prompts_per_step * (1 + number // len(self.slots))
        slot += self.slots[number % len(self.slots)]
        return slot, sample_seed(self.config.seed, step, slot, _CHOICE) % len(self.train[0])

    def _complete(self, step: int, candidates: Sequence[tuple[int, int]], enough: int) -> tuple[list[Group], float]:
        """Groups of these prompts, and seconds of verifying.

        An engine that is not collective has each group verified as soon as it is complete and, under dynamic sampling,
        drops what is under way once `enough` are informative.
        """
        rollout, (examples, prompts) = self.config.rollout, self.train
        samples = self.sampling.samples
        seeds = [sample_seed(self.config.seed, step, slot, s) for slot, _ in candidates for s in range(samples)]
        heads = [prompts[example] for _, example in candidates]
        if not self.engine.collective:
            done: dict[int, Group] = {}
            seconds = 0.0

            def keep(index: int, completions: list[Completion]) -> None:
                nonlocal seconds
                slot, example = candidates[index]
                began = time.perf_counter()
                texts, verdicts = self.judge([examples[example]], samples, completions)
                seconds += time.perf_counter() - began
                done[index] = Group(slot, example, completions, verdicts, texts)

            async def finished(index: int, completions: list[Completion]) -> bool:
                await asyncio.to_thread(keep, index, completions)
                self._progress(f"rolling out: {len(done)} of {len(candidates)} prompts")
                return rollout.dynamic_sampling and sum(group.informative for group in list(done.values())) >= enough

            cast(StreamingEngine, self.engine).generate(heads, self.sampling, seeds, finished)
            return [group for _, group in sorted(done.items())], seconds
        if rollout.engine == "recorded":
            completions = replay(Path(rollout.recording or ""), step, self.slots, samples)
        else:
            completions = self.engine.generate(heads, self.sampling, seeds)
        began = time.perf_counter()
        texts: list[str] = []
        verdicts: list[Verdict] = []
        if self.layout.is_leader:
            texts, verdicts = self.judge([examples[example] for _, example in candidates], samples, completions)
        # Replicas of the same weights each generated for themselves; the leader's word is taken.
        completions, verdicts = collectives.broadcast_from_leader((completions, verdicts))
        groups = []
        for place, (slot, example) in enumerate(candidates):
            own = slice(place * samples, (place + 1) * samples)
            groups.append(Group(slot, example, completions[own], verdicts[own], texts[own]))
        return groups, time.perf_counter() - began

    def _progress(self, text: str) -> None:
        # Nobody waits for a step ahead of its time; and a display drawn anew for every prompt would cost too much.
        if not self.config.rollout.max_staleness and time.monotonic() - self._told > _TELL_PERIOD_S:
            self._told = time.monotonic()
            self.tell(text)

    def judge(
        self, examples: Sequence[Example], samples: int, completions: Sequence[Completion]
    ) -> tuple[list[str], list[Verdict]]:
        """Texts and verdicts of the completions of these examples, `samples` each."""
        with self._decoding:  # groups of one rollout, and of several steps' rollouts, come in threads of their own
            texts = self.tokenization.decode(completions)
        return texts, self.verifiers.verify(texts, [e.answer for e in examples for _ in range(samples)])
