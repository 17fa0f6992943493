"""Evaluation on held-out prompts: pass@k, reward and length."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from megatron_rlvr.config import Config
from megatron_rlvr.megatron import waiting
from megatron_rlvr.megatron.parallel import Layout
from megatron_rlvr.rollout.engines.base import EngineLostError, GroupRequest, RolloutEngine, RolloutError
from megatron_rlvr.rollout.grading import Grader
from megatron_rlvr.rollout.leaders import run_on_leaders
from megatron_rlvr.rollout.prompts import load_heldout_prompts
from megatron_rlvr.rollout.samples import Row, collected, rows_of_prompt
from megatron_rlvr.rollout.sampling import SamplingSettings, sample_seed
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.rollout.verifier_alarm import stop_if_broken
from megatron_rlvr.telemetry.reporter import Reporter
from megatron_rlvr.verifiers import Verdict, VerifierPool

# Takes the place of the step in seeds. No training step has this number, so no evaluation repeats a training sample.
EVALUATION_SEED = 2**31


class Evaluator:
    """Completes held-out prompts and scores the completions. Data-parallel ranks share the prompts.

    Every evaluation uses the same prompts and seeds.

    Attributes:
        samples: on rank 0, the rows of the latest evaluation, if ``telemetry.samples_every`` is not 0.

    Raises:
        UserError: if the held-out data cannot be read, or a prompt cannot be used.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        engine: RolloutEngine,
        tokenization: Tokenization,
        verifiers: VerifierPool,
    ):
        rollout, evaluation = config.rollout, config.evaluation
        self.seed, self.layout, self.engine = config.seed, layout, engine
        self.verifiers = verifiers
        self.grader = Grader(tokenization, verifiers)
        self.pass_at = evaluation.pass_at
        self.sampling = SamplingSettings.for_evaluation(evaluation, rollout, tokenization.stops(rollout.stop))
        self.prompts = load_heldout_prompts(config.data, rollout, evaluation, tokenization, verifiers)
        self.keep_samples = config.telemetry.samples_every > 0
        self.samples: list[Row] = []

    def evaluate(self) -> dict[str, float]:
        """Evaluate the policy. Collective over the job.

        Returns:
            pass@k for k = 1, 2, 4, ..., the mean number of different right answers per prompt, the mean reward, and
            the mean response length in tokens. Empty, after a warning, if the engine cannot generate: the next rollout
            fails in the same way and ends the run with a checkpoint.

        Raises:
            RolloutError: on every process, if the verifier refuses the data.
            UserError: on every process, if no completion of the job has been verified so far.
        """
        examples, prompts = self.prompts.examples, self.prompts.token_ids
        samples = self.sampling.samples
        indices = range(self.layout.data_rank, len(examples), self.layout.data_size)
        requests = [
            GroupRequest(prompts[i], [sample_seed(self.seed, EVALUATION_SEED, i, s) for s in range(samples)])
            for i in indices
        ]
        try:
            groups = run_on_leaders(
                lambda: self.engine.generate(requests, self.sampling),
                self.engine,
                self.layout,
                "an evaluation's completions",
            )
        except (EngineLostError, RolloutError) as error:
            print(f"warning: no evaluation: {error}", file=sys.stderr)
            return {}
        graded = run_on_leaders(
            lambda: self.grader.grade([examples[i] for i in indices], groups or []),
            self.engine,
            self.layout,
            "an evaluation's rewards",
        )
        if self.keep_samples:
            rows = [
                row
                for i, group, (texts, verdicts) in zip(indices, groups or [], graded or [], strict=False)
                for row in rows_of_prompt(i, examples[i], group, texts, verdicts)
            ]
            self.samples = collected(rows, self.layout)
        judged = [group for _, group in graded or []]
        solved = [sum(map(_is_right, group)) for group in judged]
        sums = {f"pass@{k}": math.fsum(pass_at_k(samples, count, k) for count in solved) for k in self.pass_at}
        sums["distinct_solutions"] = sum(distinct_solutions(texts, verdicts) for texts, verdicts in graded or [])
        sums["reward"] = math.fsum(verdict.reward for group in judged for verdict in group) / samples
        sums["response_tokens"] = sum(len(c.token_ids) for group in groups or [] for c in group) / samples
        sums["failed"] = sum(verdict.status != "ok" for group in judged for verdict in group)
        sums["verified"] = self.verifiers.counts["ok"]
        totals = waiting.sum_over_job(sums, contributes=self.layout.is_leader, what="the scores of an evaluation")
        stop_if_broken(self.verifiers, totals.pop("verified"), totals.pop("failed"), self.layout.is_main)
        return {name: total / len(examples) for name, total in totals.items()}


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Return the unbiased estimate of the probability that at least one of k completions solves a prompt.

    It is 1 - C(n - c, k) / C(n, k) for c = `solved` of n = `samples` (Chen et al., arXiv 2107.03374, equation 1).
    """
    if samples - solved < k:
        return 1.0
    return 1.0 - math.prod((samples - solved - i) / (samples - i) for i in range(k))


def distinct_solutions(texts: Sequence[str], verdicts: Sequence[Verdict]) -> int:
    """Return how many different right answers the completions of one prompt hold.

    Completions are compared by the answer that the verifier found in them, or by their text, without the space around
    it, if the verifier does not return answers.
    """
    right = zip(texts, verdicts, strict=True)
    return len({verdict.detail or text.strip() for text, verdict in right if _is_right(verdict)})


def _is_right(verdict: Verdict) -> bool:
    return verdict.reward > 0.5


def evaluate(evaluator: Evaluator | None, report: Reporter, step: int) -> None:
    """Evaluate the policy after `step` steps and report it, if there is held-out data. Collective over the job."""
    if evaluator is not None:
        with report.timed_phase("evaluating", "evaluate"):
            if scores := evaluator.evaluate():
                report.evaluation(step, scores)
                report.samples(step, evaluator.samples, heldout=True)
