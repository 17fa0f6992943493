"""Interrupt the two-node quickstart job at random moments, and compare every run with an uninterrupted one.

    make slurm-soak ARGS="[--interruptions 10] [--seed 0] [--only 1-5]"

Starts a virtual cluster, which needs root and Debian's Slurm. The job trains on two nodes and generates on a server on
a third, the tests' deterministic stand-in for SGLang. Every job is interrupted once at a random moment, one in four
before training begins. It must end as COMPLETED with the metrics of the uninterrupted job, bit for bit, and leave no
process behind. The exit status is 1 if any job does not.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.slurm.cluster import Cluster, virtual_cluster, why_not
from tests.integration.slurm.conftest import NODES, set_job_environment
from tests.integration.slurm.jobs import Job, Settings, with_stand_in_servers
from tests.processes import ROOT
from tests.small_model import make_small_model, write_problems

STEPS = 16
SCRIPT = ROOT / "examples" / "slurm" / "quickstart-cpu.sbatch"


def interruptions(job: Job, rng: random.Random) -> dict[str, Callable[[], None]]:
    """Return the interruptions of a running job by name."""
    trainers = job.nodes()[:2]
    return {
        "USR1 before the time limit": job.signal_before_the_limit,
        "requeued by Slurm": job.requeue,
        "kill -9 of a rank": lambda: job.kill_rank(rng.choice(trainers)),
        "kill -9 of a server": job.kill_server,
        "kill -9 of the batch script": job.kill_batch_script,
        "kill -9 of a launcher": lambda: job.kill_launcher(rng.choice(trainers)),
        "a training node lost": lambda: job.lose_node(rng.choice(trainers)),
        "the server node lost": lambda: job.lose_node(job.nodes()[2]),
    }


def interrupt(cluster: Cluster, job: Job, kind: str, rng: random.Random) -> None:
    """Submit a job and interrupt it at a random moment between its beginning and its last steps."""
    job.submit(f"steps={STEPS}", options=["--nodes=3"], RLVR_SERVERS="nodes:1")
    steps = rng.randrange(1, STEPS - 4)
    if rng.random() < 0.25:
        cluster.wait_for_output(job.id, "try 1 from")
        time.sleep(1 + 15 * rng.random())
    else:
        job.wait_for_steps(steps)
        time.sleep(rng.random() / 2)
    print(f"    at {'the beginning' if 'step ' not in cluster.output(job.id) else f'step {steps}'}: {kind}", flush=True)
    interruptions(job, rng)[kind]()
    state = job.finish()
    assert state == "COMPLETED", f"{state}\n{job.history()}\n{cluster.output(job.id)[-3000:]}"


def soak(cluster: Cluster, root: Path, count: int, seed: int, only: range) -> int:
    """Run the interruptions whose numbers are in `only`; returns how many jobs did not survive."""
    model = make_small_model(root / "model")
    settings = Settings(model, write_problems(root / "train.jsonl"))

    def job(name: str) -> Job:
        return with_stand_in_servers(Job(cluster, SCRIPT, root / name, settings.overrides()))

    rng = random.Random(seed)
    began = time.monotonic()
    whole = job("uninterrupted").submit(f"steps={STEPS}", options=["--nodes=3"], RLVR_SERVERS="nodes:1")
    assert whole.finish() == "COMPLETED", cluster.output(whole.id)
    expected = whole.metrics()
    print(f"uninterrupted: {len(expected)} steps in {time.monotonic() - began:.0f} s", flush=True)
    names = list(interruptions(whole, rng)) if whole.nodes() else []
    # Every interruption once, then random ones, in random order.
    chosen = [names[i] if i < len(names) else rng.choice(names) for i in range(count)]
    rng.shuffle(chosen)
    failed = done = 0
    for number, kind in enumerate(chosen):
        if number + 1 not in only:
            continue
        done += 1
        one, began = job(f"interrupted_{number}"), time.monotonic()
        try:
            interrupt(cluster, one, kind, random.Random(seed * 1000 + number))
            equal = one.metrics() == expected
            verdict = "equal" if equal else "DIFFERENT"
        except (AssertionError, TimeoutError) as error:
            equal, verdict = False, f"FAILED: {error}"
        cluster.restore()
        failed += not equal
        attempts = one.history().count(": try ")
        seconds = time.monotonic() - began
        print(f"{number + 1:2d}  {kind:28}  {attempts} attempts  {seconds:4.0f} s  {verdict}", flush=True)
    print(f"{done - failed} of {done} interruptions survived, no process left behind", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interruptions", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="FIRST-LAST", help="run only the interruptions with these numbers")
    options = parser.parse_args()
    first, last = map(int, options.only.split("-")) if options.only else (1, options.interruptions)
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="slurm-soak-") as folder:
        set_job_environment(patch)
        with virtual_cluster(Path(folder) / "cluster", NODES) as cluster:
            failed = soak(cluster, Path(folder), options.interruptions, options.seed, range(first, last + 1))
            return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
