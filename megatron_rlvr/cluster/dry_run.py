"""What a dry run shows: ``python -m megatron_rlvr.cluster.dry_run OPTIONS -- COMMAND``.

Checks the configuration that COMMAND, Python's arguments on every rank, would read, and prints one line per node, or
one per rank. It also runs on a login node whose Python lacks the project's packages. There the configuration is not
checked, and the last line says so.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rlvr.cluster.rank_supervisor import rank_command
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, EXIT_USER_ERROR

if TYPE_CHECKING:
    from megatron_rlvr.config import Config


@dataclass(frozen=True)
class TrainingJob:
    """What a job would train with.

    Attributes:
        nodes: nodes that train.
        processes: training processes per node.
        servers: SGLang servers that the job starts: none, colocated or nodes:N.
        gpus: GPUs of a node; 0 for a job on CPUs.
    """

    nodes: int
    processes: int
    servers: str
    gpus: int


def print_commands(nodes: Sequence[str], local: int, command: Sequence[str], every_rank: bool) -> None:
    """Print the command of every rank of the job, or those of a node in one line.

    Args:
        nodes: names of the training nodes.
        local: ranks per node.
        command: Python's arguments.
        every_rank: whether every rank has a line of its own.
    """
    size, words = len(nodes) * local, shlex.join(rank_command(command))
    for rank in range(0, size, 1 if every_rank else local):
        last = rank if every_rank else rank + local - 1
        ranks = f"rank {rank}" if last == rank else f"ranks {rank} to {last}"
        own = f"RANK={rank} LOCAL_RANK={rank % local} " if every_rank else ""
        variables = f"{own}WORLD_SIZE={size} LOCAL_WORLD_SIZE={local} MASTER_ADDR={nodes[0]}"
        print(f"{ranks} on {nodes[rank // local]}: {variables} {words}")


def configuration_of(command: Sequence[str]) -> list[str] | None:
    """Return the file and the overrides that a command reads; None if it is not one of a configuration."""
    if list(command[:2]) == ["-m", "megatron_rlvr.train"]:
        return list(command[2:])
    if command and command[0] == "tools/evaluate.py":
        run = command[1].partition("/checkpoints/step_")[0]
        words = [word for word in command[2:] if "=" in word and not word.startswith("--")]
        return [f"{run}/config.yaml", *words, f"run_directory={run}"]
    return None


def check_configuration(words: Sequence[str], job: TrainingJob | None = None) -> str:
    """Read the configuration as training does, and return lines about it.

    Args:
        words: the file and the overrides.
        job: the job; None if it does not train.

    Raises:
        UserError: if training would refuse it.
    """
    if sys.version_info < (3, 11):  # noqa: UP036, the Python of a login node
        return f"{words[0]} was not checked: {sys.executable} is older than Python 3.11"
    try:
        from megatron_rlvr.config import load_config, resolve
        from megatron_rlvr.rollout.requirements import check_job
    except ImportError as error:
        return f"{words[0]} was not checked: {sys.executable} has no {error.name}"
    if job is None and not Path(words[0]).is_file():
        return f"the configuration was not checked: no {words[0]} on this machine"
    config = load_config(words[0], words[1:])
    lines = []
    if job is not None:
        check_job(resolve(config, job.gpus > 0), job.nodes * job.processes)
        if job.gpus:
            lines = [check_on_gpus(config, Path(words[0]), job)]
    return "\n".join([*lines, f"{words[0]} and the overrides are valid"])


def check_on_gpus(config: Config, file: Path, job: TrainingJob) -> str:
    """Check a configuration on nodes with GPUs, as the preflight does. Returns a line about the GPUs' memory.

    The GPUs are not known here, so a configuration that does not fit an H100 is reported and not refused. If neither
    this machine nor the folder of the configuration has the config.json of the model, its limits are not checked.

    Args:
        config: the configuration.
        file: the file that it was read from.
        job: the job.

    Raises:
        UserError: if the preflight would refuse it for another reason than memory.
    """
    from megatron_rlvr.cluster.plan_check import check_servers
    from megatron_rlvr.planning.architecture import architecture_of, model_described_by

    check_servers(config, job.servers, job.gpus)
    architecture = architecture_of(file)
    with ExitStack() as stack:
        if not (Path(config.model.path) / "config.json").is_file():
            if not architecture.is_file():
                return f"the model was not checked: model.path={config.model.path} is not on this machine"
            stack.enter_context(model_described_by(architecture, config))
        from megatron_rlvr.planning.plan import make_plan
        from megatron_rlvr.planning.report import verdict
        from megatron_rlvr.planning.servers import Servers

        plan = make_plan(config, job.nodes, job.processes, servers=Servers.of_job(config, job.servers))
        return f"on {plan.hardware.name}, by the plan (computed): {verdict(plan)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 if the configuration is not valid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", required=True, help="names of the training nodes, comma-separated")
    parser.add_argument("--processes-per-node", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of a node")
    parser.add_argument("--servers", default="none", help="SGLang servers of the job: none, colocated or nodes:N")
    parser.add_argument("--detail", default="1", help="ranks: a line per rank; otherwise a line per node")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and Python's arguments")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    words = configuration_of(command)
    nodes = options.nodes.split(",")
    job = None
    if command[:2] == ["-m", "megatron_rlvr.train"]:
        job = TrainingJob(len(nodes), options.processes_per_node, options.servers, options.gpus)
    warnings.simplefilter("ignore")
    try:
        summary = check_configuration(words, job) if words else ""
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print_commands(nodes, options.processes_per_node, command, options.detail == "ranks")
    if summary:
        print(summary)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
