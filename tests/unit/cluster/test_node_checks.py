"""What one node finds out by itself before a job trains."""

from __future__ import annotations

from pathlib import Path

from megatron_rlvr.cluster.node_checks import check_node
from megatron_rlvr.config import load_config


def test_every_node_that_trains_needs_the_reference(run_yaml: Path, small_model: Path, tmp_path: Path) -> None:
    def problems(trains: bool, *overrides: str) -> list[str]:
        return check_node("n1", load_config(run_yaml, overrides), 0, trains, tmp_path / "report").problems

    missing = f"reference.path={tmp_path / 'reference'}"
    found = problems(True, "algorithm.kl_coefficient=0.1", missing)
    assert found == [f"{tmp_path}/reference/config.json cannot be read: No such file or directory"]
    assert problems(True, "algorithm.kl_coefficient=0.1", f"reference.path={small_model}") == []
    assert problems(True, missing) == problems(False, "algorithm.kl_coefficient=0.1", missing) == []
