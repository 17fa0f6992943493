"""Updates in which clipping cannot act: warnings at the start and in the run; ratios from the engine's log-probs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megatron_rlvr.config import Config, check, load_config, warnings_of
from megatron_rlvr.control import ClipThresholds
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ParallelConfig
from megatron_rlvr.objectives import UpdateObjective, build_objective
from megatron_rlvr.training.config import AlgorithmConfig
from megatron_rlvr.training.entropy_control import EntropyControl
from megatron_rlvr.training.loss import LOSS_SUMS
from megatron_rlvr.training.on_policy import OnPolicyWatch
from tests.update_faults import ADVANTAGE, build, make_batch


def finished(ratio: float, skipped: float = 0.0) -> dict[str, float]:
    return {"ratio_max": ratio, "lr": 1e-9, "skipped_updates": skipped}


def test_ratios_that_stay_1_are_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = OnPolicyWatch(updates=16)
    for step, record in enumerate([finished(1.00001), finished(1.0), finished(1.3), finished(1.0, 16.0)]):
        watch.observe(step, record)
    assert capsys.readouterr().err == ""
    for step in range(4, 12):
        watch.observe(step, finished(1.00002))
    error = capsys.readouterr().err
    assert error.count("warning: ") == error.count("\n") == 1
    assert "in all 16 updates of each of the steps 4 to 6, with learning rate 1e-09" in error
    single = OnPolicyWatch(updates=1)  # its configuration has a warning already
    for step in range(5):
        single.observe(step, finished(1.0))
    OnPolicyWatch(updates=16, is_main=False, seen=2).observe(3, finished(1.0))
    assert capsys.readouterr().err == ""


def test_corrections_that_leave_out_nearly_all_tokens_are_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    watch = OnPolicyWatch(updates=1)
    for step, masked in enumerate([1.0, 0.95, 0.9, 0.91, 0.92]):
        watch.observe(step, finished(1.3) | {"mismatch/masked_fraction": masked})
    assert capsys.readouterr().err == ""
    for step in range(5, 12):
        watch.observe(step, finished(1.3) | {"mismatch/masked_fraction": 0.934})
    error = capsys.readouterr().err
    assert error.count("warning: ") == error.count("\n") == 1
    assert "left out nearly all tokens of each of the steps 3 to 5 (93.4% of step 5)" in error


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["algorithm.minibatches=1"],
            ["with one update per rollout the importance ratio is 1 and every clip threshold"],
        ),
        (
            ["algorithm.minibatches=1", "algorithm.old_policy=rollout"],
            ["the importance ratio is 1 but for rounding in the engine and every clip threshold is inert"],
        ),
        (
            ["algorithm.minibatches=1", "STALE", "algorithm.objective.importance=tis"],
            ["until then only algorithm.objective.importance bounds what stale tokens do"],
        ),
        (["STALE"], ["rollout.max_staleness=2 without algorithm.objective.importance"]),
        (["STALE", "algorithm.old_policy=rollout"], ["algorithm.old_policy=rollout with rollout.max_staleness=2"]),
        (["STALE", "algorithm.old_policy=rollout", "algorithm.minibatches=1"], ["algorithm.old_policy=rollout with"]),
        (["STALE", "algorithm.objective.importance=decoupled"], []),
        (["STALE", "algorithm.objective.importance_cap=2"], []),
        (["algorithm.minibatches=1", "algorithm.epochs=2"], []),
        (["algorithm.old_policy=rollout"], []),
    ],
)
def test_settings_under_which_thresholds_cannot_act_are_named(
    overrides: list[str], expected: list[str], run_yaml: Path
) -> None:
    stale = ["rollout.engine=sglang", "rollout.max_staleness=2"]
    given = [text for override in overrides for text in (stale if override == "STALE" else [override])]
    config = load_config(run_yaml, ["algorithm.epochs=1", *given])
    found = warnings_of(config)
    assert len(found) == len(expected)
    for warning, text in zip(found, expected, strict=True):
        assert text in warning and "\n" not in warning


def test_the_rollouts_log_probs_are_not_weighed_twice(run_yaml: Path) -> None:
    old = "algorithm.old_policy=rollout"
    for importance in ("importance=icepop", "importance='geometric + tis'", "importance_cap=2", "importance=m2po"):
        with pytest.raises(UserError, match=r"already weighs every token by pi / pi_rollout"):
            load_config(run_yaml, [old, f"algorithm.objective.{importance}"])
    for importance in ("geometric", "k3", "opsm", "k3 + opsm", "k3(level=token, action=mask)"):
        check(load_config(run_yaml, [old, f"algorithm.objective.importance='{importance}'"]))


def test_the_ratio_starts_from_the_policy_that_is_configured(small_model: Path) -> None:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        policy, batch = build(small_model, ParallelConfig(), layout), make_batch()
        scores = policy.score(batch, ADVANTAGE)
        batch.rollout_logprob = scores.logprob - 0.1
        objective = UpdateObjective(build_objective("clip"), ClipThresholds())
        weight, losses = torch.full((8,), 1 / 33), []
        for old_policy in ("recomputed", "rollout"):
            policy = build(small_model, ParallelConfig(), layout)
            config = Config(algorithm=AlgorithmConfig(old_policy=old_policy))
            control = EntropyControl(config.algorithm, config.optimizer, config.schedule(), layout)
            old = control.clipped_around(batch, scores)
            report = policy.update(batch, torch.arange(8), ADVANTAGE, weight, old, objective)
            losses.append((float(report.ratio_max), float(report.sums[LOSS_SUMS.index("loss")])))
        # All ratios are 1 and then e^0.1, which is inside the bounds.
        assert losses[0][0] == pytest.approx(1.0, abs=1e-4) and losses[1][0] == pytest.approx(math.exp(0.1), rel=1e-4)
        assert losses[1][1] == pytest.approx(losses[0][1] * math.exp(0.1), rel=1e-4)
