"""Every correction with every objective, from logits and from hidden states, in padded and in packed microbatches.

The loss and its gradient are compared with the objective without a correction, times the weight of each token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_rlvr.control import ClipThresholds
from megatron_rlvr.data.microbatch import Microbatch, MicrobatchConfig, build_microbatch, partition
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ParallelConfig
from megatron_rlvr.objectives import OBJECTIVES, TokenInputs, UpdateObjective, build_objective
from megatron_rlvr.objectives.importance import SampledTokens
from megatron_rlvr.objectives.importance_presets import PRESETS
from megatron_rlvr.training.loss import MinibatchLoss
from megatron_rlvr.training.step_importance import step_importance
from tests.update_faults import ADVANTAGE, build, make_batch

TOKENS, SEQUENCES = 33, 8
MICROBATCHES = {"padded": MicrobatchConfig(sequences=4), "packed": MicrobatchConfig(tokens=40)}
# Values at which the preset keeps some of these tokens and leaves others out.
LOOSER = {
    **{"icepop": "icepop(floor=0.6, cap=1.8)", "decoupled": "decoupled(cap=1.8)", "mis": "mis(cap=1.5)"},
    **{"geometric": "geometric(floor=0.8, cap=1.2)", "k3": "k3(cap=0.12)", "opsm": "opsm(cap=0.1)"},
}


class Step:
    """One step's tokens, and hidden states that stand for the output of the model in an update."""

    def __init__(self, layout: parallel.Layout, model: Path):
        policy = build(model, ParallelConfig(), layout)
        self.layout, self.head, self.batch = layout, policy._head, make_batch()
        self.matrix = self.head.model.output_weight().detach()
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.hidden = normal(TOKENS, self.matrix.shape[1])
        self.scores = policy.score(self.batch, ADVANTAGE)
        self.advantage = ADVANTAGE[self.batch.sequence_of_token()]
        targets = build_microbatch(self.batch, torch.arange(SEQUENCES), MicrobatchConfig()).targets
        log_probs = torch.log_softmax(self.hidden @ self.matrix.T, -1)[:, : self.head.model.vocabulary]
        self.logprob = log_probs.gather(1, targets[:, None])[:, 0]
        self.entropy = -(log_probs.exp() * log_probs).sum(-1)
        # d logprob / d hidden
        self.slope = self.matrix[targets] - log_probs.exp() @ self.matrix[: self.head.model.vocabulary]
        self.scores.logprob = (self.logprob + 0.2 * normal(TOKENS)).clamp(max=0.0)
        self.batch.rollout_logprob = (self.scores.logprob + 0.5 * normal(TOKENS)).clamp(max=0.0)

    def microbatches(self, kind: str) -> list[Microbatch]:
        members = partition(self.batch, torch.arange(SEQUENCES), MICROBATCHES[kind])
        assert len(members) == 2
        return [build_microbatch(self.batch, chosen, MICROBATCHES[kind]) for chosen in members]

    def without_correction(self, name: str, kind: str) -> tuple[Tensor, Tensor]:
        """The objective of every token, and its slope in the token's log-prob."""
        objective, values, slopes = build_objective(name), torch.zeros(TOKENS), torch.zeros(TOKENS)
        for microbatch in self.microbatches(kind):
            of = microbatch.token_index
            logprob = self.logprob[of].requires_grad_()
            found = objective(
                TokenInputs(
                    *(logprob, self.entropy[of], self.scores.logprob[of], self.advantage[of]),
                    *(microbatch.sequence_index, len(microbatch.sequences), ClipThresholds()),
                    rollout_logprob=self.batch.rollout_logprob[of],
                    old_entropy=self.scores.entropy[of],
                )
            ).objective
            values[of] = found.detach()
            (slopes[of],) = torch.autograd.grad(found.sum(), logprob)
        return values, slopes

    def weights(self, text: str) -> tuple[Tensor | None, Tensor]:
        """The weights that the trainer computes before the step, and those of this update, which follow it."""
        importance = build_objective("clip", importance=text).importance
        assert importance is not None
        before = step_importance(importance, self.batch, ADVANTAGE, self.scores, 1, self.layout)
        tokens = SampledTokens(
            *(self.logprob, self.batch.rollout_logprob, self.advantage, self.batch.sequence_of_token(), SEQUENCES)
        )
        weight = before.weight * importance.during_update(tokens).weight
        assert (weight == 0).any() or before.truncated.any()
        assert (weight != 0).any()
        return before.weight, weight

    def loss(self, name: str, text: str, kind: str, fused: bool, before: Tensor | None) -> tuple[float, Tensor]:
        """The loss of the minibatch, and its gradient in the hidden states."""
        objective = UpdateObjective(build_objective(name, importance=text), ClipThresholds(), importance_weight=before)
        token_weight = torch.full((SEQUENCES,), 1 / TOKENS)
        head = replace(self.head, fused=fused)
        loss = MinibatchLoss(head, self.batch, ADVANTAGE, token_weight, self.scores, objective, 1.0)
        hidden, total = self.hidden.clone().requires_grad_(), 0.0
        for microbatch in self.microbatches(kind):
            own = hidden[microbatch.token_index]
            part = loss(own if fused else own @ self.matrix.T, microbatch)
            part.backward()
            total += part.item()
        assert hidden.grad is not None
        return total, hidden.grad


@pytest.fixture(scope="module")
def step(small_model: Path) -> Iterator[Step]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield Step(layout, small_model)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_correction_weighs_the_tokens_on_every_path(name: str, step: Step) -> None:
    for preset in PRESETS:
        before, weight = step.weights(LOOSER.get(preset, preset))
        for kind in MICROBATCHES:
            values, slopes = step.without_correction(name, kind)
            for fused in (False, True):
                loss, gradient = step.loss(name, LOOSER.get(preset, preset), kind, fused, before)
                path = (preset, kind, fused)
                assert loss == pytest.approx(float(-(weight * values).sum() / TOKENS), rel=1e-5, abs=1e-6), path
                expected = -(weight * slopes / TOKENS)[:, None] * step.slope
                torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=lambda m, p=path: f"{p} {m}")
