"""The page about a task of one's own: its commands are run as they stand there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from megatron_rlvr.config import load_config
from tests.processes import DEADLINE_SECONDS, ROOT, environment

PAGE = ROOT / "docs" / "your_task.md"


def blocks() -> list[tuple[str, str]]:
    """The blocks of code of the page in its order: language and text."""
    return re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


def script() -> str:
    """All commands of the page in its order, as one program of bash."""
    assert {language for language, _ in blocks()} == {"bash", "python", "yaml"}
    commands = [
        text if kind == "bash" else f"python - <<'EOF_PYTHON'\n{text}EOF_PYTHON\n"
        for kind, text in blocks()
        if kind != "yaml"
    ]
    return "\n".join(commands).replace("source .venv/bin/activate\n", "")


def test_the_page_s_configurations_are_valid(tmp_path: Path) -> None:
    for number, text in enumerate(text for kind, text in blocks() if kind == "yaml"):
        (tmp_path / "part.yaml").write_text(f"run_directory: runs/{number}\nmodel: {{path: model}}\n{text}")
        load_config(tmp_path / "part.yaml")


def test_every_command_of_the_page_works(tmp_path: Path) -> None:
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    variables = environment() | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", script()],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "step 5: 128 samples" in done.stdout and "evaluation 8: " in done.stdout
    evaluations = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"step": 4')]
    assert ["pass@16" in scores for scores in evaluations] == [False, True]

    # The evaluation of step 4 is that of the run, and the model has learned something by then.
    run = tmp_path / "runs" / "my_task"
    during = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert {scores["step"]: scores for scores in during}[4] == evaluations[0]
    rewards = [json.loads(line)["reward"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rewards) == 10 and sum(rewards[-4:]) > 1.5 * sum(rewards[:4])
    back = [json.loads(line) for line in (tmp_path / "runs" / "my_task_2" / "metrics.jsonl").read_text().splitlines()]
    assert [record["lr"] for record in back] == [0.01] * 4 + [0.002] * 2
    assert not (tmp_path / "runs" / "my_task_2" / "samples" / "step_000006.jsonl").exists()
    history = [json.loads(line) for line in (run / "config_history.jsonl").read_text().splitlines()]
    assert ("optimizer.learning_rate", 0.01, 0.003) in [(r["key"], r["old"], r["new"]) for r in history]
