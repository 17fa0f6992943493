import io
import json
from pathlib import Path

import benchmark_step
import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parents[3]


def test_prompts_have_the_same_number_of_tokens_in_both_trainers(tmp_path):
    from transformers import AutoTokenizer

    parameters = benchmark_step.make_model(tmp_path / "model", seed=0)
    assert 0.66e6 < parameters < 0.68e6
    benchmark_step.make_data(tmp_path / "train.jsonl", 50, seed=0)
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")  # as both trainers load it
    assert {len(ids) for ids in tokenizer(prompts)["input_ids"]} == {benchmark_step.PROMPT_TOKENS}
    assert max(tokenizer.get_vocab().values()) < json.loads((tmp_path / "model/config.json").read_text())["vocab_size"]
    assert len(set(prompts)) == 50


def test_report_has_medians_and_ranges():
    def step(seconds: float, generation: float) -> benchmark_step.Step:
        parts = dict.fromkeys(benchmark_step.PARTS, 0.1) | {"generation": generation}
        return benchmark_step.Step(seconds, 1000, parts)

    assert step(1.0, 0.5).outside == pytest.approx(0.2)
    out = Console(file=io.StringIO(), width=160)
    measured = {
        "TRL": [step(s, 1.0) for s in (2.0, 3.0, 9.0)],
        "megatron_rlvr": [step(s, 0.5) for s in (1.0, 1.5, 5.0)],
    }
    benchmark_step.report(measured, out)
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:5] for line in out.file.getvalue().splitlines() if "│" in line
    }
    assert [cell.strip() for cell in rows["seconds per step"]] == [
        "3.000 [2.000, 9.000]",
        "1.500 [1.000, 5.000]",
        "2.00",
    ]
    assert [c.strip() for c in rows["generated tokens per second"]] == [
        "1,000 [1,000, 1,000]",
        "2,000 [2,000, 2,000]",
        "0.50",
    ]


@pytest.mark.parametrize(
    "arguments, message", [(["--updates", "7"], "does not divide"), (["--trl-python", "/no/python"], "no interpreter")]
)
def test_user_errors_are_one_line_and_exit_status_2(arguments, message, capsys):
    assert benchmark_step.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
