"""Samples on disk, and the tool that shows them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.errors import UserError
from megatron_rlvr.telemetry.samples import (
    changed_prompts,
    one_line,
    read_samples,
    remove_samples,
    sampled_steps,
    samples_path,
    three_of,
    write_samples,
    write_worst_tokens,
)
from tests.processes import ROOT

_spec = importlib.util.spec_from_file_location("show_samples", ROOT / "tools" / "show_samples.py")
assert _spec is not None and _spec.loader is not None
show_samples = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(show_samples)


def row(example: int, reward: float, completion: str = "", **others: Any) -> dict[str, Any]:
    text = completion or f"text {example} {reward}"
    return {
        **{"prompt": f"prompt {example}", "answer": example, "completion": text, "reward": reward, "length": 3},
        **{"entropy": 0.5, "example": example, "finish_reason": "stop", "verifier": "ok"},
        **others,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_samples(tmp_path, 4, [row(0, 1.0), row(0, 0.0), row(1, 0.5), row(1, 0.5), row(2, 0.25)])
    write_samples(tmp_path, 5, [row(0, 0.0, "fell"), row(0, 0.0), row(1, 0.5), row(1, 0.5), row(3, 1.0)])
    write_samples(tmp_path, 6, [row(1, 1.0, "rose"), row(1, 0.9)])
    write_samples(tmp_path, 0, [row(0, 1.0)], heldout=True)
    return tmp_path


def test_samples_come_back(run: Path) -> None:
    odd = row(7, -1.5, "two\nlines \u2028 \x1b[31m", prompt=[{"role": "user", "content": "ü"}], answer="\ud800")
    write_samples(run, 9, [odd])
    assert read_samples(run, 9) == [odd | {"answer": "?"}]
    assert sampled_steps(run) == [4, 5, 6, 9] and sampled_steps(run, heldout=True) == [0]
    with pytest.raises(UserError, match=r"no samples of step 7; steps with samples: 4, 5, 6, 9"):
        read_samples(run, 7)
    samples_path(run, 9).write_text('{"completion": "x", "reward": "y", "length": 1, "example": 0}\n')
    with pytest.raises(UserError, match=r"step_000009.jsonl line 1: 'reward' is str 'y'"):
        read_samples(run, 9)


def test_changed_prompts_are_compared_with_the_latest_step_that_has_them(run: Path) -> None:
    earlier = {step: read_samples(run, step) for step in (4, 5)}
    [change] = changed_prompts(read_samples(run, 6), earlier)
    assert (change.step, change.before, change.after) == (5, 0.5, pytest.approx(0.95))
    assert change.sample_after["completion"] == "rose"
    [change] = changed_prompts(earlier[5], {4: earlier[4]})
    assert (change.before, change.after, change.sample_before["reward"]) == (0.5, 0.0, 1.0)
    assert change.sample_after["completion"] == "fell"


def test_three_samples() -> None:
    rows = [row(0, reward) for reward in (0.2, 0.9, 0.4, 0.1, 0.3)]
    assert [r["reward"] for r in three_of(rows)] == [0.9, 0.3, 0.1]
    assert len(three_of(rows[:2])) == 2 and three_of([]) == []


def test_a_text_on_one_line_changes_no_terminal() -> None:
    assert one_line("a\n\tb  c\x1b[2J", 20) == "a b c\ufffd[2J" and one_line("x" * 30, 10) == "x" * 7 + "..."


@pytest.mark.parametrize(
    ("arguments", "first", "absent"),
    [
        (["--step", "4", "--worst", "-n", "1"], "text 0 0.0", "text 0 1.0"),
        (["--step", "4", "--best", "-n", "1"], "text 0 1.0", "text 0 0.0"),
        (["--best", "-n", "1"], "rose", "text 1 0.9"),
        (["--step", "5", "--changed"], "fell", "text 3"),
        (["--step", "6", "--changed", "--against", "4"], "rose", "fell"),
        (["--heldout"], "evaluation 0: 1 samples, mean reward 1.000", "step"),
    ],
)
def test_the_tool_shows_them(
    arguments: list[str], first: str, absent: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show_samples.main([str(run), *arguments]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert first in out and absent not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--step", "3"], "no samples of step 3; steps with samples: 4, 5, 6"),
        (["--step", "4", "--changed"], "no samples of an earlier step than 4"),
        (["--against", "4"], "--against needs --changed"),
        (["--count", "0"], "--count must be at least 1"),
    ],
)
def test_the_tool_refuses_in_one_line(
    arguments: list[str], said: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show_samples.main([str(run), *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_resume_removes_the_samples_that_are_made_again(run: Path) -> None:
    for step in (4, 5, 6):
        write_samples(run, step, [row(0, 1.0)], heldout=True)
        write_worst_tokens(run, step, [row(0, 1.0)])
    (run / "samples" / "notes.jsonl").write_text("of the user")
    remove_samples(run, 5)
    assert sampled_steps(run) == [4]
    assert sampled_steps(run, heldout=True)[-2:] == [4, 5]  # that of step 5 is of the policy that the run goes on with
    assert [path.name for path in (run / "mismatch").iterdir()] == ["step_000004.jsonl"]
    assert (run / "samples" / "notes.jsonl").exists()


def test_an_entropy_of_another_type_is_one_line(run: Path) -> None:
    write_samples(run, 7, [row(0, 1.0, entropy=None)])
    assert read_samples(run, 7)
    write_samples(run, 7, [row(0, 1.0, entropy="high")])
    with pytest.raises(UserError, match=r"line 1: 'entropy' is str 'high' instead of a number"):
        read_samples(run, 7)
