"""Compute, before anything starts, whether a training configuration fits, what it needs, and how long a step takes.

    python tools/plan.py examples/configs/qwen2.5-math-7b.yaml --nodes 1 \\
        --architecture examples/configs/architectures/qwen2.5-math-7b.json
    python tools/plan.py run.yaml --nodes 16 --suggest parallel.tensor=8 parallel.pipeline=4

megatron-core builds the model of one rank of every pipeline stage on the meta device, under a fake process group.
Weights, gradients and optimizer state are therefore counted; activations, logits, cache and times are formulas. Of the
model, only config.json is read: the one in model.path, or --architecture.

Exit status: 0 when the configuration fits, 1 when it does not, 2 when it is refused.
"""

import argparse
import shutil
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_rlvr.config import load_config
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import user_errors_reported
from megatron_rlvr.planning.memory import GIB
from megatron_rlvr.planning.plan import make_plan, suggest
from megatron_rlvr.planning.report import describe, layout_name
from megatron_rlvr.planning.roofline import Hardware


@user_errors_reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of a training configuration")
    parser.add_argument("overrides", nargs="*", help="key=value, as for training")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--architecture", type=Path, help="config.json of a model, instead of the one in model.path")
    parser.add_argument("--gpu-gb", type=float, default=80.0, help="memory of a GPU in 10^9 bytes")
    parser.add_argument(
        "--response-share",
        type=float,
        default=0.5,
        help="mean length of prompts and responses, as a share of the longest",
    )
    parser.add_argument("--suggest", action="store_true", help="also plan other layouts and rank those that fit")
    options = parser.parse_intermixed_args(arguments)
    warnings.simplefilter("ignore")
    hardware = replace(Hardware(), memory_bytes=options.gpu_gb * 1e9)
    config = load_config(options.config, options.overrides)
    if options.nodes < 1 or options.gpus_per_node < 1:
        raise UserError("--nodes and --gpus-per-node must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        if options.architecture is not None:
            if not options.architecture.is_file():
                raise UserError(f"--architecture {options.architecture} is not a file: give a model's config.json")
            shutil.copyfile(options.architecture, Path(folder) / "config.json")
            config.model.path = folder
        elif not (Path(config.model.path) / "config.json").is_file():
            raise UserError(
                f"model.path={config.model.path} has no config.json: correct it, or name one with --architecture, such "
                "as those in examples/configs/architectures"
            )
        plan = make_plan(config, options.nodes, options.gpus_per_node, hardware, options.response_share)
        print(describe(plan))
        if options.suggest:
            print("\nlayouts that fit, the fastest first:")
            others = suggest(config, options.nodes, options.gpus_per_node, hardware, options.response_share)
            for other in others:
                needs = other.stage_bytes(other.worst) / GIB
                print(f"  {other.time.total:7.0f} s  {needs:6.1f} GiB  {layout_name(other)}, microbatches of 1")
            if not others:
                print("  none: use more nodes, shorter responses, or servers on other nodes (rollout.sglang.urls)")
    return 0 if plan.fits else 1


if __name__ == "__main__":
    sys.exit(main())
