"""Problems of reasoning-gym and their verifier: on a stand-in, and on the package where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.config import load_config, resolve, warnings_of
from megatron_rlvr.data import gym_problems
from megatron_rlvr.data.config import ReasoningGymConfig
from megatron_rlvr.data.gym_problems import load_gym_examples
from megatron_rlvr.errors import UserError
from megatron_rlvr.run_inputs import fingerprints
from megatron_rlvr.verifiers import VerifierPool, build_verifier, check_answers, reasoning_gym

REAL = importlib.util.find_spec("reasoning_gym") is not None
STAND_IN = Path(__file__).with_name("stand_in")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in in front of the path of this process and of those that it starts."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    monkeypatch.setenv("PYTHONPATH", f"{STAND_IN}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
        monkeypatch.delitem(sys.modules, name)
    gym_problems._generate.cache_clear()
    reasoning_gym._task.cache_clear()
    yield
    gym_problems._generate.cache_clear()
    reasoning_gym._task.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "reasoning_gym"]:
        del sys.modules[name]


def questions(path: str, settings: dict[str, Any], **arguments: Any) -> list[str]:
    examples = load_gym_examples(path, ReasoningGymConfig(chat=False, system_prompt=None, **settings), **arguments)
    return [example.prompt for example in examples]


@pytest.mark.usefixtures("stand_in")
def test_heldout_problems_are_no_training_problems() -> None:
    """Of 4 x 4 sums, 12 problems are drawn for training with repetitions; whatever is left may be held out."""
    settings = {"size": 12, "seed": 5, "options": {"sum": {"largest": 4}}}
    training = questions("reasoning_gym:sum", settings)
    held_out = questions("reasoning_gym:sum", settings, heldout=6)
    assert len(training) == 12 and 0 < len(held_out) <= 6
    assert len(set(held_out)) == len(held_out) and not set(held_out) & set(training)
    assert questions("reasoning_gym:sum", settings | {"seed": 6})[:11] == training[1:]
    with pytest.raises(UserError, match=r"all of its problems are among the 12 training problems"):
        questions("reasoning_gym:sum", settings | {"options": {"sum": {"largest": 1}}}, heldout=6)


@pytest.mark.usefixtures("stand_in")
def test_problems_do_not_depend_on_the_hashes_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for hashes in ("1", "2"):
        monkeypatch.setenv("PYTHONHASHSEED", hashes)
        drawn.append(questions("reasoning_gym:words", {"size": 2}))
        gym_problems._generate.cache_clear()
    assert drawn[0] == drawn[1]


@pytest.mark.usefixtures("stand_in")
def test_examples_have_the_system_prompt_and_the_entry() -> None:
    [first, *_] = load_gym_examples("reasoning_gym:sum", ReasoningGymConfig(size=3), stratify_key="metadata.size")
    question = first.answer["question"]
    assert [message["role"] for message in first.prompt] == ["system", "user"]
    assert "<answer>" in first.prompt[0]["content"] and first.prompt[1]["content"] == question
    assert first.source == "sum" and first.stratum == first.answer["metadata"]["numbers"][0]
    plain = load_gym_examples("reasoning_gym:sum", ReasoningGymConfig(size=3, chat=False))[0].prompt
    assert plain == f"{first.prompt[0]['content']}\n\n{question}\n"


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("summ", {}, "no such task; close ones: sum"),
        ("composite", {}, "write data.train as a list of tasks with weights"),
        ("sum", {"options": {"sum": {"digits": 3}}}, "no option 'digits'; it has largest, tolerance$"),
        ("sum", {"options": {"sum": {"size": 3}}}, "no option 'size'"),
        (
            "sum",
            {"options": {"sum": {"largest": 0}}},
            "largest must be positive.: change data.reasoning_gym.options.sum",
        ),
        ("slow", {"timeout_seconds": 0.5}, "not generated within data.reasoning_gym.timeout_seconds=0.5"),
    ],
)
def test_what_cannot_be_generated(path: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^reasoning_gym:{path}: .*{message}"):
        questions(f"reasoning_gym:{path}", settings)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package reasoning-gym: pip install"):
        questions("reasoning_gym:nothing", {"size": 1})


@pytest.mark.usefixtures("stand_in")
def test_the_task_scores_the_tagged_answer() -> None:
    options = {"sum": {"tolerance": 1}}
    [example] = load_gym_examples("reasoning_gym:sum", ReasoningGymConfig(size=1, options=options))
    total = int(example.answer["answer"])
    completions = [f"<answer>1</answer> no, <answer> {total} </answer>", f"<answer>{total + 1}</answer>"]
    completions += [f"<answer>{total + 2}</answer>", str(total), "<answer>many</answer>"]
    verifier = build_verifier("reasoning_gym")
    check_answers(verifier, [example.answer])
    with VerifierPool(verifier, workers=1) as pool:  # entries reach a worker unchanged, with their tuples
        verdicts = pool.verify(completions, [example.answer] * 5)
    assert [verdict.reward for verdict in verdicts] == [1.0, 1.0, 0.01, 0.0, 0.0]
    assert verdicts[-1].status == "error"
    assert build_verifier("reasoning_gym", answer_tag=None)(f" {total}\n", example.answer) == 1.0


@pytest.mark.usefixtures("stand_in")
def test_other_answers_have_another_verifier() -> None:
    assert build_verifier("reasoning_gym")(r"\boxed{4}", "4") == 1.0
    assert build_verifier("reasoning_gym", others="exact")("four", "four") == 1.0
    with pytest.raises(UserError, match="example 0"):
        check_answers(build_verifier("reasoning_gym", others="exact"), [{"answer": 4}])


def test_the_verifier_follows_from_the_data(run_yaml: Path) -> None:
    def chosen(*overrides: str) -> tuple[str, int | None]:
        verifier = resolve(load_config(run_yaml, ["verifier.name=auto", "verifier.workers=null", *overrides]), False)
        return verifier.verifier.name, verifier.verifier.workers

    assert chosen() == ("math", 4)
    assert chosen("data.train=reasoning_gym:sum") == ("reasoning_gym", 4)
    assert chosen("data.train=[a.jsonl, reasoning_gym:sum]") == ("reasoning_gym", 4)
    assert chosen("data.train=reasoning_gym:sum", "verifier.name=exact") == ("exact", 0)


def test_options_of_a_task_that_is_no_source_are_announced(run_yaml: Path) -> None:
    overrides = [
        "data.train=reasoning_gym:sum",
        *(f"data.reasoning_gym.options.{name}.largest=3" for name in ("sum", "summ")),
    ]
    [warning] = [line for line in warnings_of(load_config(run_yaml, overrides)) if "reasoning_gym" in line]
    assert warning == "data.reasoning_gym.options.summ has no effect: data has no source reasoning_gym:summ"


@pytest.mark.usefixtures("stand_in")
def test_generated_problems_have_a_fingerprint(run_yaml: Path) -> None:
    key = "data.train (sum: reasoning_gym:sum)"
    settings = ["data.train=[reasoning_gym:sum]", "data.reasoning_gym.size=4"]
    before = fingerprints(load_config(run_yaml, settings))[key]
    assert fingerprints(load_config(run_yaml, settings))[key] == before
    assert fingerprints(load_config(run_yaml, [*settings, "data.reasoning_gym.seed=9"]))[key] != before


@pytest.mark.skipif(not REAL, reason="reasoning-gym is not installed")
@pytest.mark.parametrize(
    "task", ["leg_counting", "arc_1d", "rearc", "isomorphic_strings", "time_intervals", "n_queens"]
)
def test_tasks_of_the_package_score_their_own_answers(task: str) -> None:
    examples = load_gym_examples(f"reasoning_gym:{task}", ReasoningGymConfig(size=8))
    verifier = build_verifier("reasoning_gym")
    with VerifierPool(verifier, workers=1) as pool:
        answers = [example.answer for example in examples]
        right = pool.verify([f"so <answer>{answer['answer']}</answer>" for answer in answers], answers)
        wrong = pool.verify(["<answer>?</answer>"] * len(answers), answers)
    assert [verdict.reward for verdict in right] == [1.0] * 8
    assert max(verdict.reward for verdict in wrong) < 0.5
    held_out = load_gym_examples(f"reasoning_gym:{task}", ReasoningGymConfig(size=8), heldout=4)
    asked = {example.answer["question"] for example in examples}
    assert len(held_out) == 4 and not asked & {example.answer["question"] for example in held_out}
