"""docs/metrics.md lists every metric that a run records, and only metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.processes import ROOT, run_trainers
from tests.small_model import make_small_model

SETTINGS = {
    "target-entropy": [
        "algorithm.schedule.name=target-entropy",
        "algorithm.objective.entropy_coefficient=0.01",
        "rollout.dynamic_sampling=true",
        "rollout.overlong_buffer=4",
    ],
    "oscillatory-decay": [
        "algorithm.schedule.name=oscillatory-decay",
        "rollout.top_p=0.9",
        "algorithm.kl_coefficient=0.1",
    ],
    "routing-replay": [
        "rollout.routing_replay=true",
        "rollout.routing_replay_compare_every=2",
        "algorithm.objective.importance=icepop",
    ],
}
# Recorded by features that need SGLang servers, and by the schedules entrocraft and entropic.
NOT_RECORDED_HERE = {
    "staleness/mean",
    "staleness/interrupted_fraction",
    "weight_sync/bytes",
    "weight_sync/changed_fraction",
    "weight_sync/full",
    "weight_sync/http_bytes",
    "control/positive_weight",
    "control/negative_weight",
}
OF_STALE_TOKENS = {f"mismatch/age_A/{name}" for name in ("mean", "kl", "masked_fraction", "truncated_fraction")}


def listed(heading: str) -> list[str]:
    """The names in the first column of the tables under a heading of the page."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    _, _, section = page.partition(f"\n## {heading}")
    return re.findall(r"^\| `([^`]+)` \|", section.partition("\n## ")[0], flags=re.MULTILINE)


def records(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def runs(run_yaml: Path, problems: Path, tmp_path: Path) -> list[Path]:
    """Short runs with all features that record additional metrics and need no servers."""
    directories = [tmp_path / name for name in SETTINGS]
    two_sources = f"data.train=[{{path: {problems}, name: a}}, {{path: {problems}, name: b}}]"
    mixture = f"model.path={make_small_model(tmp_path / 'mixture', mixture=True)}"
    settings = {
        **SETTINGS,
        "oscillatory-decay": [*SETTINGS["oscillatory-decay"], two_sources],
        "routing-replay": [*SETTINGS["routing-replay"], mixture],
    }
    run_trainers(
        [[run_yaml, "steps=3", f"run_directory={directory}", *settings[directory.name]] for directory in directories]
    )
    return directories


def test_page_lists_the_metrics_that_runs_record(runs: list[Path]) -> None:
    names = listed("Steps: ")
    assert len(names) == len(set(names))
    recorded = {name for run in runs for record in records(run / "metrics.jsonl") for name in record}
    recorded = {re.sub(r"^source/[ab]/", "source/NAME/", name) for name in recorded}
    recorded = {re.sub(r"^mismatch/position_\d+/", "mismatch/position_P/", name) for name in recorded}
    assert sorted(recorded - set(names)) == []
    assert sorted(set(names) - recorded - NOT_RECORDED_HERE - OF_STALE_TOKENS) == []
    sources = "\n".join(file.read_text() for file in (ROOT / "megatron_rlvr").rglob("*.py"))
    assert [name for name in NOT_RECORDED_HERE if f'"{name}"' not in sources] == []

    evaluated = {name for run in runs for record in records(run / "evaluations.jsonl") for name in record}
    assert {"pass@k" if name.startswith("pass@") else name for name in evaluated} == set(listed("Evaluations: "))
