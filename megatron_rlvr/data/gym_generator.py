"""Generate problems of the package reasoning-gym: ``python -m megatron_rlvr.data.gym_generator``.

Arguments: task, its options as JSON, seed, number of problems, file for the pickled list of problems. `gym_problems`
starts this program, with fixed hashes of texts.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rlvr.checked_input import one_line
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, user_errors_reported


@user_errors_reported
def main(arguments: Sequence[str]) -> int:
    """Generate the problems; returns the exit status."""
    from reasoning_gym.factory import DATASETS, create_dataset

    task, options, seed, size, output = arguments
    if task == "composite":
        raise UserError("the package mixes tasks in composite; write data.train as a list of tasks with weights")
    if task not in DATASETS:
        close = difflib.get_close_matches(task, DATASETS, n=3)
        raise UserError(
            f"the package has no such task; {'close ones' if close else 'it has'}: "
            f"{', '.join(close or sorted(DATASETS))}"
        )
    settings = json.loads(options)
    known = [field.name for field in dataclasses.fields(DATASETS[task][1]) if field.name not in ("seed", "size")]
    for name in settings:
        if name not in known:
            raise UserError(f"the task has no option {name!r}; it has {', '.join(known)}")
    try:
        dataset = create_dataset(task, seed=int(seed), size=int(size), **settings)
        entries = [dataset[index] for index in range(int(size))]
    except Exception as error:  # a task can raise anything for options that do not fit together
        raise UserError(
            f"the package cannot generate the task with the options {options} ({type(error).__name__}: "
            f"{one_line(error)}): change data.reasoning_gym.options.{task}"
        ) from error
    Path(output).write_bytes(pickle.dumps(entries))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
