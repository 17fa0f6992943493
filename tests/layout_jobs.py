"""Run jobs in parallel layouts, one after another, in processes that are started once.

As the program of several processes: ``layout_jobs.py OUTPUT JOB...``. A job is JSON with "ranks", those that run it,
"program", the module of ``tests`` whose `run` takes the job, the position of the process and OUTPUT, and what this
program needs, of which "layout" are fields of ParallelConfig. A rank runs its jobs in their order.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch

from tests.rendezvous import renew


def main(output: Path, jobs: list[str]) -> None:
    torch.set_num_threads(1)
    for number, text in enumerate(jobs):
        job = json.loads(text)
        if not renew(number, job["ranks"]):
            continue
        program = importlib.import_module(f"tests.{job['program']}")
        from megatron_rlvr.megatron import parallel
        from megatron_rlvr.megatron.config import ParallelConfig

        with parallel.parallel_groups(ParallelConfig(**job["layout"]), seed=0) as here:
            program.run(job, here, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
