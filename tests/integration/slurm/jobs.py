"""Jobs of the tests: what they train, and what is done to them while they run."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_rlvr.telemetry.metrics import Record, deterministic, read_metrics
from tests.integration.slurm.cluster import Cluster


@dataclass
class Settings:
    """A run whose steps take a fraction of a second."""

    model: Path
    problems: Path

    def overrides(self) -> list[str]:
        return [
            f"model.path={self.model}",
            f"data.train={self.problems}",
            "data.heldout=null",
            "data.max_prompt_tokens=32",
            "verifier.name=tests.rewards:letter_sum",
            "verifier.workers=0",
            "threads=1",
            "rollout.prompts_per_step=8",
            "rollout.samples_per_prompt=4",
            "rollout.max_tokens=10",
            "algorithm.minibatches=2",
            "algorithm.epochs=2",
            "checkpoint.every=1",
            "checkpoint.export_huggingface=false",
            "telemetry.tensorboard=false",
            "telemetry.plots=false",
        ]


@dataclass
class Job:
    """One job script and its run directory, from submission to the end of all its processes."""

    cluster: Cluster
    script: Path
    run: Path
    overrides: Sequence[str]
    id: str = ""
    variables: dict[str, str] = field(default_factory=dict)

    def submit(self, *arguments: object, options: Sequence[str] = (), **variables: str) -> Job:
        everything = [*self.overrides, f"run_directory={self.run}", *arguments]
        self.id = self.cluster.submit(self.script, *everything, options=options, **self.variables, **variables)
        return self

    def wait_for_steps(self, steps: int, timeout: float = 300) -> None:
        """Wait until the job's attempts have told of so many steps in all."""
        self.cluster.wait_for_output(self.id, r"(?m)^step +\d+/", steps, timeout)

    def wait_for_steps_after_resuming(self, steps: int, timeout: float = 300) -> None:
        """Wait until an attempt has gone on from a checkpoint, and told of so many steps since."""
        self.cluster.wait_for_output(self.id, rf"(?ms)try \d from step_\d+ on n(.*?^step +\d+/){{{steps}}}", 1, timeout)

    def finish(self, timeout: float = 500) -> str:
        """Wait for the end of the job and of its processes; its state."""
        state = self.cluster.finished(self.id, timeout)["JobState"]
        assert not (left := self.cluster.orphans(self.id)), left
        return state

    def nodes(self) -> list[str]:
        """The nodes that it runs on now, the head first."""
        listed = self.cluster.job(self.id)["NodeList"]
        return self.cluster.run("scontrol", "show", "hostnames", listed).split()

    def history(self) -> str:
        file = self.run / "slurm" / "history"
        return file.read_text() if file.is_file() else ""

    def metrics(self) -> list[Record]:
        """The run's records without what depends on the machine's speed."""
        return [deterministic(record) for record in read_metrics(self.run)]

    # What can happen to a job -----------------------------------------------------------------------------------------

    def signal_before_the_limit(self) -> None:
        """What --signal=B:USR1@... does."""
        self.cluster.run("scancel", "--batch", "--signal=USR1", self.id)

    def requeue(self) -> None:
        """What preemption does."""
        self.cluster.run("scontrol", "requeue", self.id)

    def kill_rank(self, node: str = "") -> None:
        self._kill(r"^\S*python\S* -u -m megatron_rlvr\.train ", node)

    def kill_launcher(self, node: str = "") -> None:
        self._kill(r"^\S*python\S* -m megatron_rlvr\.cluster\.torchrun ", node)

    def kill_server(self, node: str = "") -> None:
        self._kill(r"^\S*python\S* -m sglang\.launch_server ", node)

    def kill_batch_script(self) -> None:
        self._kill("slurm_script", "")

    def lose_node(self, node: str) -> None:
        """The power of a node fails."""
        self.cluster.power_off(node, self.id)

    def _kill(self, pattern: str, node: str) -> None:
        wait_until(lambda: bool(self.cluster.processes(self.id, pattern, node)), f"a process that matches {pattern!r}")
        found = self.cluster.processes(self.id, pattern, node)
        os.kill(random.Random(len(found)).choice(found), signal.SIGKILL)


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 300) -> None:
    """Wait for something, by name."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(0.05)


def with_stand_in_servers(job: Job) -> Job:
    """The job with the tests' deterministic stand-in for SGLang as its engine."""
    stand_in = Path(__file__).with_name("stand_in")
    servers = [
        f"rollout.sglang.python={sys.executable}",
        f"rollout.sglang.environment.PYTHONPATH={stand_in}",
        "rollout.sglang.weight_sync=disk",
        "rollout.sglang.start_timeout_seconds=600",
    ]
    return replace(job, overrides=[*job.overrides, *servers])
