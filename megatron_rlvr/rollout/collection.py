"""A step's rollout and the evaluation: gather groups, hand them to the model's other processes, measure them."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_rlvr.config import Config
from megatron_rlvr.data import Example, PromptSampler, load_examples
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import collectives, parallel
from megatron_rlvr.objectives.advantages import overlong_penalty
from megatron_rlvr.rollout.balance import balance
from megatron_rlvr.rollout.engines.base import EngineLostError, RolloutEngine, RolloutError, SamplingPolicy
from megatron_rlvr.rollout.groups import GroupSource, RolledOut
from megatron_rlvr.rollout.mismatch import MismatchAlarm
from megatron_rlvr.rollout.prefetch import RolloutsAhead
from megatron_rlvr.rollout.recording import record
from megatron_rlvr.rollout.sampling import sample_seed
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.verifiers import Verdict, VerifierPool, check_answers

EVALUATION_SEED = 2**31  # no training step reaches this number, so evaluation never draws a training sample's numbers


@dataclass(frozen=True)
class RolloutReport:
    """Seconds that a step waited for the engine and for the verifier; metrics of the whole job."""

    generate: float
    verify: float
    metrics: dict[str, float]


class RolloutCollector:
    """Draws this data-parallel rank's prompts and turns them into verified rollouts.

    Prompts, seeds and minibatches of a step are the same whatever the data-parallel size: rank d of D completes prompt
    slots d, d + D, ... of each minibatch. Which of them it trains on is decided when their lengths are known.

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
        self.train = self._load(config.data.train, "rollout", stratify_key=config.data.stratify_key)
        self.heldout: tuple[list[Example], list[list[int]]] | None = None
        if config.data.heldout:
            response = "rollout" if config.evaluation.max_tokens is None else "evaluation"
            self.heldout = self._load(config.data.heldout, response, config.evaluation.prompts)
        strata = None if config.data.stratify_key is None else [e.stratum or 0.0 for e in self.train[0]]
        self.sampler = PromptSampler(len(self.train[0]), config.rollout.prompts_per_step, config.seed, strata)
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
        self.source = GroupSource(
            config, layout, engine, tokenization, verifiers, self.slots, self.train, self.sampling, self.sampler
        )
        self.ahead = RolloutsAhead(self.source.roll_out, config.rollout.max_staleness, config.steps)

    def collect(self, step: int, tell: Callable[[str], None] = lambda _: None) -> tuple[RolloutBatch, RolloutReport]:
        """This rank's rollouts of a step; `tell` hears how far they are. Collective over the job.

        Raises:
            EngineLostError: on every process, when nothing can generate for one of them any more.
            RolloutError: on every process, when one of them met what the user must mend.
        """
        began = time.perf_counter()
        self.source.tell = tell
        rolled: RolledOut | None = None
        failure: EngineLostError | UserError | None = None
        if self.engine.collective:
            rolled = self.ahead.take(step)
        elif self.layout.is_leader:
            try:
                rolled = self.ahead.take(step)
            except (EngineLostError, UserError) as error:
                failure = error
        if not self.engine.collective and (together := _together(failure)):
            raise together from failure
        slots, several = self.slots, self.layout.data_size > 1
        if several and self.layout.is_leader:
            assert rolled is not None
            rolled, slots = balance(rolled, slots, self.train, self.config)
        # Context-parallel ranks hold the same weights: each generates for itself, and the leader's word is taken.
        if not self.engine.collective or self.config.parallel.context > 1 or several:
            rolled, slots = collectives.broadcast_from_leader((rolled, slots))
        assert rolled is not None
        self.engine.offload()
        seconds = time.perf_counter() - began
        rollout, groups = self.config.rollout, rolled.groups
        examples, prompts = self.train
        completions = [c for group in groups for c in group.completions]
        rewards = [v.reward for group in groups for v in group.verdicts]
        if rollout.record and self.layout.is_leader:
            texts = [text for group in groups for text in group.texts]
            folder = Path(self.config.run_directory) / "rollouts"
            record(folder, step, slots, [examples[g.example].prompt for g in groups], completions, texts, rewards)
        heads = [prompts[group.example] for group in groups]
        batch = RolloutBatch.from_completions(heads, completions, rewards, self.tokenization.padding)
        if self.sampler.stratified:
            batch.slots = torch.tensor(slots)
            batch.strata = torch.tensor([examples[g.example].stratum for g in groups], dtype=torch.float64)
        if rollout.overlong_buffer:
            batch.penalty = overlong_penalty(batch.response_lengths, rollout.max_tokens, rollout.overlong_buffer)
        verify = rolled.verify_seconds if self.engine.collective else 0.0  # else it goes by while others are generated
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
        total = collectives.sum_over_job(sums, contributes=self.layout.is_leader)
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

    def evaluate(self) -> dict[str, float]:
        """pass@k for k = 1, 2, 4 ... on held-out prompts, with the same seeds every time. Collective over the job.

        Empty, with a warning, when nothing can generate any more, or nothing that is of use: the next rollout decides
        whether to go on.
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
        failure: EngineLostError | UserError | None = None
        if self.engine.collective:
            completions = self.engine.generate([prompts[i] for i in mine], sampling, seeds)
        elif self.layout.is_leader:
            try:
                completions = self.engine.generate([prompts[i] for i in mine], sampling, seeds)
            except (EngineLostError, UserError) as error:
                failure = error
        if not self.engine.collective and (together := _together(failure)):
            print(f"warning: no evaluation: {together}", file=sys.stderr)
            return {}
        if self.layout.is_leader:
            _, verdicts = self.source.judge([examples[i] for i in mine], settings.samples, completions)
        completions, verdicts = collectives.broadcast_from_leader((completions, verdicts))
        solved = [
            sum(v.reward > 0.5 for v in verdicts[g : g + settings.samples])
            for g in range(0, len(verdicts), settings.samples)
        ]
        powers = [2**e for e in range(settings.samples.bit_length()) if 2**e <= settings.samples]
        sums = {f"pass@{k}": math.fsum(pass_at_k(settings.samples, c, k) for c in solved) for k in powers}
        sums["reward"] = math.fsum(v.reward for v in verdicts) / settings.samples
        sums["response_tokens"] = sum(len(c.token_ids) for c in completions) / settings.samples
        totals = collectives.sum_over_job(sums, contributes=self.layout.is_leader)
        return {name: total / len(examples) for name, total in totals.items()}

    def _load(
        self, path: str, response: str, limit: int | None = None, stratify_key: str | None = None
    ) -> tuple[list[Example], list[list[int]]]:
        """Examples and their prompts' token ids; `response` is the part of the configuration with their max_tokens."""
        data = self.config.data
        keys = {} if data.prompt_key is None else {"prompt_key": data.prompt_key}
        examples = load_examples(path, answer_key=data.answer_key, stratify_key=stratify_key, limit=limit, **keys)
        check_answers(self.verifiers.verifier, [e.answer for e in examples], path)
        encoded = self.tokenization.encode_all(examples, data.max_prompt_tokens)
        tokens = self.config.evaluation.max_tokens if response == "evaluation" else self.config.rollout.max_tokens
        self.tokenization.check_context(examples, encoded, tokens or 0, f"{response}.max_tokens")
        return examples, encoded


def _together(failure: EngineLostError | UserError | None) -> EngineLostError | RolloutError | None:
    """What every process raises after one of them failed, in its own words where it has any. Collective."""
    own = 0.0 if failure is None else 2.0 if isinstance(failure, UserError) else 1.0
    worst = collectives.max_over_job({"failure": own})["failure"]
    if worst == 0.0:
        return None
    if worst == 1.0:
        return EngineLostError(str(failure or "no SGLang server is left, says another rank"))
    return RolloutError(str(failure or "the rollout of another rank failed: its own line says why"))


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k completions solves a prompt, from `solved` of `samples`.

    1 - C(n - c, k) / C(n, k); Chen et al., arXiv 2107.03374, equation 1.
    """
    if samples - solved < k:
        return 1.0
    return 1.0 - math.prod((samples - solved - i) / (samples - i) for i in range(k))
