"""The standard error of a step's entropy, with and without stratified prompts, against the spread over many steps."""

import math
import random
import statistics

import pytest
import torch

from megatron_rlvr.data import PromptSampler
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.megatron import collectives
from megatron_rlvr.megatron.parallel import Layout
from megatron_rlvr.training.head import TokenScores
from megatron_rlvr.training.loss import LOSS_SUMS
from megatron_rlvr.training.policy import UpdateReport
from megatron_rlvr.training.rollout_metrics import measure_rollout
from megatron_rlvr.training.update_metrics import entropy_shift

PER_STEP, SAMPLES = 24, 2
LAYOUT = Layout(
    rank=0,
    world_size=1,
    data_rank=0,
    data_size=1,
    is_leader=True,
    is_reporting_rank=True,
)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(collectives, "sum_over_job", lambda values, contributes: values if contributes else {})
    monkeypatch.setattr(collectives, "sum_tensor_over_job", lambda values, contributes: values * contributes)
    monkeypatch.setattr(collectives, "max_over_job", lambda values: values)


def measure(indices, kinds, rng):
    """A step whose tokens' entropy, and number, depend on the prompt's kind, on the prompt and on chance."""
    lengths, entropy = [], []
    for i in indices:
        for _ in range(SAMPLES):
            lengths.append(3 if kinds[i] < 400 else 5)
            level = 0.1 + kinds[i] / 1000 + 0.1 * math.sin(i)
            entropy += [level + rng.uniform(-0.05, 0.05) for _ in range(lengths[-1])]
    completions = [Completion([1] * n, [0.0] * n, "stop", 0) for n in lengths]
    batch = RolloutBatch.from_completions([[5, 6]] * len(indices), completions, [0.0] * len(lengths), padding=0)
    batch.slots = torch.arange(len(indices))
    batch.strata = torch.tensor([kinds[i] for i in indices], dtype=torch.float64)
    zero = torch.zeros(len(entropy))
    scores = TokenScores(zero, torch.tensor(entropy), zero, zero)
    return batch, scores


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("prompts", [24, 48, 1200])
def test_the_standard_error_is_the_spread_over_steps(prompts, stratified):
    rng = random.Random(5)
    kinds = [float(rng.randrange(1000)) for _ in range(prompts)]
    sampler = PromptSampler(prompts, PER_STEP, 0, kinds if stratified else None)
    entropies, errors = [], []
    for step in range(300):
        batch, scores = measure(sampler.indices(step), kinds, rng)
        batch.sampled_fraction = PER_STEP / prompts
        if not stratified:
            batch.strata = None
        measured = measure_rollout(batch, torch.ones(PER_STEP * SAMPLES), scores, LAYOUT)
        entropies.append(measured.entropy)
        errors.append(measured.standard_error)
    claimed = math.sqrt(statistics.mean(e * e for e in errors))
    assert 0.85 < statistics.stdev(entropies) / claimed < 1.15
    expected = {24: (0.002, 0.002), 48: (0.0125, 0.04), 1200: (0.018, 0.058)}[prompts][not stratified]
    assert claimed == pytest.approx(expected, rel=0.3)


def test_the_shift_is_of_the_mean_entropy_of_active_tokens():
    sums = torch.zeros(len(LOSS_SUMS), dtype=torch.float64)
    report = UpdateReport(sums, torch.tensor(1.0), 0.1, True, 0.0, 0.0)
    assert entropy_shift(report, is_reporting_rank=True) is None  # no active token
    sums[LOSS_SUMS.index("old_entropy")] = 8.0
    sums[LOSS_SUMS.index("entropy_drift")] = -2.0
    assert entropy_shift(report, is_reporting_rank=True) == pytest.approx(math.log(0.75))
    sums[LOSS_SUMS.index("entropy_drift")] = -8.0  # entropy vanished
    assert entropy_shift(report, is_reporting_rank=True) == pytest.approx(math.log(1e-3))
