"""Kills the servers of a run at random: ``python tests/integration/sglang/kill_at_random.py FOLDER [--kills 20]``.

Checks that the run finishes by itself and that every prompt of every step is answered once, with the weights of that
step. Not part of the test suite, because a server takes half a minute to restart on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[3]


def servers_of(trainer: int) -> list[psutil.Process]:
    """Return the first process of every server that listens.

    Servers that do not listen yet are excluded, because a server that fails to start three times ends the run.
    """
    listening = []
    for process in psutil.Process(trainer).children(recursive=True):
        try:
            words = process.cmdline()
            if not any(word.endswith("launch_with_key.py") for word in words):
                continue
            with socket.create_connection(("127.0.0.1", int(words[words.index("--port") + 1])), timeout=1.0):
                listening.append(process)
        except (psutil.Error, OSError):
            continue
    return listening


def check_rollouts(run: Path, steps: int, prompts: int, samples: int) -> int:
    """Check the recorded rollouts of a run; returns the number of completions."""
    count = 0
    for step in range(steps):
        files = sorted((run / "rollouts" / f"step_{step:06d}").glob("*.jsonl"))
        assert [f.name for f in files] == [f"prompt_{slot:05d}.jsonl" for slot in range(prompts)], step
        for file in files:
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            assert len(rows) == samples and {row["weight_version"] for row in rows} == {step}, file
            count += len(rows)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path, default=ROOT / "examples" / "quickstart" / "quickstart.yaml")
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-sglang" / "bin" / "python")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pause", type=float, default=12.0, help="longest time between two kills, in seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds")
    options = parser.parse_args()
    run = options.folder / "run"
    settings = [f"run_directory={run}", f"steps={options.steps}", "data.heldout=null", "rollout.record=true"]
    settings += [f"rollout.prompts_per_step={options.prompts}", f"rollout.samples_per_prompt={options.samples}"]
    settings += ["rollout.engine=sglang", "rollout.sglang.servers=2", f"rollout.sglang.python={options.python}"]
    settings += ["rollout.sglang.server.max_total_tokens=16384", "rollout.sglang.attempts=100", "checkpoint.every=0"]
    settings += ["algorithm.epochs=1", "algorithm.minibatches=2", "telemetry.plots=false", "threads=1"]
    options.folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(options.seed)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with (options.folder / "output").open("wb") as output:
        command = [sys.executable, "-m", "megatron_rlvr.train", str(options.config), *settings]
        trainer = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=output, stderr=output)
    began, kills, metrics = time.monotonic(), 0, run / "metrics.jsonl"
    try:
        while trainer.poll() is None and time.monotonic() - began < options.limit:
            time.sleep(rng.uniform(0.2, options.pause))
            alive = [] if not metrics.is_file() or trainer.poll() is not None else servers_of(trainer.pid)
            if alive and kills < options.kills:
                victim = rng.choice(alive)
                victim.kill()
                kills += 1
                step = metrics.read_text().count("\n")
                print(
                    f"{time.monotonic() - began:6.1f} s: kill {kills}, of server process {victim.pid}, in step {step}"
                )
        status = trainer.wait(timeout=5)
    finally:
        trainer.kill()
        trainer.wait()
    count = check_rollouts(run, options.steps, options.prompts, options.samples)
    starts = sum(f.read_text().count("fired up and ready") for f in (run / "sglang" / "logs").glob("*.log"))
    print(f"status {status} after {time.monotonic() - began:.0f} s, {kills} kills, {starts} starts of servers")
    print(f"{count} completions, each prompt of each step answered once by its step's weights")
    sys.exit(status if status or kills == options.kills else 1)


if __name__ == "__main__":
    main()
