"""Evaluate a run's newest checkpoint on its held-out problems: pass@k, reward and length.

    python tools/evaluate.py runs/quickstart/run [--initial] [key=value ...]
    torchrun --nproc-per-node 8 tools/evaluate.py runs/math evaluation.prompts=500 data.heldout=data/aime.jsonl

The configuration is the run's own config.yaml; overrides may change what is evaluated (data.heldout, evaluation.*) and
the layout (parallel.*), which need not be that of training. `--initial` evaluates the model that the run began with.
The result is printed as one JSON line, and written to RUN_DIR/evaluation_step_N.json.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from megatron_rlvr.config import Config, load_config
from megatron_rlvr.errors import UserError
from megatron_rlvr.lifecycle import EXIT_DONE, EXIT_USER_ERROR
from megatron_rlvr.megatron import parallel
from megatron_rlvr.rollout.engines.build import build_engine
from megatron_rlvr.rollout.evaluation import Evaluator
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.training.checkpoint import Checkpoints
from megatron_rlvr.training.policy import Policy
from megatron_rlvr.verifiers import build_pool

warnings.simplefilter("ignore")


def evaluate(config: Config, run: Path, initial: bool, layout: parallel.Layout, resources: ExitStack) -> dict:
    """The evaluation of a run's policy; ``step`` says which. Collective over the job.

    Raises:
        UserError: when the run has no held-out problems or no checkpoint.
    """
    if config.data.heldout is None:
        raise UserError(f"{run} was trained without held-out problems: give data.heldout=FILE")
    verifiers = resources.enter_context(build_pool(config.verifier, layout.is_leader))
    policy = Policy(config, layout)
    step = 0
    if not initial:
        state = Checkpoints(run / "checkpoints", config.checkpoint).load_newest(policy)
        if state is None:
            raise UserError(f"{run} has no checkpoint yet: wait for one, or evaluate its first model with --initial")
        step = state["step"]
    engine = build_engine(config, policy, resources)
    if step:
        engine.update_weights(step)
    tokenization = Tokenization(config.model.path, policy.bridge.vocab_size, policy.bridge.context_length)
    scores = Evaluator(config, layout, engine, tokenization, verifiers).evaluate()
    if not scores:
        raise UserError("there is nothing to tell: the engine answered nothing of use, as the warning above says")
    return {"step": step, **scores}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit status 0, or 2 after one line that says what to correct."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_directory", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, as for training")
    parser.add_argument("--initial", action="store_true", help="the model that the run began with")
    options = parser.parse_intermixed_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    run = options.run_directory
    try:
        config = load_config(run / "config.yaml", [*options.overrides, f"run_directory={run}"])
        with ExitStack() as resources:
            layout = resources.enter_context(parallel.parallel_groups(config.parallel, config.seed))
            result = evaluate(config, run, options.initial, layout, resources)
        if rank == 0:
            print(json.dumps(result), flush=True)
            (run / f"evaluation_step_{result['step']}.json").write_text(json.dumps(result) + "\n")
    except UserError as error:
        print(f"error: {error}" if rank == 0 else f"error (rank {rank}): {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
