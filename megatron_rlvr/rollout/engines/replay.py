"""The replay engine, which reads completions of an earlier run from its ``rollouts/`` folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.base import GroupRequest, OnGroup
from megatron_rlvr.rollout.engines.local import LocalEngine
from megatron_rlvr.rollout.recording import read_recorded_group
from megatron_rlvr.rollout.sampling import SamplingSettings


class ReplayEngine:
    """Answers training requests with the completions that ``rollout.record`` stored for the same step and slot.

    Evaluations are not recorded, so the local engine generates them.

    Args:
        folder: ``rollouts/`` folder of the recorded run.
        evaluation: engine that generates evaluations; None in a run without held-out data.
    """

    streaming = False
    draws_from_policy = False

    def __init__(self, folder: Path, evaluation: LocalEngine | None):
        self.folder, self.evaluation = folder, evaluation

    def generate(
        self, requests: Sequence[GroupRequest], sampling: SamplingSettings, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`.

        Raises:
            UserError: if a recording is missing, has a different number of completions, or has the kept tokens of
                sampling under top-p or top-k where `sampling` has no such cut, or lacks them where it has. Also if it
                lacks the routes that `sampling` asks for; routes that are not asked for are ignored.
        """
        recorded = [request for request in requests if request.place is not None]
        if not recorded and self.evaluation is not None:
            return self.evaluation.generate(requests, sampling)
        groups = [
            read_recorded_group(self.folder, *place, sampling, len(request.prompt))
            for request in recorded
            if (place := request.place) is not None
        ]
        if sampling.returns_kept and any(completion.kept is None for group in groups for completion in group):
            raise UserError(
                f"the rollouts in {self.folder} were recorded without the tokens that rollout.top_p and rollout.top_k "
                "keep: record them again with the same rollout.top_p and rollout.top_k, or set these to 1 and 0"
            )
        if not sampling.returns_kept and any(completion.kept is not None for group in groups for completion in group):
            raise UserError(
                f"the rollouts in {self.folder} were recorded under rollout.top_p or rollout.top_k, which are not set "
                "here: set them to the values in config.yaml of the recorded run"
            )
        return groups

    def assist(self) -> None:
        if self.evaluation is not None:
            self.evaluation.assist()

    def dismiss(self) -> None:
        if self.evaluation is not None:
            self.evaluation.dismiss()

    def offload(self) -> None:
        pass

    def update_weights(self, version: int) -> dict[str, float]:
        return {} if self.evaluation is None else self.evaluation.update_weights(version)
