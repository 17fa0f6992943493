"""Compute, before anything starts, whether a training configuration fits, what it needs, and how long a step takes.

    python tools/plan.py examples/configs/qwen2.5-32b.yaml --nodes 4 --suggest
    python tools/plan.py run.yaml --nodes 16 --servers nodes:8 parallel.tensor=8 parallel.pipeline=4

megatron-core builds the model of one rank of every pipeline stage on the meta device, under a fake process group.
Weights, gradients and optimizer state are therefore counted; activations, logits, cache and times are formulas. Of the
model, only config.json is read: the one in model.path, --architecture, or architectures/NAME.json next to CONFIG,
where NAME is that of CONFIG.

Exit status: 0 when the configuration fits, 1 when it does not, 2 when training would refuse it.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from megatron_rlvr.config import load_config
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import user_errors_reported
from megatron_rlvr.planning.architecture import architecture_of, model_described_by
from megatron_rlvr.planning.job import Hardware
from megatron_rlvr.planning.plan import make_plan
from megatron_rlvr.planning.report import describe, describe_suggestions
from megatron_rlvr.planning.servers import Servers
from megatron_rlvr.planning.suggestions import suggest
from megatron_rlvr.rollout.engines.sglang.launch_arguments import check_gpus


@user_errors_reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file of a training configuration")
    parser.add_argument("overrides", nargs="*", help="key=value, as for training")
    parser.add_argument("--nodes", type=int, required=True, help="nodes of the job, those with servers included")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument(
        "--servers",
        help="SGLang servers as in RLVR_SERVERS: colocated, or nodes:N for the last N nodes; by default those of "
        "rollout.sglang",
    )
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
    servers = Servers.of_job(config, options.servers)
    if servers.placement == "colocated":
        sglang = config.rollout.sglang
        check_gpus(sglang.server, sglang.servers, options.gpus_per_node, "a node")
    nodes = options.nodes - servers.nodes
    if nodes < 1:
        raise UserError(f"--servers {options.servers} leaves none of --nodes {options.nodes} to train: raise --nodes")
    architecture = options.architecture or find_architecture(config.model.path, Path(options.config))
    with ExitStack() as stack:
        if architecture is not None:
            if not architecture.is_file():
                raise UserError(f"--architecture {architecture} is not a file: give a model's config.json")
            print(f"architecture: {architecture}")
            stack.enter_context(model_described_by(architecture, config))
        job = (config, nodes, options.gpus_per_node, hardware, options.response_share, servers)
        try:
            plan = make_plan(*job)
            print(describe(plan))
        finally:  # also where this layout is refused
            if options.suggest:
                print(f"\n{describe_suggestions(suggest(*job))}")
    return 0 if plan.fits else 1


def find_architecture(model_path: str, config: Path) -> Path | None:
    """Return the config.json to plan with if the model is not on this machine; None if it is.

    Raises:
        UserError: if there is no such file next to the configuration.
    """
    if (Path(model_path) / "config.json").is_file():
        return None
    found = architecture_of(config)
    if not found.is_file():
        raise UserError(
            f"model.path={model_path} has no config.json, and there is no {found}: correct model.path, or name a file "
            "with --architecture, such as those in examples/configs/architectures"
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
