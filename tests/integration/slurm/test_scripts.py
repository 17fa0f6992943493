"""The job scripts without running them: shellcheck, dry run, and whether Slurm accepts them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.slurm.cluster import Cluster
from tests.processes import ROOT

FOLDER = ROOT / "examples" / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))
GPU_SCRIPTS = [script for script in SCRIPTS if "--gpus-per-node=8" in script.read_text()]
TRAINING = [script for script in GPU_SCRIPTS if "\ntrain " in script.read_text()]


def _name(script: Path) -> str:
    return script.stem


def dry_run(script: Path, *arguments: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RLVR_"))}
    environment |= {"RLVR_DRY_RUN": "1", "RLVR_ENVIRONMENT": f"venv:{sys.prefix}", "PYTHONPATH": str(ROOT), **variables}
    command = ["bash", str(script), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_scenarios_have_a_script() -> None:
    expected = {
        *("quickstart-cpu", "qwen2.5-math-7b-1node", "qwen2.5-32b-4nodes", "qwen2.5-72b-16nodes"),
        *("llama3.3-70b-16nodes", "llama3.3-70b-16nodes-split"),
        *("entropy-sweep", "entropy-sweep-report", "convert", "evaluate"),
    }
    assert {script.stem for script in SCRIPTS} == expected
    assert len(TRAINING) == 5


def test_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck: `make slurm` installs it, as root on Debian")
    files = [*SCRIPTS, *FOLDER.glob("*.sh")]
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", TRAINING, ids=_name)
def test_dry_run_prints_the_command_of_every_rank(script: Path) -> None:
    text = dry_run(script, "optimizer.learning_rate=2e-6")
    nodes = int(re.search(r"--nodes=(\d+)", script.read_text())[1])  # type: ignore[index]
    train = 8 if "split" in script.stem else nodes
    ranks = re.findall(
        r"(?m)^rank (\d+) on node-(\d+): RANK=\1 LOCAL_RANK=(\d) WORLD_SIZE=(\d+) LOCAL_WORLD_SIZE=8 "
        r"MASTER_ADDR=node-0 .* -u -m megatron_rlvr\.train (\S+) .*optimizer\.learning_rate=2e-6 run_directory=/\S+",
        text,
    )
    assert [int(rank) for rank, *_ in ranks] == list(range(8 * train))
    assert {(int(size), config) for _, _, _, size, config in ranks} == {(8 * train, ranks[0][4])}
    assert [int(local) for _, _, local, _, _ in ranks] == list(range(8)) * train
    assert len({node for _, node, *_ in ranks}) == train
    steps = [line for line in text.splitlines() if line.startswith("srun ")]
    assert "megatron_rlvr.cluster.preflight" in steps[0] and f"--nodes={nodes} " in steps[0]
    assert "megatron_rlvr.cluster.torchrun" in steps[-1] and f"--nodes={train} " in steps[-1]
    assert "megatron_rlvr.cluster.serve" in steps[1] and f"--relative={train % nodes} " in steps[1]
    assert "rollout.engine=sglang" in steps[-1]
    assert all(step.startswith("srun --overlap --mem=0 --cpus-per-task=") for step in steps)


@pytest.mark.parametrize("script", TRAINING, ids=_name)
def test_the_configuration_of_a_dry_run_is_accepted(script: Path) -> None:
    from megatron_rlvr.config import load_config

    last = dry_run(script).splitlines()[-1]
    config, *overrides = last.split(" -m megatron_rlvr.train ")[1].replace("'", "").split()
    overrides = [word for word in overrides if not word.startswith("rollout.sglang.urls")]
    assert load_config(ROOT / config, overrides).parallel.tensor in (4, 8)


def test_dry_run_of_the_other_gpu_scripts_and_within_a_job() -> None:
    within = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "elsewhere", "SLURM_GPUS_ON_NODE": "2"}
    text = dry_run(FOLDER / "convert.sbatch", "to-megatron", "models/m", "checkpoints/m", **within)
    rank = r"(?m)^rank (\d) on node-0: .* tools/convert_checkpoint\.py to-megatron models/m checkpoints/m --verify$"
    assert re.findall(rank, text) == ["0"]
    text = dry_run(FOLDER / "evaluate.sbatch", "runs/m", "--initial", "evaluation.prompts=4")
    assert re.search(r"(?m)^srun .* megatron_rlvr\.cluster\.serve .* runs/m/config\.yaml evaluation\.prompts=4 $", text)
    rank = r"(?m)^rank (\d) .* tools/evaluate\.py runs/m --initial evaluation\.prompts=4 rollout\.engine=sglang "
    assert re.findall(rank, text) == list("01234567")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ("pyxis:/images/rlvr.sqsh", r"srun .*--container-image=/images/rlvr\.sqsh .* python3 -m megatron_rlvr"),
        ("apptainer:/images/rlvr.sif", r"srun .* apptainer exec --nv .*/images/rlvr\.sif python3 -m megatron_rlvr"),
        ("module:python/3.11,cuda", r"srun .* python3 -m megatron_rlvr"),
    ],
)
def test_environments(environment: str, expected: str) -> None:
    # Any python3 suffices, because a login node lacks the packages of the container.
    text = dry_run(FOLDER / "quickstart-cpu.sbatch", "run_directory=/scratch/run", RLVR_ENVIRONMENT=environment)
    assert re.search(expected, text)
    if "/images/" in environment:
        assert f"{ROOT}:{ROOT}\\,/scratch/run:/scratch/run " in text


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RLVR_ENVIRONMENT": "conda:x"}, "error: RLVR_ENVIRONMENT must begin with venv:"),
        ({"RLVR_ENVIRONMENT": "venv:/nowhere"}, "error: no /nowhere/bin/python: run `make setup`"),
        ({"RLVR_SERVERS": "some"}, "error: RLVR_SERVERS must be none, colocated or nodes:N"),
        ({"RLVR_SERVERS": "nodes:2"}, "leaves none of 2 nodes to train"),
        ({"RLVR_DRY_RUN": ""}, "error: this is a batch script: sbatch"),
    ],
)
def test_wrong_settings_are_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(AssertionError) as caught:
        dry_run(FOLDER / "quickstart-cpu.sbatch", "model.path=x", **variables)
    assert message in str(caught.value)


@pytest.mark.parametrize("script", SCRIPTS, ids=_name)
def test_slurm_accepts_it(script: Path, cluster: Cluster) -> None:
    found = cluster.run("sbatch", "--test-only", script)
    assert re.search(r"Job \d+ to start at .* on nodes n", found), found
