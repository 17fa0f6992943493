"""Python programs in processes that are forked from one that has imported the trainer, which saves seconds for each.

For tests of what processes compute. Those of how they are started use `tests.processes.launch`, which starts a new
Python, under torchrun if there are several.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from megatron_rlvr.bound_to_parent import bind_to_parent

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


def run_forked(
    program: list[str], processes: int, variables: dict[str, str], folder: Path, deadline_seconds: float
) -> subprocess.CompletedProcess[str]:
    """Run a program in some processes, which find each other as under torchrun. If one fails, the others are killed.

    Args:
        program: path of a Python file, or ``-m`` and a module; then the arguments.
        processes: number of processes. Several get the environment variables of a job, one does not.
        variables: environment variables. The first call decides those that are read when torch is imported.
        folder: working directory.
        deadline_seconds: after this time all are killed, and TimeoutError is raised with the end of what they wrote.

    Returns:
        the status of the process that failed first, or 0; negative if a signal ended it. Outputs are those of all.
    """
    with tempfile.TemporaryDirectory() as temporary:
        files = [Path(temporary) / name for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        job = {}
        if processes > 1:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            job |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        ranks = []
        # The fork server starts with the first of its processes, and keeps the variables of that moment.
        with patch.dict(os.environ, variables, clear=True):
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if job else {}
                arguments = (program, variables | job | own, folder, *files)
                ranks.append(_context.Process(target=_run, args=arguments, daemon=True))
                ranks[-1].start()
        try:
            status = _status(ranks, deadline_seconds)
        except TimeoutError as error:
            printed = "".join(file.read_text(errors="replace")[-3000:] for file in files)
            raise TimeoutError(f"{error}:\n{printed}") from None
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return subprocess.CompletedProcess(program, status, *(file.read_text(errors="replace") for file in files))


def _status(ranks: list[ForkServerProcess], deadline_seconds: float) -> int:
    """Wait until all have ended, or one has failed."""
    deadline, running = time.monotonic() + deadline_seconds, list(ranks)
    while running:
        if not wait([process.sentinel for process in running], timeout=deadline - time.monotonic()):
            raise TimeoutError(f"{len(running)} of {len(ranks)} processes had not ended after {deadline_seconds:g} s")
        for process in [process for process in running if process.exitcode is not None]:
            running.remove(process)
            if process.exitcode:
                return process.exitcode
    return 0


def _run(program: list[str], variables: dict[str, str], folder: Path, stdout: Path, stderr: Path) -> None:
    bind_to_parent(os.getppid())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the forked process ignores
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for number, file in ((1, stdout), (2, stderr)):
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")
