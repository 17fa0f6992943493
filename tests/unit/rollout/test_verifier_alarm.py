"""Verifiers that fail: a run with one that verifies nothing stops, one that fails often is reported."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine, repeats_the_right_token

from megatron_rlvr.config import Config
from megatron_rlvr.data.config import DataConfig
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.config import ModelConfig
from megatron_rlvr.rollout.collection import RolloutCollector
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.rollout.evaluation import Evaluator
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.rollout.verifier_alarm import VerifierAlarm
from megatron_rlvr.verifiers import VerifierPool


def divides_by_zero(completion, answer):
    return 1 / 0


def returns_nothing(completion, answer):
    return None


def returns_a_dictionary(completion, answer):
    return {"accuracy": 1.0}


def returns_too_much(completion, answer):
    return 1e300


BROKEN = {
    divides_by_zero: "ZeroDivisionError: division by zero (its traceback is above)",
    returns_nothing: "the verifier returned None, which is not a number",
    returns_a_dictionary: "the verifier returned a dictionary with 'accuracy', which is not a number",
    returns_too_much: "the verifier returned 1e+300, infinite as a float32",
}


def _config(small_model: Path, problems: Path, **rollout) -> Config:
    data = DataConfig(train=str(problems), heldout=str(problems))
    config = Config(steps=6, model=ModelConfig(path=str(small_model)), data=data, run_directory="unused")
    config.rollout = RolloutConfig(prompts_per_step=8, samples_per_prompt=4, max_tokens=6, **rollout)
    return config


@pytest.mark.parametrize("what", [RolloutCollector, Evaluator])
@pytest.mark.parametrize(("verifier", "detail"), BROKEN.items())
def test_a_verifier_that_verifies_nothing_stops_the_run(
    verifier, detail, what, layout, small_model: Path, problems: Path, capsys
) -> None:
    tokenization = Tokenization(small_model, 2**20)
    built = what(
        _config(small_model, problems), layout, ScriptedEngine(streaming=False), tokenization, VerifierPool(verifier)
    )
    with pytest.raises(UserError) as error:
        built.collect(0) if what is RolloutCollector else built.evaluate()
    assert f":{verifier.__name__} failed for all " in str(error.value) and detail in str(error.value)
    assert "\n" not in str(error.value)
    assert ("line" in capsys.readouterr().err) == (verifier is divides_by_zero)


def test_a_verifier_that_has_verified_something_does_not_stop_the_run(layout, small_model, problems, capsys) -> None:
    fails = False

    def verifier(completion, answer):
        return 1 / 0 if fails else repeats_the_right_token(completion, answer)

    tokenization = Tokenization(small_model, 2**20)
    pool = VerifierPool(verifier)
    collector = RolloutCollector(
        _config(small_model, problems), layout, ScriptedEngine(streaming=False), tokenization, pool
    )
    collector.collect(0)
    fails = True
    for step in (1, 2):
        assert collector.collect(step)[1].metrics == {"verifier/failed_fraction": 1.0}
    assert capsys.readouterr().err.count("warning: the verifier failed for 100% of the completions of step 1") == 1


def test_the_alarm_warns_again_after_a_recovery(capsys) -> None:
    alarm, silent = VerifierAlarm(True), VerifierAlarm(False)
    for step, fraction in enumerate([0.0, 0.5, 0.9, 0.1, 0.6]):
        alarm.observe(step, fraction)
        silent.observe(step, fraction)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" of step ")[2][:1] for line in lines] == ["1", "4"]
