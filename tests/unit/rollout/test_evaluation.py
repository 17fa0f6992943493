"""Evaluation on held-out prompts."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine, repeats_the_right_token

from megatron_rlvr.config import Config
from megatron_rlvr.data.config import DataConfig
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.config import ModelConfig
from megatron_rlvr.rollout.config import EvaluationConfig
from megatron_rlvr.rollout.engines.base import RolloutError
from megatron_rlvr.rollout.evaluation import Evaluator, distinct_solutions, pass_at_k
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.verifiers import Verdict, Verifier, VerifierPool


@pytest.fixture
def evaluator(layout, small_model: Path, problems: Path):
    def build(engine: ScriptedEngine, verifier: Verifier = repeats_the_right_token) -> Evaluator:
        config = Config(model=ModelConfig(path=str(small_model)))
        config.data = DataConfig(train="unused", heldout=str(problems))
        config.evaluation = EvaluationConfig(prompts=8, samples=4)
        return Evaluator(config, layout, engine, Tokenization(small_model, 2**20), VerifierPool(verifier))

    return build


@pytest.mark.parametrize("streaming", [False, True], ids=["batch", "streaming"])
def test_scores(evaluator, streaming: bool) -> None:
    engine = ScriptedEngine(streaming)
    one = evaluator(engine)
    # Half of every group is right, except that prompts with a dull first token are never solved.
    first_tokens = [prompt[0] for prompt in one.prompts.token_ids]
    engine.dull = first_tokens[:1]
    solvable = sum(token not in engine.dull for token in first_tokens) / 8
    assert 0 < solvable < 1
    assert one.evaluate() == pytest.approx(
        {
            "pass@1": solvable / 2,
            "pass@2": solvable * pass_at_k(4, 2, 2),
            "pass@4": solvable,
            "distinct_solutions": 2 * solvable,  # RIGHT twice and RIGHT four times
            "reward": solvable / 2,
            "response_tokens": 2.5,
        }
    )
    assert engine.asked == [8]


def test_a_lost_engine_skips_the_evaluation(evaluator, capsys: pytest.CaptureFixture[str]) -> None:
    engine = ScriptedEngine(True)
    engine.lost = True
    assert evaluator(engine).evaluate() == {}
    assert capsys.readouterr().err == "warning: no evaluation: gone\n"


def test_a_verifier_that_refuses_the_data_ends_the_run(evaluator) -> None:
    def refuse(completion: str, answer: Any) -> float:
        raise UserError("the answer must be a number")

    with pytest.raises(RolloutError, match="the answer must be a number"):
        evaluator(ScriptedEngine(False), refuse).evaluate()


def test_pass_at_k_equals_the_mean_over_all_subsets() -> None:
    for solved in range(6):
        outcomes = [True] * solved + [False] * (5 - solved)
        for k in range(1, 6):
            subsets = list(combinations(outcomes, k))
            assert pass_at_k(5, solved, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_distinct_solutions_are_right_and_compared_by_the_verifiers_answer() -> None:
    texts = [" Bear.", "bear", "Bison", "cat", " Bison "]
    with_answers = [Verdict(1.0, "ok", answer) for answer in ("bear", "bear", "bison")] + [Verdict(0.0, "ok", "cat")]
    assert distinct_solutions(texts[:4], with_answers) == 2
    assert distinct_solutions(texts, [*with_answers, Verdict(0.4, "ok", "bat")]) == 2
    # Without answers, the texts are compared as they are, but for the space around them.
    assert distinct_solutions(texts, [Verdict(1.0, "ok")] * 5) == 4
    assert distinct_solutions(texts, [Verdict(0.0, "timeout", "no verdict within 1 s")] * 5) == 0
