"""Evaluate a checkpoint of a run on its held-out problems: pass@k, reward and length.

    python tools/evaluate.py runs/quickstart/run [--step N | --initial] [key=value ...]
    python tools/evaluate.py runs/quickstart/run/checkpoints/step_50
    torchrun --nproc-per-node 8 tools/evaluate.py runs/math evaluation.prompts=500 data.heldout=data/aime.jsonl

The configuration is the run's own config.yaml; overrides may change what is evaluated (data.heldout, evaluation.*) and
the layout (parallel.*), which need not be that of training. Without `--step` or a checkpoint's folder, the newest
checkpoint is evaluated; `--initial` evaluates the model that the run started from. A verifier of your own is imported
from the current directory, as in training. The result is printed as one JSON line, and written to
RUN_DIR/evaluation_step_N.json.
"""

import argparse
import json
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_rlvr.checksums import DamagedError
from megatron_rlvr.components import build_components
from megatron_rlvr.config import Config, load_config, resolve
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, failure_recorded, status_is_returned
from megatron_rlvr.lifecycle import print_error
from megatron_rlvr.megatron import device, parallel
from megatron_rlvr.training.checkpoint_loading import load_checkpoint, start_from
from megatron_rlvr.training.checkpoints_folder import steps
from megatron_rlvr.training.policy import Policy

warnings.simplefilter("ignore")


def evaluate(
    config: Config, run: Path, chosen: int | None, initial: bool, layout: parallel.Layout, resources: ExitStack
) -> dict:
    """Evaluate a run's policy; ``step`` of the result says which. Collective over the job.

    Args:
        config: the configuration, with every ``auto`` resolved.
        run: the run directory.
        chosen: step of the checkpoint; None takes the newest that is not damaged.
        initial: evaluate the model that the run started from instead.
        layout: position of this process in the process groups.
        resources: stops the processes that are started.

    Raises:
        UserError: when the run has no held-out problems or no checkpoint, or nothing could be generated.
    """
    if config.data.heldout is None:
        raise UserError(f"{run} was trained without held-out problems: give data.heldout=FILE")
    components = build_components(config, layout, resources)
    step = 0
    if initial:
        if start_from(config.checkpoint, components.policy):
            components.engine.update_weights(0)
    elif chosen is not None:
        step = load_step(run / "checkpoints", chosen, components.policy)
        components.engine.update_weights(step)
    else:
        state = components.checkpoints.load_newest(components.policy)
        if state is None:
            raise UserError(f"{run} has no checkpoint yet: wait for one, or evaluate its initial model with --initial")
        step = state["step"]
        components.engine.update_weights(step)
    evaluator = components.evaluator()
    scores = evaluator.evaluate() if evaluator is not None else {}
    if not scores:
        raise UserError("no result: the engine could not generate; see the warning above")
    return {"step": step, **scores}


def load_step(folder: Path, step: int, policy: Policy) -> int:
    """Load the weights of one checkpoint; returns its step. Collective over the job.

    Raises:
        UserError: if there is none of this step, or it is damaged.
    """
    if step not in (known := steps(folder)):
        found = f"it has those of {', '.join(map(str, known))}" if known else "it has none"
        raise UserError(f"{folder} has no checkpoint of step {step}: {found}; checkpoint.keep says how many are kept")
    try:
        load_checkpoint(folder / f"step_{step}", policy, "set model.path to its model", step=step, optimizer=False)
    except DamagedError as error:
        raise UserError(f"{folder / f'step_{step}'} is damaged ({error}): evaluate another one") from error
    return step


def run_and_step(given: Path, step: int | None) -> tuple[Path, int | None]:
    """Return the run directory and the step that the command line names: a run, or one of its checkpoints.

    Raises:
        UserError: if it is neither.
    """
    name = re.fullmatch(r"step_([0-9]{1,15})", given.name)
    run = given.absolute().parent.parent
    if name and not (given / "config.yaml").exists() and (run / "config.yaml").is_file():
        if step not in (None, int(name[1])):
            raise UserError(f"{given} is not a checkpoint of step {step}: leave out --step")
        return given.parent.parent if len(given.parts) > 2 else run, int(name[1])
    if not (given / "config.yaml").is_file():
        raise UserError(f"{given} is neither a run directory with config.yaml nor RUN/checkpoints/step_N of one")
    return given, step


@status_is_returned
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit status: 0 done, 2 after a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_directory", type=Path, help="a run directory, or RUN/checkpoints/step_N")
    parser.add_argument("overrides", nargs="*", help="key=value, as for training")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint after this many steps")
    which.add_argument("--initial", action="store_true", help="the model that the run started from")
    options = parser.parse_intermixed_args(arguments)
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # where `python -m` finds a verifier of the user
    try:
        run, step = run_and_step(options.run_directory, options.step)
        config = load_config(run / "config.yaml", [*options.overrides, f"run_directory={run}"])
        config = resolve(config, on_gpu=device.on_gpu())
        with ExitStack() as resources:
            layout = resources.enter_context(parallel.parallel_groups(config.parallel, config.seed))
            with failure_recorded():
                result = evaluate(config, run, step, options.initial, layout, resources)
        if layout.is_main:
            print(json.dumps(result), flush=True)
            (run / f"evaluation_step_{result['step']}.json").write_text(json.dumps(result) + "\n")
    except UserError as error:
        print_error(error)
        return error.exit_status
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
