"""The jobs of the tests: their settings, and the interruptions that they must survive."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_rlvr.telemetry.metrics import Record, deterministic, read_metrics
from tests.integration.slurm.cluster import Cluster, polls
from tests.processes import DEADLINE_SECONDS


@dataclass
class Settings:
    """Settings of a run whose steps take a fraction of a second."""

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
    """A job script with its run directory, from submission until all processes of the job have ended."""

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

    def wait_for_steps(self, steps: int) -> None:
        """Wait until the attempts of the job have printed `steps` steps in all."""
        self.cluster.wait_for_output(self.id, r"(?m)^step +\d+/", steps)

    def wait_for_steps_after_resuming(self, steps: int) -> None:
        """Wait until an attempt has resumed from a checkpoint and printed `steps` steps."""
        self.cluster.wait_for_output(self.id, rf"(?ms)try \d from step_\d+ on n(.*?^step +\d+/){{{steps}}}", 1)

    def finish(self) -> str:
        """Wait until the job and all its processes have ended, and return its state."""
        state = self.cluster.finished(self.id)["JobState"]
        assert not (left := self.cluster.orphans(self.id)), left
        return state

    def nodes(self) -> list[str]:
        """Return the nodes that the job runs on now, the head first."""
        listed = self.cluster.job(self.id)["NodeList"]
        return self.cluster.run("scontrol", "show", "hostnames", listed).split()

    def history(self) -> str:
        file = self.run / "slurm" / "history"
        return file.read_text() if file.is_file() else ""

    def metrics(self) -> list[Record]:
        """Return the metrics of the run without those that depend on the machine's speed."""
        return [deterministic(record) for record in read_metrics(self.run)]

    # Interruptions ----------------------------------------------------------------------------------------------------

    def signal_before_the_limit(self) -> None:
        """Send the signal that --signal=B:USR1@... sends before the time limit."""
        self.cluster.run("scancel", "--batch", "--signal=USR1", self.id)

    def requeue(self) -> None:
        """Requeue the job, as preemption does."""
        self.cluster.run("scontrol", "requeue", self.id)

    def kill_rank(self, node: str = "") -> None:
        self._kill(r"^\S*python\S* -u -m megatron_rlvr\.train ", node)

    def kill_launcher(self, node: str = "") -> None:
        self._kill(r"^\S*python\S* -m megatron_rlvr\.cluster\.torchrun ", node)

    def kill_server(self, node: str = "") -> None:
        self._kill(r"^\S*python\S* \S*/launch_with_key\.py ", node)

    def kill_batch_script(self) -> None:
        self._kill("slurm_script", "")

    def lose_node(self, node: str) -> None:
        """Cut the power of a node."""
        self.cluster.power_off(node)

    def _kill(self, pattern: str, node: str) -> None:
        wait_until(lambda: bool(self.cluster.processes(self.id, pattern, node)), f"a process that matches {pattern!r}")
        found = self.cluster.processes(self.id, pattern, node)
        os.kill(random.Random(len(found)).choice(found), signal.SIGKILL)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds; `what` describes it in the error."""
    for _ in polls(DEADLINE_SECONDS, 0.05):
        if condition():
            return
    raise TimeoutError(f"waited in vain for {what}")


def with_stand_in_servers(job: Job) -> Job:
    """Return the job with the tests' deterministic stand-in for SGLang as its engine."""
    stand_in = Path(__file__).with_name("stand_in")
    servers = [
        f"rollout.sglang.python={sys.executable}",
        f"rollout.sglang.environment.PYTHONPATH={stand_in}",
        "rollout.sglang.weight_sync=disk",
        "rollout.sglang.start_timeout_seconds=600",
    ]
    return replace(job, overrides=[*job.overrides, *servers])
