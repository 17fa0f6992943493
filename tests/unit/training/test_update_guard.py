"""Updates that are not finite: counted, kept out of the metrics, never saved; and what the guards cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from megatron_rlvr.checksums import DamagedError
from megatron_rlvr.control import ClipThresholds
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ParallelConfig
from megatron_rlvr.objectives import UpdateObjective, build_objective
from megatron_rlvr.rollout.mismatch import MismatchAlarm
from megatron_rlvr.training.checkpoint import Checkpoints
from megatron_rlvr.training.checkpoints_folder import steps
from megatron_rlvr.training.config import CheckpointConfig
from megatron_rlvr.training.loss import LOSS_SUMS
from megatron_rlvr.training.policy import UpdateReport
from megatron_rlvr.training.rollout_metrics import measure_rollout
from megatron_rlvr.training.update_guard import UpdateGuard
from megatron_rlvr.training.update_metrics import entropy_shift, update_metrics
from megatron_rlvr.weights.export import export_folder
from tests.update_faults import ADVANTAGE, FAULTS, build, equal, make_batch, state, update


@pytest.fixture(scope="module")
def layout() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(distributed_optimizer=True), seed=0) as layout:
        yield layout


@pytest.fixture(params=[False, True], ids=["plain", "distributed"])
def policy(request: pytest.FixtureRequest, layout: parallel.Layout, small_model: Path):
    policy = build(small_model, ParallelConfig(distributed_optimizer=request.param), layout)
    policy.distributed = request.param
    return policy


@pytest.mark.parametrize("clip_grad", [1.0, math.inf])
def test_a_skipped_update_leaves_every_bit(clip_grad: float, layout: parallel.Layout, small_model: Path) -> None:
    policy, undisturbed = (build(small_model, ParallelConfig(), layout, clip_grad=clip_grad) for _ in range(2))
    assert update(policy).applied
    before = state(policy)
    for name, fault in FAULTS.items():
        report = fault(policy)
        assert not report.applied and not math.isfinite(report.grad_norm), name
        assert equal(state(policy), before), name
        assert entropy_shift(report, is_reporting_rank=True) is None
    update(policy), update(undisturbed), update(undisturbed)
    assert equal(state(policy), state(undisturbed))


def report(loss: float = 0.5, applied: bool = True, norm: float = 2.0, ratio: float = 1.5) -> UpdateReport:
    sums = torch.tensor([loss, 10.0, *([1.0] * (len(LOSS_SUMS) - 2))], dtype=torch.float64)
    return UpdateReport(sums, torch.tensor(ratio), norm, applied, 0.0, 0.0)


NAN = report(math.nan, False, math.nan, math.nan)
FINITE = torch.tensor(True)


def test_metrics_leave_skipped_updates_out(layout: parallel.Layout) -> None:
    clean = update_metrics([report(0.5), report(1.5, norm=4.0)], 1, FINITE, True)
    with_skips = update_metrics([NAN, report(0.5), NAN, report(1.5, norm=4.0)], 1, FINITE, True)
    assert with_skips == clean | {"skipped_updates": 2.0}
    assert clean["grad_norm"] == 3.0 and clean["loss"] == 1.0
    nothing = update_metrics([NAN, NAN], 2, FINITE, True)
    assert nothing["skipped_updates"] == 2.0 and math.isnan(nothing.pop("grad_norm"))
    assert all(math.isfinite(value) for value in nothing.values())
    with pytest.raises(UserError, match="produced weights that are not finite"):
        update_metrics([report()], 1, torch.tensor(False), True)


def test_the_guard_stops_after_skips_in_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    guard = UpdateGuard(patience=3)
    for skipped in (True, True, False, True, True):
        assert guard.observe(4, NAN if skipped else report()) is None
    assert capsys.readouterr().err.count("warning: an update of step 4 was skipped") == 4
    resumed = UpdateGuard(patience=3)
    resumed.load_state_dict(guard.state_dict())
    problem = resumed.observe(5, NAN)
    assert problem is not None and "number 3 in a row" in problem and "\n" not in problem
    resumed.load_state_dict({})  # a checkpoint from before there were guards
    assert resumed.in_a_row == 0


@pytest.mark.parametrize("value", [None, "x", [], {}, -1, 2.5, True])
def test_a_state_of_another_kind_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"run\.json of the checkpoint holds no state of this run") as error:
        UpdateGuard(5).load_state_dict({"skipped_in_a_row": value})
    assert "skipped_in_a_row" in str(error.value) and "\n" not in str(error.value)


def test_weights_that_are_not_finite_are_never_saved(policy, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=1))
    checkpoints.save(1, policy, {}, {})
    weights = [p for chunk in policy.model_chunks for p in chunk.parameters()]
    for broken in (torch.nan, torch.inf, -torch.inf):
        value = weights[-1].data.view(-1)[-1].item()
        weights[-1].data.view(-1)[-1] = broken
        with pytest.raises(UserError, match=r"the checkpoint of step 2 is not written, and earlier ones are kept"):
            checkpoints.save(2, policy, {}, {})
        weights[-1].data.view(-1)[-1] = value
    assert steps(tmp_path) == [1]
    checkpoints.save(2, policy, {}, {}, expire=False)
    assert steps(tmp_path) == [1, 2]
    checkpoints.save(3, policy, {}, {})
    assert steps(tmp_path) == [3]


def test_a_checkpoint_from_before_the_first_step_resumes(policy, layout, small_model: Path, tmp_path: Path) -> None:
    """The one that a run writes if the first updates of all were skipped: there is no optimizer state to save yet."""
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(0, policy, {}, {})
    fresh = build(small_model, ParallelConfig(distributed_optimizer=policy.distributed), layout)
    checkpoints.load(0, fresh)
    update(policy), update(fresh)
    assert equal(state(policy), state(fresh))


def test_a_checkpoint_whose_weights_are_not_finite_is_refused(
    layout, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = build(small_model, ParallelConfig(), layout)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    policy.model_chunks[0].decoder.final_layernorm.weight.data[3] = torch.nan
    monkeypatch.setattr("megatron_rlvr.training.checkpoint.check_finite_weights", lambda *_: None)
    checkpoints.save(1, policy, {}, {})  # as older versions did
    monkeypatch.undo()
    with pytest.raises(DamagedError, match="its weights are not finite"):
        checkpoints.load(1, policy)


def test_a_log_prob_of_nan_makes_the_mismatch_nan_and_an_alarm(policy) -> None:
    batch, weight = make_batch(), torch.full((8,), 1 / 33)
    scores = policy.score(batch, ADVANTAGE)
    batch.rollout_logprob[:] = scores.logprob
    batch.rollout_logprob[7] = torch.nan
    measured = measure_rollout(batch, weight, scores, policy.layout)
    assert math.isnan(measured.metrics["kl_rollout"]) and math.isfinite(measured.entropy)
    alarm = MismatchAlarm(threshold=0.1, patience=3)
    assert alarm.observe(0, measured.metrics) is None and alarm.in_a_row == 1
    assert alarm.observe(1, {"kl_rollout": 0.2, "mismatch/max": 1.0}) is None and alarm.in_a_row == 2
    assert "KL(rollout || train) of step 2 is nan" in str(alarm.observe(2, measured.metrics))


@pytest.mark.parametrize("gap", [500.0, -500.0, 1e30, math.inf])
def test_the_mismatch_of_any_log_prob_is_finite(gap: float, policy) -> None:
    batch, weight = make_batch(), torch.full((8,), 1 / 33)
    scores = policy.score(batch, ADVANTAGE)
    batch.rollout_logprob[:] = scores.logprob
    batch.rollout_logprob[7] -= gap
    metrics = measure_rollout(batch, weight, scores, policy.layout).metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["kl_rollout"] > 10 and metrics["mismatch/effective_sample_size"] < 1


def test_a_forward_pass_that_overflows_stops_with_one_line(policy) -> None:
    for chunk in policy.model_chunks:
        for parameter in chunk.parameters():
            parameter.data.mul_(1e30)
    batch, weight = make_batch(), torch.full((8,), 1 / 33)
    scores = policy.score(batch, ADVANTAGE)
    with pytest.raises(UserError, match="the entropy of the policy is nan: its forward pass overflows"):
        measure_rollout(batch, weight, scores, policy.layout)


READS = {"item", "tolist", "cpu", "numpy", "nonzero", "__float__", "__int__", "__bool__", "__index__"}


class HostReads(TorchFunctionMode):
    """Counts the calls by which the host reads a tensor, for which it would wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in READS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def test_guards_add_no_wait_for_the_device_and_no_collective(policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before there were guards: the norm in an update, and 1 + number of updates + 2 sums after a step's updates.

    The other reads of an update are of the batch, which is in host memory.
    """
    calls: Counter[str] = Counter()
    all_reduce = dist.all_reduce

    def counted(*arguments: Any, **settings: Any) -> Any:
        calls["all_reduce"] += 1
        return all_reduce(*arguments, **settings)

    monkeypatch.setattr(dist, "all_reduce", counted)
    update(policy)
    batch, weight = make_batch(), torch.full((8,), 1 / 33)
    scores = policy.score(batch, ADVANTAGE)
    chosen = UpdateObjective(build_objective("clip"), ClipThresholds())
    calls.clear()
    with HostReads() as reads:
        done = policy.update(batch, torch.arange(8), ADVANTAGE, weight, scores, chosen)
    assert reads.counts["item"] == 1 and reads.counts["tolist"] == reads.counts["cpu"] == 0  # the norm
    assert reads.counts["__float__"] <= 1 and reads.counts["__bool__"] == 0
    assert calls["all_reduce"] <= 2
    calls.clear()
    with HostReads() as reads:
        finite = policy.weights_are_finite()
        assert not reads.counts
        update_metrics([done, done, done], 1, finite, True)
    assert reads.counts["cpu"] == 1 and calls["all_reduce"] == 2


def test_an_export_in_a_dtype_that_cannot_hold_a_weight_is_refused(
    layout: parallel.Layout, small_model: Path, tmp_path: Path
) -> None:
    policy = build(small_model, ParallelConfig(), layout)
    with torch.no_grad():
        next(iter(policy.model_chunks[0].parameters())).view(-1)[0] = 3.4e38  # finite in float32, not in bfloat16
    with pytest.raises(UserError, match=r"out: .* has values that are NaN or infinite"):
        export_folder(policy.bridge, policy.model_chunks, tmp_path / "out", write=True, dtype=torch.bfloat16)
    assert not list(tmp_path.glob("out*"))
