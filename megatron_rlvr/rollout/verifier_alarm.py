"""Verifiers that fail: a run stops if nothing can be verified, and warns if much cannot."""

from __future__ import annotations

import sys

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import waiting
from megatron_rlvr.verifiers import VerifierPool

FAILED_FRACTION_ALARM = 0.5
"""Fraction of a step's completions from which on their failed verification is reported."""


def stop_if_broken(verifiers: VerifierPool, verified: float, failed: float, prints: bool) -> None:
    """Stop a run whose verifier has failed for every completion so far, before it trains on rewards of 0.

    So a verifier that is broken ends the run in its first step, or in its first evaluation. One that fails later does
    not: the metric ``verifier/failed_fraction`` and `VerifierAlarm` report it. Collective over the job if the run
    stops.

    Args:
        verifiers: the pool of this process.
        verified: number of completions that were verified since the process started, over the job.
        failed: number of completions that failed in this step, over the job.
        prints: whether this process prints the traceback of the first failure.

    Raises:
        UserError: on every process, with the first failure of the lowest rank that has one.
    """
    if verified or not failed:
        return
    first = verifiers.first_failure
    report = None if first is None else (first.verdict.detail, first.traceback)
    reports = [found for found in waiting.all_gather_over_job(report, "the first failures of verifiers") if found]
    detail, traceback = next((found for found in reports if found[1]), reports[0])
    if traceback and prints:
        print(traceback.rstrip(), file=sys.stderr, flush=True)
    raise UserError(
        f"{verifiers.name} failed for all {int(failed)} completions, so there is nothing to learn: {detail}"
        f"{' (its traceback is above)' if traceback else ''}; correct it, then start again"
    )


class VerifierAlarm:
    """Warns when verification begins to fail for many completions, and again after it has recovered in between."""

    def __init__(self, prints: bool) -> None:
        """``prints`` says whether this process prints the warning."""
        self._prints, self._raised = prints, False

    def observe(self, step: int, failed_fraction: float) -> None:
        """Take note of a step's fraction of completions whose verification failed."""
        raised = failed_fraction >= FAILED_FRACTION_ALARM
        if raised and not self._raised and self._prints:
            print(
                f"warning: the verifier failed for {failed_fraction:.0%} of the completions of step {step}; "
                "their reward is 0",
                file=sys.stderr,
                flush=True,
            )
        self._raised = raised
