"""What a dry run shows: ``python -m megatron_rlvr.cluster.dry_run OPTIONS -- COMMAND``.

Checks the configuration that COMMAND, Python's arguments on every rank, would read, and prints one line per node, or
one per rank. It also runs on a login node whose Python lacks the project's packages. There the configuration is not
checked, and the last line says so.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rlvr.cluster.rank_supervisor import rank_command
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, EXIT_USER_ERROR


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
    if command and command[0] == "tools/evaluate.py" and Path(command[1], "config.yaml").is_file():
        words = [word for word in command[2:] if "=" in word and not word.startswith("--")]
        return [f"{command[1]}/config.yaml", *words, f"run_directory={command[1]}"]
    return None


def check_configuration(words: Sequence[str], training_ranks: int | None = None) -> str:
    """Read the configuration as training does, and return a line about it.

    Args:
        words: the file and the overrides.
        training_ranks: ranks that would train, whose layout and batch are checked; None if none train.

    Raises:
        UserError: if training would refuse it.
    """
    if sys.version_info < (3, 11):  # noqa: UP036, the Python of a login node
        return f"{words[0]} was not checked: {sys.executable} is older than Python 3.11"
    try:
        from megatron_rlvr.config import load_config
        from megatron_rlvr.rollout.requirements import check_job
    except ImportError as error:
        return f"{words[0]} was not checked: {sys.executable} has no {error.name}"
    config = load_config(words[0], words[1:])
    if training_ranks is not None:
        check_job(config, training_ranks)
    return f"{words[0]} and the overrides are valid"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 if the configuration is not valid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", required=True, help="names of the training nodes, comma-separated")
    parser.add_argument("--processes-per-node", type=int, required=True)
    parser.add_argument("--detail", default="1", help="ranks: a line per rank; otherwise a line per node")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and Python's arguments")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    words = configuration_of(command)
    nodes = options.nodes.split(",")
    trains = command[:2] == ["-m", "megatron_rlvr.train"]
    ranks = len(nodes) * options.processes_per_node if trains else None
    try:
        summary = check_configuration(words, ranks) if words else ""
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print_commands(nodes, options.processes_per_node, command, options.detail == "ranks")
    if summary:
        print(summary)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
