"""The figures of the first 7B job in docs/slurm.md are those of the plan."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_rlvr.config import load_config
from megatron_rlvr.planning.memory import GIB
from megatron_rlvr.planning.plan import make_plan
from megatron_rlvr.planning.servers import Servers
from tests.job_scripts import SCRIPTS
from tests.processes import ROOT

NAME = "qwen2.5-math-7b"
# bf16 weights, float32 weights and Adam's two moments.
CHECKPOINT_BYTES_PER_PARAMETER = 2 + 4 + 8


def figures(folder: Path) -> list[str]:
    """Rows of the table, for compute at 23 % and at 40 % of the GPUs' peak."""
    script = next(script for script in SCRIPTS if script.path.stem == f"{NAME}-1node")
    config = load_config(str(script.config), script.overrides)
    shutil.copyfile(ROOT / "examples" / "configs" / "architectures" / f"{NAME}.json", folder / "config.json")
    config.model.path = str(folder)
    plan = make_plan(config, script.nodes, script.gpus, servers=Servers.of_job(config, script.servers))
    steps = (plan.time, plan.optimistic_time)
    tokens = config.rollout.prompts_per_step * config.rollout.samples_per_prompt * plan.time.response_tokens
    state = 12 * max(stage.count for stage in plan.stages)
    fullest = plan.stage_bytes(plan.worst) / GIB
    checkpoint = CHECKPOINT_BYTES_PER_PARAMETER * plan.shape.parameters
    return [
        f"| a step | {steps[0].total:.0f} s | {steps[1].total:.0f} s |",
        f"| response tokens per second, of 8 GPUs | {tokens / steps[0].total:,.0f} | {tokens / steps[1].total:,.0f} |",
        f"| {config.steps} steps | {config.steps * steps[0].total / 60:,.0f} minutes "
        f"| {config.steps * steps[1].total / 60:,.0f} minutes |",
        f"| a checkpoint on disk | {checkpoint / 1e9:.0f} GB | |",
        f"| disk for `checkpoint.keep: {config.checkpoint.keep}`, and one more while it is written "
        f"| {(config.checkpoint.keep + 1) * checkpoint / 1e9:.0f} GB | |",
        f"| host memory of the node, to save a checkpoint | {config.parallel.tensor * state / GIB:.0f} GiB | |",
        f"| host memory of the node, to load it | {script.gpus * state / GIB:.0f} GiB | |",
        f"| the fullest GPU | {fullest:.1f} of {plan.hardware.memory_bytes / GIB:.1f} GiB | |",
    ]


def test_the_documented_figures_are_the_plans(tmp_path: Path) -> None:
    documented = [line.strip() for line in (ROOT / "docs" / "slurm.md").read_text().splitlines()]
    missing = [row for row in figures(tmp_path) if row not in documented]
    assert not missing, "docs/slurm.md lacks\n" + "\n".join(missing)
