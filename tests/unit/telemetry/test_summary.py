import io
import shlex
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_run import evaluations, records, write_run

from megatron_rlvr.config import load_config
from megatron_rlvr.telemetry.reporter import Reporter
from megatron_rlvr.telemetry.summary import print_summary, summary_table
from tests.processes import ROOT


def lines(table) -> dict[str, list[str]]:
    """The rows of a table by their first cell."""
    columns = [list(column.cells) for column in table.columns]
    return {row[0]: list(row[1:]) for row in zip(*columns, strict=True)}


def test_table_has_results_before_and_after():
    made = records()
    rows = lines(summary_table(made, evaluations()))
    assert rows["held-out pass@1"] == ["0.210", "0.430", "+0.220"]
    assert rows["held-out pass@16"] == ["0.860", "0.680", "-0.180"]
    assert list(rows)[1:4] == [
        "held-out pass@1",
        "held-out pass@8",
        "held-out pass@16",
    ]  # sorted by k, not alphabetically
    first, last = made[0]["entropy"], made[-1]["entropy"]
    assert rows["entropy (nats per token)"] == [f"{first:.3f}", f"{last:.3f}", f"{last - first:+.3f}"]
    peak = max(made, key=lambda r: r["entropy"])
    assert rows[""][:2] == [f"peak {peak['entropy']:.3f}", f"at step {peak['step']}"]
    mean = sum(r["reward"] for r in made[:5]) / 5
    assert rows["training reward, mean of 5 steps"][0] == f"{mean:.3f}"
    assert rows["tokens clipped at the lower bound"][:2] == ["mean 3.10%", "most 3.10%"]


def test_single_evaluation_is_shown_as_after():
    rows = lines(summary_table(records(), evaluations()[1:]))
    assert rows["held-out pass@1"] == ["-", "0.430", "-"]


def test_run_without_records_has_an_empty_table():
    assert lines(summary_table([], [])) == {}


def test_paths_are_printed_on_one_line(tmp_path):
    out = Console(file=io.StringIO(), width=60)
    command = "python tools/sample.py " + "long/" * 20
    print_summary(write_run(tmp_path / "run"), {"checkpoint": tmp_path, "sample from it": command}, out)
    printed = out.file.getvalue().splitlines()
    assert printed[-2:] == [f"checkpoint      {tmp_path}", f"sample from it  {command}"]


@pytest.mark.parametrize(
    "prompt", ["it's 2 + 2", "$(x) *", [{"role": "user", "content": "a"}], "two\nlines", "x" * 201, None]
)
def test_the_command_to_sample_has_a_prompt_of_the_task(
    prompt: object, run_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    report = Reporter(load_config(run_yaml), 0, active=False)
    report._prompt = prompt
    command = report._command_to_sample(Path("out"))
    if isinstance(prompt, str) and len(prompt) < 20 and prompt.isprintable():
        assert shlex.split(command["sample from it"])[2:] == ["out", prompt, "--max-tokens", "10"]
    else:
        assert not command
