"""Evaluate a run's newest checkpoint on its held-out problems: pass@k, reward and length.

    python tools/evaluate.py runs/quickstart/run [--initial] [key=value ...]
    torchrun --nproc-per-node 8 tools/evaluate.py runs/math evaluation.prompts=500 data.heldout=data/aime.jsonl

The configuration is the run's own config.yaml; overrides may change what is evaluated (data.heldout, evaluation.*) and
the layout (parallel.*), which need not be that of training. `--initial` evaluates the model that the run started from.
The result is printed as one JSON line, and written to RUN_DIR/evaluation_step_N.json.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_rlvr.components import build_components
from megatron_rlvr.config import Config, load_config, resolve
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, failure_recorded, status_is_returned
from megatron_rlvr.lifecycle import print_error
from megatron_rlvr.megatron import device, parallel

warnings.simplefilter("ignore")


def evaluate(config: Config, run: Path, initial: bool, layout: parallel.Layout, resources: ExitStack) -> dict:
    """Evaluate a run's policy; ``step`` of the result says which. Collective over the job.

    Raises:
        UserError: when the run has no held-out problems or no checkpoint, or nothing could be generated.
    """
    if config.data.heldout is None:
        raise UserError(f"{run} was trained without held-out problems: give data.heldout=FILE")
    components = build_components(config, layout, resources)
    step = 0
    if not initial:
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


@status_is_returned
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit status: 0 done, 2 after a user error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, as for training")
    parser.add_argument("--initial", action="store_true", help="the model that the run started from")
    options = parser.parse_intermixed_args(arguments)
    run = options.run_directory
    try:
        config = load_config(run / "config.yaml", [*options.overrides, f"run_directory={run}"])
        config = resolve(config, on_gpu=device.on_gpu())
        with ExitStack() as resources:
            layout = resources.enter_context(parallel.parallel_groups(config.parallel, config.seed))
            with failure_recorded():
                result = evaluate(config, run, options.initial, layout, resources)
        if layout.is_main:
            print(json.dumps(result), flush=True)
            (run / f"evaluation_step_{result['step']}.json").write_text(json.dumps(result) + "\n")
    except UserError as error:
        print_error(error)
        return error.exit_status
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
