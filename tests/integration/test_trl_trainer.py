"""TRL's trainer with a schedule and the operators, where TRL is installed: `make trl`."""

import json

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed; `make trl` installs it beside the trainer and runs this file")

import trl_trainer

from megatron_rlvr.control import Constant, IncreaseThenDecrease


def test_entropy_follows_the_curve(tmp_path):
    rows = trl_trainer.main(0, str(tmp_path))
    assert [row["step"] for row in rows] == list(range(trl_trainer.ROLLOUTS))
    # A step has 160 completions of 4 tokens, so its entropy is noisy: the mean error decides.
    errors = [abs(row["entropy"] / row["control/target"] - 1.0) for row in rows[trl_trainer.ROLLOUTS // 10 :]]
    assert sum(errors) / len(errors) < 0.06
    assert max(errors) < 0.2
    assert any(row["control/steering"] for row in rows)
    assert rows[-1]["entropy"] < 0.8 * rows[0]["entropy"] < rows[12]["entropy"]


def test_static_thresholds_train_as_trl_does(tmp_path, monkeypatch):
    """With constant thresholds of 0.2, the losses are those of TRL's own trainer, from TRL's own log-probs."""
    monkeypatch.setattr(trl_trainer, "ROLLOUTS", 2)
    found = trl_trainer.build(0, str(tmp_path / "ours"), Constant())
    found.train()
    expected = trl_trainer.build(0, str(tmp_path / "trl"), None)
    expected.train()
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (found, expected)]
    assert len(losses[0]) == 2
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_holds_the_schedule(tmp_path, monkeypatch):
    monkeypatch.setattr(trl_trainer, "ROLLOUTS", 2)
    trainer = trl_trainer.build(0, str(tmp_path), IncreaseThenDecrease(4))
    trainer.args.save_strategy, trainer.args.save_steps = "steps", trl_trainer.UPDATES
    trainer.train()
    saved = sorted(tmp_path.glob("checkpoint-*/schedule.json"), key=lambda file: file.stat().st_mtime)
    assert len(saved) == 2
    state = json.loads(saved[-1].read_text())
    assert state["schedule"]["schedule"] == "increase-then-decrease"
    assert state["rollout"] == 1
    monkeypatch.setattr(trl_trainer, "ROLLOUTS", 3)
    again = trl_trainer.build(0, str(tmp_path), IncreaseThenDecrease(4))
    again.train(resume_from_checkpoint=str(saved[-1].parent))
    assert [row["step"] for row in again.history] == [2]
