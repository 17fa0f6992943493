import json
import math
import subprocess
import sys
import types

import numpy
import pytest

from megatron_rlvr.errors import UserError
from megatron_rlvr.telemetry import MetricsWriter, deterministic, read_metrics
from megatron_rlvr.telemetry.sinks import WeightsAndBiases
from tests.processes import DEADLINE_SECONDS


def record(step: int, attempt: int = 0) -> dict:
    return {"step": step, "reward": 0.1 * step, "entropy": 1 / (step + 3), "time/step": step + 0.5 * attempt}


def write(directory, steps, resume_step=None, attempt=0):
    with MetricsWriter(directory, resume_step, tensorboard=False) as writer:
        for step in steps:
            writer.write(record(step, attempt))


@pytest.mark.parametrize("killed_after, resume_step", [(7, 4), (7, 8), (0, 0), (3, 1)])
@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "rew', b"{"])
def test_resumed_run_leaves_the_file_of_an_uninterrupted_run(tmp_path, killed_after, resume_step, torn):
    write(tmp_path / "whole", range(12))
    write(tmp_path / "killed", range(killed_after + 1))
    path = tmp_path / "killed" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    write(tmp_path / "killed", range(resume_step, 12), resume_step, attempt=1)

    whole, killed = read_metrics(tmp_path / "whole"), read_metrics(path)
    assert [deterministic(r) for r in killed] == [deterministic(r) for r in whole]
    assert whole[11] != killed[11]  # the wall-clock metrics differ, and `deterministic` drops them
    assert path.read_bytes().count(b"\n") == 12


def test_record_is_on_disk_when_write_returns(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in range(3):
        writer.write(record(step))
        assert json.loads(path_lines(tmp_path)[-1])["step"] == step


def path_lines(directory):
    return (directory / "metrics.jsonl").read_text().splitlines()


def test_values_round_trip_exactly(tmp_path):
    values = numpy.random.default_rng(3).normal(size=50)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step, value in enumerate(values):
            writer.write(
                {"step": step, "grad_norm": value, "single": numpy.float32(value), "tokens": numpy.int64(step)}
            )
    read = read_metrics(tmp_path)
    assert [r["grad_norm"] for r in read] == values.tolist()
    assert [numpy.float32(r["single"]) for r in read] == values.astype(numpy.float32).tolist()
    assert read[7]["tokens"] == 7


def test_values_that_are_not_finite_are_null_in_json_and_read_as_nan(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write({"step": 0, "grad_norm": math.inf, "kl_rollout": math.nan})
    assert path_lines(tmp_path) == ['{"step": 0, "grad_norm": null, "kl_rollout": null}']
    assert math.isnan(read_metrics(tmp_path)[0]["grad_norm"])


def test_repeated_evaluations_replace_earlier_ones(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in (0, 4, 8):
            writer.write_evaluation({"step": step, "pass@1": step / 10})
        for step in range(9):
            writer.write(record(step))
    path = tmp_path / "evaluations.jsonl"
    # Resumed at 4: the evaluation of the policy in checkpoint 4 is kept, the later one is removed.
    with MetricsWriter(tmp_path, 4, tensorboard=False) as writer:
        assert [r["step"] for r in read_metrics(path)] == [0, 4]
        writer.write_evaluation({"step": 4, "pass@1": 0.5})
        writer.write_evaluation({"step": 8, "pass@1": 0.6})
    assert [(r["step"], r["pass@1"]) for r in read_metrics(path)] == [(0, 0.0), (4, 0.5), (8, 0.6)]


def test_deterministic_drops_only_wall_clock_metrics():
    whole = {
        "step": 1,
        "tokens": 5,
        "timeouts": 1,
        "time/rollout": 2.0,
        "tokens_per_second": 9.0,
        "rollout/tokens_per_second": 8.0,
        "memory/peak_bytes": 7,
        "kl_rollout": 0.1,
    }
    assert deterministic(whole) == {"step": 1, "tokens": 5, "timeouts": 1, "kl_rollout": 0.1}


def test_new_run_refuses_the_metrics_of_another_run(tmp_path):
    write(tmp_path, range(2))
    with pytest.raises(UserError, match="resume that run"):
        MetricsWriter(tmp_path, tensorboard=False)


def test_missing_steps_before_the_resume_step_are_reported(tmp_path):
    write(tmp_path, range(2))
    with pytest.warns(UserWarning, match="ends at step 1, but the run resumes at step 5"):
        MetricsWriter(tmp_path, 5, tensorboard=False)


def test_steps_must_increase(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(record(3))
        with pytest.raises(ValueError, match="step 3 must be greater than the last one, 3"):
            writer.write(record(3))
        with pytest.raises(ValueError, match="integer 'step'"):
            writer.write({"reward": 1.0})


@pytest.mark.parametrize("line", ["{oops}", "[1, 2]", '{"reward": 1}'])
def test_error_gives_the_number_of_an_invalid_line(tmp_path, line):
    write(tmp_path, range(2))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + line + "\n" + json.dumps(record(3)) + "\n")
    with pytest.raises(UserError, match="line 3"):
        read_metrics(path)


def test_missing_metrics_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no metrics at"):
        read_metrics(tmp_path)


def test_tensorboard_drops_the_scalars_that_a_resumed_run_replaces(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as writer:
        for step in range(6):
            writer.write({"step": step, "reward": 0.5})
        writer.write_evaluation({"step": 4, "pass@1": 0.25})
    with MetricsWriter(tmp_path, 3) as writer:
        for step in range(3, 6):
            writer.write({"step": step, "reward": 0.75})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(s, 0.5 if s < 3 else 0.75) for s in range(6)]


def test_telemetry_does_not_import_torch(tmp_path):
    code = (
        "import sys\n"
        "from megatron_rlvr.telemetry import MetricsWriter\n"
        f"MetricsWriter({str(tmp_path)!r}).write({{'step': 0, 'reward': 1.0}})\n"
        "assert 'torch' not in sys.modules and 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=DEADLINE_SECONDS)


def test_wandb_receives_every_record_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    opened, logged = [], []

    def init(**settings):
        opened.append(settings)
        return types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.sinks.append(WeightsAndBiases(tmp_path, {"project": "study"}))
        writer.write({"step": 0, "reward": 0.5})
        writer.write_evaluation({"step": 1, "pass@1": 0.25})
    WeightsAndBiases(tmp_path, {"project": "study"}).close()
    assert logged == [(0, {"reward": 0.5}), (1, {"evaluation/pass@1": 0.25})]
    assert opened[0]["id"] == opened[1]["id"] and opened[0]["project"] == "study"


def test_missing_wandb_is_a_user_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        WeightsAndBiases(tmp_path, {})
