"""The job scripts without running them: shellcheck, dry run, and whether Slurm accepts them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlvr.config import load_config
from tests.integration.slurm.cluster import Cluster
from tests.processes import DEADLINE_SECONDS, ROOT

FOLDER = ROOT / "examples" / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))
GPU_SCRIPTS = [script for script in SCRIPTS if "--gpus-per-node=8" in script.read_text()]
TRAINING = [script for script in GPU_SCRIPTS if "\ntrain " in script.read_text()]


def _name(script: Path) -> str:
    return script.stem


def environment(**variables: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RLVR_"))}
    return own | {"RLVR_DRY_RUN": "1", "RLVR_ENVIRONMENT": f"venv:{sys.prefix}", "PYTHONPATH": str(ROOT), **variables}


def dry_run(script: Path, *arguments: str, **variables: str) -> str:
    command = ["bash", str(script), *arguments]
    done = subprocess.run(
        command, env=environment(**variables), cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_scenarios_have_a_script() -> None:
    expected = {
        *("quickstart-cpu", "qwen2.5-math-7b-1node", "qwen2.5-32b-4nodes", "qwen2.5-72b-16nodes"),
        *("llama3.3-70b-16nodes", "llama3.3-70b-16nodes-split", "llama3.3-70b-lora-2nodes"),
        *("entropy-sweep", "entropy-sweep-report", "convert", "evaluate"),
    }
    assert {script.stem for script in SCRIPTS} == expected
    assert len(TRAINING) == 6


def test_shellcheck() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck: `make slurm` installs it, as root on Debian")
    files = [*SCRIPTS, *FOLDER.glob("*.sh")]
    done = subprocess.run(
        ["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", TRAINING, ids=_name)
def test_dry_run_prints_the_command_of_every_rank_and_accepts_the_configuration(script: Path) -> None:
    text = dry_run(script, "optimizer.learning_rate=2e-6", RLVR_DRY_RUN="ranks")
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
    *_, last, memory, verdict = text.splitlines()
    config, *overrides = shlex.split(last.split(" -m megatron_rlvr.train ")[1])
    assert load_config(ROOT / config, overrides).parallel.tensor in (4, 8)
    assert memory.startswith("on H100 SXM 80 GB, by the plan (computed): fits: ")
    assert verdict == f"{config} and the overrides are valid"


def test_a_dry_run_prints_a_line_per_node() -> None:
    lines = dry_run(FOLDER / "llama3.3-70b-16nodes-split.sbatch").splitlines()
    ranks = [line for line in lines if line.startswith("rank")]
    expected = [f"ranks {8 * node} to {8 * node + 7} on node-{node}: WORLD_SIZE=64 " for node in range(8)]
    assert [line[: len(start)] for line, start in zip(ranks, expected, strict=True)] == expected


def refused(script: Path, *arguments: str, **variables: str) -> str:
    """Run a script that must end with status 2 and one line on stderr; return the line."""
    command = ["bash", str(script), *arguments]
    done = subprocess.run(
        command, env=environment(**variables), cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECONDS
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_dry_run_refuses_what_training_refuses() -> None:
    assert "did you mean optimizer.learning_rate?" in refused(TRAINING[0], "optimizer.lerning_rate=1")
    assert "steps must be greater than 0" in refused(FOLDER / "quickstart-cpu.sbatch", "steps=0")
    assert "is not key=value" in refused(FOLDER / "quickstart-cpu.sbatch", "here")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("evaluate", [], "no run to evaluate: sbatch examples/slurm/evaluate.sbatch RUN"),
        ("evaluate", ["--initial", "runs/m"], "no run to evaluate"),
        ("convert", [], "nothing to convert: sbatch examples/slurm/convert.sbatch to-megatron"),
        ("convert", ["to-megatron", "here"], "nothing to convert"),
        ("convert", ["to-megatorn", "here", "there"], "cannot convert to-megatorn: choose to-megatron, "),
    ],
)
def test_a_script_without_its_arguments_says_what_it_needs(script: str, arguments: list[str], message: str) -> None:
    assert message in refused(FOLDER / f"{script}.sbatch", *arguments)


def test_dry_run_of_the_other_gpu_scripts_and_within_a_job() -> None:
    within = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "elsewhere", "SLURM_GPUS_ON_NODE": "2"}
    text = dry_run(FOLDER / "convert.sbatch", "to-megatron", "models/m", "checkpoints/m", **within)
    rank = r"(?m)^rank (\d) on node-0: .* tools/convert_checkpoint\.py to-megatron models/m checkpoints/m --verify$"
    assert re.findall(rank, text) == ["0"]
    text = dry_run(FOLDER / "convert.sbatch", "to-peft", "runs/m/checkpoints/step_9", "adapters", **within)
    assert "convert_checkpoint.py to-peft runs/m/checkpoints/step_9 adapters\n" in text
    text = dry_run(FOLDER / "evaluate.sbatch", "runs/m/checkpoints/step_8", "--step=8", "evaluation.prompts=4")
    assert re.search(
        r"(?m)^srun .* megatron_rlvr\.cluster\.serve .* -- runs/m/config\.yaml evaluation\.prompts=4 $", text
    )
    words = r"runs/m/checkpoints/step_8 --step=8 evaluation\.prompts=4 rollout\.engine=sglang "
    rank = rf"(?m)^ranks 0 to 7 .* tools/evaluate\.py {words}"
    assert len(re.findall(rank, text)) == 1
    assert text.endswith("\nthe configuration was not checked: no runs/m/config.yaml on this machine\n")


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
        ({"RLVR_SERVERS": "nodes:1+a[$(touch CREATED)]"}, "error: RLVR_SERVERS must be none, colocated or nodes:N"),
        ({"RLVR_SERVERS": "nodes:08"}, "error: RLVR_SERVERS must be none, colocated or nodes:N"),
        ({"RLVR_PREFLIGHT_SECONDS": "a[$(touch CREATED)]"}, "RLVR_PREFLIGHT_SECONDS must be a positive whole number"),
        ({"RLVR_SERVER_SECONDS": "a[$(touch CREATED)]"}, "RLVR_SERVER_SECONDS must be a positive whole number"),
        ({"RLVR_MAX_TRIES": "0"}, "RLVR_MAX_TRIES must be a positive whole number"),
        ({"RLVR_PROCESSES_PER_NODE": "8 "}, "RLVR_PROCESSES_PER_NODE must be a positive whole number"),
        ({"RLVR_DRY_RUN": ""}, "error: this is a batch script: sbatch"),
    ],
)
def test_wrong_settings_are_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(AssertionError) as caught:
        dry_run(FOLDER / "quickstart-cpu.sbatch", "model.path=x", **variables)
    assert message in str(caught.value)
    assert not (ROOT / "CREATED").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=_name)
def test_slurm_accepts_it(script: Path, cluster: Cluster) -> None:
    found = cluster.run("sbatch", "--test-only", script)
    assert re.search(r"Job \d+ to start at .* on nodes n", found), found
