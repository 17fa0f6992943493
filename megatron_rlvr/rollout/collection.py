"""The rollout of a step: draw prompts, collect their groups, send them to the replica's processes, compute metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rlvr.config import Config
from megatron_rlvr.data import MixtureSampler
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.routes import RouterShape
from megatron_rlvr.megatron import waiting
from megatron_rlvr.megatron.parallel import Layout
from megatron_rlvr.objectives.advantages import overlong_penalty
from megatron_rlvr.rollout.balance import balance
from megatron_rlvr.rollout.engines.base import RolloutEngine
from megatron_rlvr.rollout.grading import Grader
from megatron_rlvr.rollout.groups import Group, GroupSource, RankRollout
from megatron_rlvr.rollout.leaders import run_on_leaders
from megatron_rlvr.rollout.prefetch import RolloutPrefetcher
from megatron_rlvr.rollout.prompts import load_training_prompts
from megatron_rlvr.rollout.recording import record_group
from megatron_rlvr.rollout.requirements import check_groups
from megatron_rlvr.rollout.samples import Row, rows_of_groups
from megatron_rlvr.rollout.sampling import SamplingSettings
from megatron_rlvr.rollout.source_metrics import SourceMetrics
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.rollout.verifier_alarm import VerifierAlarm, stop_if_broken
from megatron_rlvr.verifiers import VerifierPool


@dataclass(frozen=True)
class RolloutReport:
    """Measurements of a step's rollout.

    Attributes:
        generate_seconds, verify_seconds: how long the step waited for generation and for verification.
        metrics: metrics by name, over all ranks.
        samples: if they are to be stored, the rows of this data-parallel rank for `samples.collected`.
    """

    generate_seconds: float
    verify_seconds: float
    metrics: dict[str, float]
    samples: list[Row] | None


class RolloutCollector:
    """Draws this data-parallel rank's prompts and turns them into verified rollouts.

    Prompts, seeds and minibatches of a step do not depend on the data-parallel size D: rank d completes the prompt
    slots d, d + D, ... of each minibatch. Groups then move between ranks to balance the load, once their lengths are
    known.

    Args:
        config: configuration of the run.
        layout: position of this process in the process groups.
        engine: generates completions.
        tokenization: tokenizer of the model.
        verifiers: computes rewards.
        routers: routers of the policy, if their routes are to be replayed.
        own_routers: numbers of the routers that this process computes; it keeps the routes of these.

    Raises:
        UserError: if the data cannot be read, or the data-parallel size does not divide the prompts of a minibatch.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        engine: RolloutEngine,
        tokenization: Tokenization,
        verifiers: VerifierPool,
        routers: RouterShape | None = None,
        own_routers: Sequence[int] | None = None,
    ):
        rollout = config.rollout
        self.rollout, self.algorithm, self.layout, self.engine = rollout, config.algorithm, layout, engine
        self.padding = tokenization.padding
        self.verifiers, self.failure_alarm = verifiers, VerifierAlarm(layout.is_main)
        self.samples_every = config.telemetry.samples_every
        self.own_routers = own_routers
        self.recording = Path(config.run_directory) / "rollouts" if rollout.record else None
        sampling = SamplingSettings.for_training(rollout, tokenization.stops(rollout.stop), routers)
        self.prompts = load_training_prompts(config.data, rollout, tokenization, verifiers)
        weights = [source.weight for source in config.data.sources()]
        self.sampler = self.prompts.sampler(weights, rollout.prompts_per_step, config.seed)
        self.source_metrics = (
            SourceMetrics(self.prompts.sources, self.sampler) if isinstance(self.sampler, MixtureSampler) else None
        )
        # Replacements change which prompts a step trains on, and how many of each file, which is then random.
        self.strata = None if rollout.dynamic_sampling else self.prompts.strata
        known = not (rollout.dynamic_sampling or self.prompts.sources)
        self.sampled_fraction = rollout.prompts_per_step / len(self.prompts) if known else 0.0
        self.source = GroupSource(
            rollout=rollout,
            seed=config.seed,
            slots=_rank_slots(rollout.prompts_per_step, config.algorithm.minibatches, layout),
            prompts=self.prompts,
            sampler=self.sampler,
            engine=engine,
            grader=Grader(tokenization, verifiers),
            sampling=sampling,
        )
        self.prefetcher = RolloutPrefetcher(self.source.roll_out, rollout.max_staleness, config.steps)

    def collect(
        self, step: int, report_progress: Callable[[str], None] = lambda _: None
    ) -> tuple[RolloutBatch, RolloutReport]:
        """Return the rollouts of a step that this rank trains on. Collective over the job.

        Args:
            step: training step, from 0.
            report_progress: called with a line of text while a streaming engine generates.

        Raises:
            EngineLostError: on every process, if the engine of one of them cannot generate any more.
            RolloutError: on every process, if a user error occurred on one of them.
            UserError: on every process, if no completion of the job has been verified so far.
        """
        began = time.perf_counter()
        self.source.report_progress = report_progress
        what = f"the rollout of step {step} on all data-parallel ranks"
        result = run_on_leaders(lambda: self.prefetcher.take(step), self.engine, self.layout, what)
        if result is not None and self.layout.data_size > 1:
            result.groups = balance(result.groups, self.prompts, self.algorithm, self.layout.data_rank)
        result = waiting.broadcast_from_leader(result, f"the rollout of step {step} from its leader")
        self.engine.offload()
        seconds = time.perf_counter() - began
        if self.recording is not None and self.layout.is_leader:
            for group in result.groups:
                record_group(self.recording, step, group, self.prompts.examples[group.example].prompt)
        batch = self._batch(step, result.groups)
        metrics = self._metrics(step, result, batch)
        stored = self.samples_every and step % self.samples_every == 0
        samples = rows_of_groups(result.groups, self.prompts) if stored else None
        return batch, RolloutReport(seconds - result.verify_seconds, result.verify_seconds, metrics, samples)

    def _batch(self, step: int, groups: Sequence[Group]) -> RolloutBatch:
        completions = [completion for group in groups for completion in group.completions]
        batch = RolloutBatch.from_completions(
            [self.prompts.token_ids[group.example] for group in groups],
            completions,
            [verdict.reward for group in groups for verdict in group.verdicts],
            self.padding,
            self.own_routers,
        )
        versions, lengths = torch.tensor([span for completion in completions for span in completion.spans]).T
        batch.age = (step - versions).where(versions >= 0, 0).repeat_interleave(lengths)  # -1 is an unknown version
        batch.slots = torch.tensor([group.slot for group in groups])
        batch.sampled_fraction = self.sampled_fraction
        if self.strata is not None:
            batch.strata = torch.tensor([self.strata[group.example] for group in groups], dtype=torch.float64)
        if self.rollout.overlong_buffer:
            batch.penalty = overlong_penalty(
                batch.response_lengths, self.rollout.max_tokens, self.rollout.overlong_buffer
            )
        return batch

    def _metrics(self, step: int, result: RankRollout, batch: RolloutBatch) -> dict[str, float]:
        """Compute the share of completions that could not be verified, and metrics of optional features.

        Collective over the job: one all-reduce.
        """
        rollout, completions = self.rollout, [c for group in result.groups for c in group.completions]
        failed = sum(verdict.status != "ok" for group in result.groups for verdict in group.verdicts)
        sums: dict[str, float] = {"failed": failed, "sequences": len(batch.rewards)}
        sums["verified"] = self.verifiers.counts["ok"]
        if rollout.dynamic_sampling:
            sums |= {"generated": result.generated, "reward": result.reward, "groups": len(result.groups)}
            sums["unfilled"] = sum(not group.informative for group in result.groups)
        if batch.kept is not None:
            sums |= {"kept": len(batch.kept.ids), "tokens": batch.token_count}
        if rollout.overlong_buffer:
            sums["penalty"] = float(batch.penalty.sum())
        if rollout.max_staleness:
            assert batch.age is not None
            sums |= {"stale": float(batch.age.sum()), "tokens": batch.token_count}
            sums["interrupted"] = sum(bool(c.version_spans) for c in completions)
        if self.source_metrics is not None:
            sums |= self.source_metrics.sums(result.groups)
        # A leader may still be writing its rollouts to the disk.
        what = f"the metrics of the rollout of step {step}"
        total = waiting.sum_over_job(sums, contributes=self.layout.is_leader, what=what)
        stop_if_broken(self.verifiers, total["verified"], total["failed"], self.layout.is_main)
        metrics = {"verifier/failed_fraction": total["failed"] / total["sequences"]}
        self.failure_alarm.observe(step, metrics["verifier/failed_fraction"])
        if rollout.dynamic_sampling:
            metrics["sampling/generated_groups"] = total["generated"] / total["groups"]
            metrics["sampling/unfilled_fraction"] = total["unfilled"] / total["groups"]
            metrics["sampling/reward"] = total["reward"] / (total["generated"] * batch.group_size)
        if batch.kept is not None:
            metrics["sampling/kept_tokens"] = total["kept"] / total["tokens"]
        if rollout.overlong_buffer:
            metrics["overlong_penalty"] = total["penalty"] / total["sequences"]
        if rollout.max_staleness:
            metrics["staleness/mean"] = total["stale"] / total["tokens"]
            metrics["staleness/interrupted_fraction"] = total["interrupted"] / total["sequences"]
        if self.source_metrics is not None:
            metrics |= self.source_metrics.metrics(step, total, batch.group_size)
        return metrics


def _rank_slots(prompts_per_step: int, minibatches: int, layout: Layout) -> list[int]:
    """Return this data-parallel rank's places among the prompts of a step, minibatch by minibatch."""
    per_minibatch = prompts_per_step // minibatches
    check_groups(prompts_per_step, minibatches, layout.data_size)
    return [
        slot
        for start in range(0, prompts_per_step, per_minibatch)
        for slot in range(start + layout.data_rank, start + per_minibatch, layout.data_size)
    ]
