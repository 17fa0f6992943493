"""Training runs on the real SGLang."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.telemetry.metrics import read_metrics
from tests.processes import ROOT, environment, run_trainer


def _check_rollouts(run: Path, steps: int) -> None:
    """Check that every prompt of every step has four completions, generated with the weights of that step."""
    for step in range(steps):
        files = sorted((run / "rollouts" / f"step_{step:06d}").glob("*.jsonl"))
        assert [f.name for f in files] == [f"prompt_{slot:05d}.jsonl" for slot in range(8)]
        for file in files:
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            assert len(rows) == 4 and {row["weight_version"] for row in rows} == {step}


LAYOUTS = {
    "one": (1, []),
    "dp2": (2, []),
    "tp2": (2, ["parallel.tensor=2", "rollout.sglang.weight_sync=tensor"]),
    "pp2": (2, ["parallel.pipeline=2", "rollout.sglang.weight_sync=distributed"]),
    "top-p": (1, ["rollout.top_p=0.8", "rollout.temperature=0.7"]),
    # Servers get the weights that the adapters are merged into, in buckets.
    "top-k-tp2-lora": (
        2,
        ["parallel.tensor=2", "rollout.top_k=3", "lora.rank=4", "lora.alpha=16", "rollout.sglang.weight_sync=tensor"],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_three_steps(name: str, run_yaml: Path, servers, tmp_path: Path) -> None:
    processes, overrides = LAYOUTS[name]
    overrides = [*overrides, "rollout.engine=sglang", f"rollout.sglang.urls=[{servers.urls[0]}]", "steps=3"]
    with servers.without_health_checks():  # the run updates this server now
        done = run_trainer(run_yaml, *overrides, "rollout.record=true", "data.heldout=null", processes=processes)
    assert "through the disk this time" not in done.stderr
    run = tmp_path / "run"
    metrics = read_metrics(run)
    assert len(metrics) == 3 and all(r["grad_norm"] > 0 for r in metrics)
    # A step changes the weights by more than the tolerance, so the servers have those of every stage and shard.
    assert all(r["ratio_max"] > 1.001 for r in metrics)
    assert all(r["mismatch/max"] < 1e-4 for r in metrics)
    _check_rollouts(run, 3)
    rows = [json.loads(line) for file in (run / "rollouts").rglob("*.jsonl") for line in file.read_text().splitlines()]
    sizes = {len(kept) for row in rows for kept in row.get("kept", [])}
    assert sizes == {3} if "top-k" in name else bool(sizes) == (name == "top-p")
    assert (run / "huggingface" / "model.safetensors").is_file()
    assert (run / "adapter" / "adapter_model.safetensors").is_file() == ("lora" in name)


def test_rollouts_ahead_of_training(run_yaml: Path, servers, tmp_path: Path) -> None:
    """Steps overlap, surplus prompts are dropped, and no token is more than one version old."""
    settings = [
        "rollout.engine=sglang",
        f"rollout.sglang.urls=[{servers.urls[0]}]",
        "rollout.sglang.weight_sync=tensor",
    ]
    settings += ["rollout.max_staleness=1", "algorithm.objective.importance_cap=2.0", "steps=5", "rollout.record=true"]
    settings += ["rollout.dynamic_sampling=true", "rollout.over_sampling=1.5", "rollout.max_tokens=40"]
    with servers.without_health_checks():
        run_trainer(run_yaml, *settings, "data.heldout=null")
    run = tmp_path / "run"
    metrics = read_metrics(run)
    assert len(metrics) == 5 and metrics[0]["staleness/mean"] == 0
    assert max(r["staleness/mean"] for r in metrics) > 0 and all(r["staleness/mean"] <= 1 for r in metrics)
    assert all(1 <= r["sampling/generated_groups"] < 2 for r in metrics)
    for step in range(5):
        files = sorted((run / "rollouts" / f"step_{step:06d}").glob("*.jsonl"))
        assert len(files) == 8
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        spans = [row.get("version_spans", [[row["weight_version"], len(row["token_ids"])]]) for row in rows]
        assert {version for span in spans for version, _ in span} <= {max(0, step - 1), step}


def test_run_survives_the_death_of_its_only_server(run_yaml: Path, sglang: SGLangConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["rollout.engine=sglang", f"rollout.sglang.python={sglang.python}", "steps=3", "rollout.record=true"]
    settings += ["rollout.sglang.server.max_total_tokens=8192", "data.heldout=null"]
    command = [sys.executable, "-m", "megatron_rlvr.train", str(run_yaml), *settings]
    with (tmp_path / "output").open("wb") as output:
        trainer = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=output, stderr=output)
    try:
        while not ((run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text().count("\n") >= 1):
            assert trainer.poll() is None, (tmp_path / "output").read_text()[-3000:]
            time.sleep(0.02)
        family = psutil.Process(trainer.pid).children(recursive=True)
        servers = [p for p in family if any(word.endswith("launch_with_key.py") for word in p.cmdline())]
        assert servers
        servers[0].kill()
        assert trainer.wait() == 0, (tmp_path / "output").read_text()[-3000:]
    finally:
        trainer.kill()
        trainer.wait()
    assert len(read_metrics(run)) == 3
    _check_rollouts(run, 3)
    assert (run / "sglang" / "logs" / "server_0.log").read_text().count("fired up and ready") == 2
    assert not psutil.wait_procs(family, timeout=600)[1], "the trainer left processes behind"
