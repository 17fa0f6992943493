"""The command line of the trainer: from arguments to a locked run directory, process groups and an exit status."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack

# OpenMP reads this variable when torch is imported. Idle threads that never spin cost a wake-up per operation; threads
# that spin for long occupy cores that other processes need.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from megatron_rlvr.config import Config, load_config, resolve
from megatron_rlvr.config_schema import describe_sections, key_types
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, EXIT_USER_ERROR, failure_recorded, status_is_returned
from megatron_rlvr.lifecycle import open_run_directory, print_error
from megatron_rlvr.megatron import device
from megatron_rlvr.megatron.parallel import Layout, parallel_groups
from megatron_rlvr.resume import lengths_agreed
from megatron_rlvr.rollout.engines.base import EngineLostError

USAGE = """\
usage: python -m megatron_rlvr.train CONFIG.yaml [key=value ...]
       torchrun --nproc-per-node N -m megatron_rlvr.train CONFIG.yaml [key=value ...]

Train a policy as CONFIG.yaml describes. Each key=value replaces one value of the file:

  optimizer.learning_rate=2e-6 rollout.stop=[END] algorithm.schedule.name=oscillatory-decay

The same command resumes a run that was stopped. Exit status: 0 done, 2 user error, 75 stopped and resumable.

The configuration has the top-level keys {keys} and these sections:

{sections}

docs/configuration.md describes every key: type, default, bounds and meaning."""


def usage() -> str:
    """Return the text of ``--help``."""
    keys = [name for name, key_type in key_types(Config).items() if not key_type.is_section]
    return USAGE.format(keys=", ".join(keys), sections=describe_sections(Config))


@status_is_returned
def run_command(train: Callable[[Config, Layout, ExitStack], int], arguments: Sequence[str] | None) -> int:
    """Run the command line ``CONFIG [key=value ...]``.

    Args:
        train: runs a configuration and returns the exit status.
        arguments: the command line without the program; None means ``sys.argv[1:]``.

    Returns:
        the exit status: 0 done, 2 user error, 75 stopped and resumable.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.simplefilter("ignore", FutureWarning)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(usage())
            return EXIT_DONE if arguments else EXIT_USER_ERROR
        config = load_config(arguments[0], arguments[1:])
        torch.set_num_threads(config.threads or torch.get_num_threads())
        with ExitStack() as resources:
            config = resources.enter_context(open_run_directory(config))
            config = resolve(config, on_gpu=device.on_gpu())
            device.check_operators()
            layout = resources.enter_context(parallel_groups(config.parallel, config.seed))
            config = lengths_agreed(config)
            with failure_recorded():
                return train(config, layout, resources)
    except (UserError, EngineLostError) as error:
        print_error(error)
        return error.exit_status
