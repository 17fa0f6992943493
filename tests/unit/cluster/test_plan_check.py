"""Whether the plan of the example jobs fits their GPUs, and which jobs it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_rlvr.cluster.node_checks import NodeReport
from megatron_rlvr.cluster.plan_check import check_plan
from megatron_rlvr.config import Config, load_config
from megatron_rlvr.errors import UserError
from tests.job_scripts import SCRIPTS, JobScript

GPU_SCRIPTS = [script for script in SCRIPTS if script.gpus]
H100 = ("NVIDIA H100 80GB HBM3", 81559)


def job_config(script: JobScript, folder: Path) -> Config:
    """The configuration of a training script, of a model folder that holds the published config.json alone."""
    folder.mkdir()
    architecture = script.config.parent / "architectures" / f"{script.config.stem}.json"
    shutil.copy(architecture, folder / "config.json")
    return load_config(script.config, [*script.overrides, f"model.path={folder}", f"data.train={script.path}"])


def reports(script: JobScript) -> list[NodeReport]:
    return [NodeReport(f"n{i}", gpus=[H100] * 8) for i in range(script.nodes)]


@pytest.mark.parametrize("script", GPU_SCRIPTS, ids=lambda script: script.path.stem)
def test_every_training_script_fits_h100_and_its_model(script: JobScript, tmp_path: Path) -> None:
    """With the overrides of the script: memory, layout, batch and the positions of the published model."""
    config = job_config(script, tmp_path / "model")
    text = check_plan(config, reports(script), script.training_nodes, 8, script.servers)
    assert "\nfits: " in text and f"of {81559 / 1024:.1f} GiB" in text
    config.rollout.max_tokens = 10**6
    with pytest.raises(UserError, match=r"exceed the \d+ positions of the model"):
        check_plan(config, reports(script), script.training_nodes, 8, script.servers)


def test_a_gpu_job_that_could_not_generate_is_refused(tmp_path: Path) -> None:
    [script] = [script for script in GPU_SCRIPTS if script.nodes == 1]
    config = job_config(script, tmp_path / "model")
    config.rollout.sglang.server = {}
    with pytest.raises(UserError, match=r"needs rollout\.sglang\.server\.mem_fraction_static"):
        check_plan(config, reports(script), 1, 8, "colocated")
    config.rollout.engine = "local"
    with pytest.raises(UserError, match="RLVR_SERVERS=colocated or nodes:N"):
        check_plan(config, reports(script), 1, 8)
