"""`make quickstart`: which overrides reach which run, what it shows, and a short comparison in full."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import compare
import picture
import pytest
import seeds
from rich.console import Console

from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, EXIT_STOPPED, EXIT_USER_ERROR

ROOT = Path(__file__).resolve().parents[3]
SHORT = [
    *("data.stratify_key=null", "rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_tokens=6"),
    *("algorithm.minibatches=1", "algorithm.epochs=1", "evaluation.prompts=2", "evaluation.every=0"),
    *("checkpoint.every=0", "checkpoint.export_huggingface=false", "telemetry.plots=false"),
]


@pytest.fixture
def data(tmp_path):
    """Overrides for two prompts of training and held-out data."""
    line = json.dumps({"prompt": "3 5 7 : 22 >", "answer": {"numbers": [3, 5, 7], "target": 22}})
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{line}\n" * 4)
    return [f"data.train={path}", f"data.heldout={path}"]


def test_overrides_of_the_schedule_reach_the_second_run_alone(tmp_path):
    static, drawn = compare.runs(["steps=3"], tmp_path)
    assert [run.name for run in (static, drawn)] == ["static-clipping", "drawn-curve"]
    assert static.overrides[1:] == [*compare.STEADY, "steps=3", *compare.STATIC]
    assert drawn.overrides[1:] == [*compare.STEADY, "steps=3", *compare.DRAWN]
    schedule = ["algorithm.schedule.name=increase-then-decrease", "algorithm.schedule.split=0.4"]
    static, paper = compare.runs([schedule[0], "seed=2", schedule[1]], tmp_path)
    assert (paper.name, paper.overrides[1:]) == ("increase-then-decrease", [*compare.STEADY, "seed=2", *schedule])
    assert static.overrides[1:] == [*compare.STEADY, "seed=2", *compare.STATIC]


def test_a_thread_count_of_the_user_comes_after_ours(tmp_path):
    for run in compare.runs(["threads=7"], tmp_path):
        assert [word for word in run.overrides if word.startswith("threads=")][-1] == "threads=7"


@pytest.mark.parametrize("word", ["run_directory=elsewhere", "name=mine"])
def test_names_and_directories_are_refused(word, tmp_path):
    with pytest.raises(UserError, match="choose --output DIR"):
        compare.runs([word], tmp_path)


def test_largest_error_leaves_out_the_first_tenth():
    records = [{"step": step, "entropy": 1.0, "control/target": 1.0} for step in range(20)]
    records[1]["entropy"] = 2.0
    assert picture.largest_error(records, 20) == 0.0
    records[2]["entropy"] = 0.93
    assert picture.largest_error(records, 20) == pytest.approx(0.07)
    assert picture.largest_error([{"step": 5, "entropy": 1.0}], 20) is None


def test_results_table_shows_the_base_model_and_the_end_of_both_runs():
    before = {"step": 0, "pass@1": 0.1, "pass@8": 0.5, "pass@16": 0.7}
    ends = [{"step": 8, "pass@1": 0.4, "pass@8": 0.45, "pass@16": 0.6}, {"step": 8, "pass@1": 0.3, "pass@8": 0.55}]
    table = picture.results_table(["a", "b"], [[before, ends[0]], [before, ends[1]]])
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    rows = {line.split()[1]: line.split()[3::2] for line in capture.get().splitlines() if "pass@" in line}
    assert rows == {
        "pass@1": ["0.100", "0.400", "0.300"],
        "pass@8": ["0.500", "0.450", "0.550"],
        "pass@16": ["0.700", "0.600", "-"],
    }


def write_run(directory, entropies, pass_at):
    """The records of a finished run with a constant curve at 1."""
    directory.mkdir(parents=True)
    records = [{"step": i, "entropy": value, "control/target": 1.0} for i, value in enumerate(entropies)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    evaluation = {"step": len(entropies), **dict(zip(seeds.PASS_AT, pass_at, strict=False))}
    (directory / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
    (directory / "config.yaml").write_text("name: one\nseed: 0\n")


def test_the_table_of_seeds_has_a_row_per_seed(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(compare, "main", lambda arguments: started.append(arguments) or EXIT_DONE)
    for seed, distance in ((3, 0.04), (5, -0.09)):
        write_run(tmp_path / f"seed-{seed}" / "static-clipping", [1.0] * 10, (0.5, 0.7, 0.75))
        write_run(tmp_path / f"seed-{seed}" / "drawn-curve", [2.0] + [1.0] * 8 + [1.0 + distance], (0.45, 0.75, 0.8))
    assert seeds.main(["steps=10", "--seeds", "3", "5", "--output", str(tmp_path)]) == EXIT_DONE
    assert [arguments[:2] for arguments in started] == [["steps=10", "seed=3"], ["steps=10", "seed=5"]]
    cells = "0.500 → 0.450 | 0.700 → 0.750 | 0.750 → 0.800"
    rows = (tmp_path / "seeds.md").read_text().splitlines()[2:]
    assert rows == [f"| 3 | 4.0 % | {cells} |", f"| 5 | 9.0 % | {cells} |"]
    assert rows[1] in capsys.readouterr().out
    assert seeds.main(["seed=4"]) == EXIT_USER_ERROR
    write_run(tmp_path / "seed-7" / "static-clipping", [1.0] * 10, (0.5,))
    write_run(tmp_path / "seed-7" / "drawn-curve", [1.0] * 10, (0.5,))
    assert seeds.main(["--seeds", "7", "--output", str(tmp_path)]) == EXIT_USER_ERROR
    assert "seed 7 has no pass@8: use evaluation.samples=16" in capsys.readouterr().err
    monkeypatch.setattr(compare, "main", lambda _: EXIT_STOPPED)
    assert seeds.main(["--seeds", "3", "--output", str(tmp_path)]) == EXIT_STOPPED


def test_a_short_comparison_ends_with_picture_and_table(tmp_path, data, capfd):
    output = tmp_path / "runs"
    assert compare.main([*SHORT, *data, "steps=2", "--output", str(output)]) == EXIT_DONE
    text = capfd.readouterr().out
    assert (output / "comparison.png").stat().st_size > 10_000
    assert "pass@16" in text and "of the drawn curve" in text
    for name in ("static-clipping", "drawn-curve"):
        assert [line for line in text.splitlines() if line.startswith(name)][-1].split()[2] == "2"
        config = (output / name / "config.yaml").read_text()
        assert ("name: constant" if name == "static-clipping" else "name: target-entropy") in config


def test_a_failed_run_is_named_with_its_reason(tmp_path, data, capfd):
    arguments = [
        *SHORT,
        *data,
        "steps=2",
        "algorithm.schedule.name=increase-then-decreas",
        "--output",
        str(tmp_path / "runs"),
    ]
    assert compare.main(arguments) == EXIT_USER_ERROR
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: increase-then-decreas: ") and "did you mean increase-then-decrease?" in error


def test_ctrl_c_stops_both_runs_with_a_checkpoint(tmp_path, data):
    output = tmp_path / "runs"
    command = [sys.executable, "examples/quickstart/compare.py", *SHORT, *data, "steps=100000", "--output", str(output)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    started: set[str] = set()
    for line in process.stdout:
        started.add(line.split()[0])
        if len(started) == 2:
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[0]
    assert process.returncode == EXIT_STOPPED and "the same command continues" in rest
    for name in started:
        assert (output / name / "checkpoints" / "latest").exists()
