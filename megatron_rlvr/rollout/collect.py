"""A step's rollout: draw prompts, have them completed, verify, and hand the batch to the model's other processes."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from megatron_rlvr.backend import parallel
from megatron_rlvr.config import Config
from megatron_rlvr.data import Example, PromptSampler, load_examples
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.errors import UserError
from megatron_rlvr.objectives.advantages import overlong_penalty
from megatron_rlvr.rollout.ahead import RolloutsAhead
from megatron_rlvr.rollout.engine import Completion, EngineLostError, RolloutEngine, SamplingPolicy, StreamingEngine
from megatron_rlvr.rollout.mismatch import MismatchAlarm
from megatron_rlvr.rollout.recording import record, replay
from megatron_rlvr.rollout.sampling import sample_seed
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.verifiers import Verdict, VerifierPool, check_answers

EVALUATION_SEED = 2**31  # no training step reaches this number, so evaluation never draws a training sample's numbers
_CHOICE = 2**31  # nor a completion this one, which says what prompt replaces an uninformative one


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


@dataclass(frozen=True)
class RolloutReport:
    """Seconds that a step waited for the engine and for the verifier; metrics of the whole job."""

    generate: float
    verify: float
    metrics: dict[str, float]


class RolloutCollector:
    """Draws this data-parallel rank's prompts and turns them into verified rollouts.

    Prompts, seeds and minibatches of a step are the same whatever the data-parallel size: rank d of D owns prompt
    slots d, d + D, ... of each minibatch.

    Raises:
        UserError: for data that cannot be read, or sizes that do not divide.
    """

    def __init__(
        self,
        config: Config,
        layout: parallel.Layout,
        engine: RolloutEngine,
        tokenization: Tokenization,
        verifiers: VerifierPool,
    ):
        self.config, self.layout, self.engine = config, layout, engine
        self.tokenization, self.verifiers = tokenization, verifiers
        self.sampling = SamplingPolicy.for_training(config.rollout, tokenization.stops(config.rollout.stop))
        threshold = 0.0 if config.rollout.engine == "recorded" else config.rollout.mismatch_alarm
        self.alarm = MismatchAlarm(threshold, config.rollout.mismatch_patience, layout.is_main)
        self.ahead = RolloutsAhead(self._roll_out, config.rollout.max_staleness, config.steps)
        self._judging = threading.Lock()
        self.train = self._load(config.data.train)
        self.heldout = self._load(config.data.heldout, config.evaluation.prompts) if config.data.heldout else None
        self.sampler = PromptSampler(len(self.train[0]), config.rollout.prompts_per_step, config.seed)
        a_minibatch = config.rollout.prompts_per_step // config.algorithm.minibatches
        if a_minibatch % layout.data_size:
            raise UserError(
                f"a minibatch has {a_minibatch} prompts (rollout.prompts_per_step / algorithm.minibatches), which "
                f"{layout.data_size} data-parallel ranks do not divide: change one of the two"
            )
        self.slots = [
            slot
            for start in range(0, config.rollout.prompts_per_step, a_minibatch)
            for slot in range(start + layout.data_rank, start + a_minibatch, layout.data_size)
        ]

    def collect(self, step: int) -> tuple[RolloutBatch, RolloutReport]:
        """This rank's rollouts of a step. Collective over the job.

        Raises:
            EngineLostError: on every process, when nothing can generate for one of them any more.
        """
        began = time.perf_counter()
        rolled: RolledOut | None = None
        lost = ""
        if self.engine.collective or self.layout.is_leader:
            try:
                rolled = self.ahead.take(step)
            except EngineLostError as error:
                lost = str(error)
        if not self.engine.collective:
            rolled = parallel.share_with_model_peers(rolled)
            if parallel.any_rank(bool(lost)):
                raise EngineLostError(lost or "no SGLang server is left, says another rank")
        assert rolled is not None
        self.engine.rest()
        seconds = time.perf_counter() - began
        rollout, groups = self.config.rollout, rolled.groups
        examples, prompts = self.train
        completions = [c for group in groups for c in group.completions]
        rewards = [v.reward for group in groups for v in group.verdicts]
        if rollout.record and self.layout.is_leader:
            texts = [text for group in groups for text in group.texts]
            folder = Path(self.config.run_directory) / "rollouts"
            record(folder, step, self.slots, [examples[g.example].prompt for g in groups], completions, texts, rewards)
        heads = [prompts[group.example] for group in groups]
        batch = RolloutBatch.from_completions(heads, completions, rewards, self.tokenization.padding)
        if rollout.overlong_buffer:
            batch.penalty = overlong_penalty(batch.response_lengths, rollout.max_tokens, rollout.overlong_buffer)
        verify = (
            0.0 if rollout.max_staleness else rolled.verify_seconds
        )  # else it went by while the step before trained
        return batch, RolloutReport(seconds - verify, verify, self._metrics(step, rolled, batch))

    def _metrics(self, step: int, rolled: RolledOut, batch: RolloutBatch) -> dict[str, float]:
        """Completions that could not be verified, and what only some configurations have to tell. Collective."""
        rollout, samples = self.config.rollout, self.sampling.samples
        failed = sum(verdict.status != "ok" for group in rolled.groups for verdict in group.verdicts)
        sums: dict[str, float] = {"failed": failed, "sequences": len(batch.rewards)}
        if rollout.dynamic_sampling:
            sums |= {"generated": rolled.generated, "reward": rolled.reward, "groups": len(rolled.groups)}
            sums["unfilled"] = sum(not group.informative for group in rolled.groups)
        if rollout.overlong_buffer:
            sums["penalty"] = float(batch.penalty.sum())
        if rollout.max_staleness:
            completions = [c for group in rolled.groups for c in group.completions]
            spans = [s for c in completions for s in c.version_spans or ((c.weight_version, len(c.token_ids)),)]
            sums |= {"stale": sum((step - version) * tokens for version, tokens in spans), "tokens": batch.token_count}
            sums["interrupted"] = sum(bool(c.version_spans) for c in completions)
        total = parallel.sum_over_job(sums, contributes=self.layout.is_leader)
        found = {"verifier/failed_fraction": total["failed"] / total["sequences"]}
        if rollout.dynamic_sampling:
            found["sampling/generated_groups"] = total["generated"] / total["groups"]
            found["sampling/unfilled_fraction"] = total["unfilled"] / total["groups"]
            found["sampling/reward"] = total["reward"] / (total["generated"] * samples)
        if rollout.overlong_buffer:
            found["overlong_penalty"] = total["penalty"] / total["sequences"]
        if rollout.max_staleness:
            found["staleness/mean"] = total["stale"] / total["tokens"]
            found["staleness/interrupted_fraction"] = total["interrupted"] / total["sequences"]
        return found

    # One step of this rank, on its leader; on every process of the replica where the engine wants them all ----------

    def _roll_out(self, step: int) -> RolledOut:
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

        Under dynamic sampling, an engine that is not collective verifies each group as it is complete and drops what
        is under way once `enough` are informative.
        """
        rollout, (examples, prompts) = self.config.rollout, self.train
        samples = self.sampling.samples
        seeds = [sample_seed(self.config.seed, step, slot, s) for slot, _ in candidates for s in range(samples)]
        heads = [prompts[example] for _, example in candidates]
        groups: list[Group] = []
        seconds = 0.0

        def keep(candidate: tuple[int, int], completions: list[Completion]) -> Group:
            nonlocal seconds
            slot, example = candidate
            began = time.perf_counter()
            texts, verdicts = self._judge([examples[example]], samples, completions)
            seconds += time.perf_counter() - began
            groups.append(Group(slot, example, completions, verdicts, texts))
            return groups[-1]

        if rollout.dynamic_sampling and not self.engine.collective:

            async def finished(index: int, completions: list[Completion]) -> bool:
                await asyncio.to_thread(keep, candidates[index], completions)
                return sum(group.informative for group in groups) >= enough

            cast(StreamingEngine, self.engine).generate(heads, self.sampling, seeds, finished)
            return list(groups), seconds  # a thread that nobody waits for may still add to the first
        if rollout.engine == "recorded":
            completions = replay(Path(rollout.recording or ""), step, self.slots, samples)
        else:
            completions = self.engine.generate(heads, self.sampling, seeds)
        began = time.perf_counter()
        texts: list[str] = []
        verdicts: list[Verdict] = []
        if self.layout.is_leader:
            texts, verdicts = self._judge([examples[example] for _, example in candidates], samples, completions)
        if self.engine.collective:
            # Replicas of the same weights each generated for themselves; the leader's word is taken.
            completions, verdicts = parallel.share_with_model_peers((completions, verdicts))
        for place, (slot, example) in enumerate(candidates):
            own = slice(place * samples, (place + 1) * samples)
            groups.append(Group(slot, example, completions[own], verdicts[own], texts[own]))
        return groups, time.perf_counter() - began

    def _judge(
        self, examples: Sequence[Example], samples: int, completions: Sequence[Completion]
    ) -> tuple[list[str], list[Verdict]]:
        with self._judging:  # rollouts of several steps may be under way
            texts = self.tokenization.decode(completions)
            return texts, self.verifiers.verify(texts, [e.answer for e in examples for _ in range(samples)])

    def evaluate(self) -> dict[str, float]:
        """pass@k for k = 1, 2, 4 ... on held-out prompts, with the same seeds every time. Collective over the job.

        Empty when nothing can generate any more: the next rollout decides whether to go on.
        """
        assert self.heldout is not None
        examples, prompts = self.heldout
        settings = self.config.evaluation
        mine = range(self.layout.data_rank, len(examples), self.layout.data_size)
        sampling = replace(
            self.sampling,
            samples=settings.samples,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_tokens=settings.max_tokens or self.sampling.max_tokens,
        )
        seeds = [sample_seed(self.config.seed, EVALUATION_SEED, i, s) for i in mine for s in range(settings.samples)]

        completions: list[Completion] = []
        verdicts: list[Verdict] = []
        lost = ""
        if self.engine.collective or self.layout.is_leader:
            try:
                completions = self.engine.generate([prompts[i] for i in mine], sampling, seeds)
            except EngineLostError as error:
                lost = str(error)
        if not self.engine.collective and parallel.any_rank(bool(lost)):
            print(f"warning: no evaluation: {lost or 'no server is left, says another rank'}", file=sys.stderr)
            return {}
        if self.layout.is_leader:
            _, verdicts = self._judge([examples[i] for i in mine], settings.samples, completions)
        completions, verdicts = parallel.share_with_model_peers((completions, verdicts))
        solved = [
            sum(v.reward > 0.5 for v in verdicts[g : g + settings.samples])
            for g in range(0, len(verdicts), settings.samples)
        ]
        powers = [2**e for e in range(settings.samples.bit_length()) if 2**e <= settings.samples]
        sums = {f"pass@{k}": math.fsum(pass_at_k(settings.samples, c, k) for c in solved) for k in powers}
        sums["reward"] = math.fsum(v.reward for v in verdicts) / settings.samples
        sums["response_tokens"] = sum(len(c.token_ids) for c in completions) / settings.samples
        totals = parallel.sum_over_job(sums, contributes=self.layout.is_leader)
        return {name: total / len(examples) for name, total in totals.items()}

    def _load(self, path: str, limit: int | None = None) -> tuple[list[Example], list[list[int]]]:
        data = self.config.data
        keys = {} if data.prompt_key is None else {"prompt_key": data.prompt_key}
        examples = load_examples(path, answer_key=data.answer_key, limit=limit, **keys)
        check_answers(self.verifiers.verifier, [e.answer for e in examples])
        return examples, self.tokenization.encode_all(examples, data.max_prompt_tokens)


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k completions solves a prompt, from `solved` of `samples`.

    1 - C(n - c, k) / C(n, k); Chen et al., arXiv 2107.03374, equation 1.
    """
    if samples - solved < k:
        return 1.0
    return 1.0 - math.prod((samples - solved - i) / (samples - i) for i in range(k))
