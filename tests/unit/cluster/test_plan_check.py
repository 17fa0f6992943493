"""Whether the plan of the example jobs fits their GPUs, and which jobs it refuses."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from megatron_rlvr.cluster.node_checks import NodeReport
from megatron_rlvr.cluster.plan_check import check_plan
from megatron_rlvr.config import Config, load_config
from megatron_rlvr.errors import UserError
from tests.processes import ROOT

FOLDER = ROOT / "examples" / "slurm"
GPU_SCRIPTS = [script for script in sorted(FOLDER.glob("*.sbatch")) if "--gpus-per-node=8" in script.read_text()]
TRAINING = [script for script in GPU_SCRIPTS if "\ntrain " in script.read_text()]
H100 = ("NVIDIA H100 80GB HBM3", 81559)


def _job(script: Path, folder: Path) -> tuple[Config, int, int, str]:
    """Return what a training script requests: configuration, training nodes, all nodes, servers."""
    text = script.read_text()
    nodes = int(re.search(r"--nodes=(\d+)", text)[1])  # type: ignore[index]
    servers = re.search(r'"\$\{RLVR_SERVERS:=(\S+)\}"', text)
    command = re.search(r'\ntrain (\S+) (.*)"\$@"', text, re.S)
    assert servers and command
    name = Path(command[1]).stem
    folder.mkdir()
    shutil.copy(ROOT / "examples" / "configs" / "architectures" / f"{name}.json", folder / "config.json")
    overrides = command[2].replace("\\\n", " ").split()
    config = load_config(ROOT / command[1], [*overrides, f"model.path={folder}", f"data.train={script}"])
    train = nodes - int(servers[1].partition(":")[2] or 0)
    return config, train, nodes, servers[1]


@pytest.mark.parametrize("script", TRAINING, ids=lambda script: script.stem)
def test_the_plan_of_every_training_script_fits_h100(script: Path, tmp_path: Path) -> None:
    config, train, nodes, servers = _job(script, tmp_path / "model")
    reports = [NodeReport(f"n{i}", gpus=[H100] * 8) for i in range(nodes)]
    text = check_plan(config, reports, train, 8, servers)
    assert "\nfits: " in text
    # Colocated servers leave only a part of each GPU to training.
    share = float(config.rollout.sglang.server["mem_fraction_static"]) if servers == "colocated" else 0.0
    assert f"of {81559 / 1024 * (1 - share):.1f} GiB" in text


def test_a_gpu_job_that_could_not_generate_is_refused(tmp_path: Path) -> None:
    config, train, nodes, _ = _job(FOLDER / "qwen2.5-math-7b-1node.sbatch", tmp_path / "model")
    reports = [NodeReport(f"n{i}", gpus=[H100] * 8) for i in range(nodes)]
    with pytest.raises(UserError, match="set RLVR_SERVERS=colocated or nodes:N"):
        check_plan(config, reports, train, 8)
    config.rollout.sglang.server = {}
    with pytest.raises(UserError, match=r"needs rollout\.sglang\.server\.mem_fraction_static"):
        check_plan(config, reports, train, 8, "colocated")
