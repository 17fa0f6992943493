"""What one node checks by itself before training: versions, GPUs, model, data and run directory."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rlvr.config import Config
from megatron_rlvr.data.config import is_gym
from megatron_rlvr.doctor import NO_SERVERS
from megatron_rlvr.errors import UserError
from megatron_rlvr.log_tail import error_line
from megatron_rlvr.weights.huggingface_folder import INDEX, read_index

_PACKAGES = ("torch", "megatron-core", "transformers", "numpy", "transformer-engine")
_NVIDIA_SMI_TIMEOUT_S = 20
# Importing torch and Transformer Engine from a shared file system for the first time takes minutes.
_DOCTOR_TIMEOUT_S = 240


class BadNodesError(Exception):
    """Some nodes must not train; the message is the reason.

    Attributes:
        nodes: names of the nodes.
    """

    def __init__(self, nodes: Sequence[str], reason: str):
        super().__init__(reason)
        self.nodes = list(nodes)


@dataclass
class NodeReport:
    """What a node reports about itself.

    Attributes:
        node: name of the node.
        versions: versions of packages, driver and sources, which must be the same on all nodes.
        gpus: name and memory (MiB) of each GPU, as nvidia-smi lists them.
        problems: why the node cannot train, one line each.
    """

    node: str
    versions: dict[str, str] = field(default_factory=dict)
    gpus: list[tuple[str, int]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check_node(node: str, config: Config, processes: int, trains: bool, folder: Path) -> NodeReport:
    """Check this node and write its report to ``NODE.json``, which also tests that the run directory is writable.

    Args:
        node: name of this node.
        processes: number of training processes per node.
        trains: whether this node trains. A node of SGLang servers needs no data.
        folder: folder of the reports in the run directory.
    """
    report = NodeReport(node, installed_versions())
    report.gpus = gpus_of_this_node(report)
    requested = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    needed = processes if trains else requested
    if (requested or report.gpus) and len(report.gpus) < needed:
        report.problems.append(f"the node has {len(report.gpus)} visible GPUs but needs {needed}")
    if trains and report.gpus:
        sglang = config.rollout.sglang
        report.problems += software_problems(NO_SERVERS if sglang.urls else sglang.python)
    models = [config.model.path]
    if trains and config.algorithm.kl_coefficient and config.reference.path is not None:
        models.append(config.reference.path)
    data = [*(source.path for source in config.data.sources()), config.data.heldout] if trains else []
    try:
        for file in [
            *(file for path in models for file in model_files(Path(path))),
            *(Path(name) for name in data if name and not is_gym(name)),
        ]:
            check_readable(file)
    except UserError as error:
        report.problems.append(str(error))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{node}.json").write_text(json.dumps(report.__dict__))
    except OSError as error:
        report.problems.append(f"the run directory cannot be written: {error.strerror} ({folder})")
    return report


def installed_versions() -> dict[str, str]:
    """Return versions of Python, of packages, and a digest of this package's sources and compiled operators."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for path in sorted(p for pattern in ("*.py", "*.so") for p in package.rglob(pattern)):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return versions | {"megatron_rlvr": digest.hexdigest()[:12]}


def gpus_of_this_node(report: NodeReport) -> list[tuple[str, int]]:
    """Return name and memory (MiB) of this node's GPUs, and add the driver's version and any problem to the report."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S)
    except FileNotFoundError:
        return []
    except subprocess.TimeoutExpired:
        report.problems.append(f"nvidia-smi did not answer in {_NVIDIA_SMI_TIMEOUT_S} s")
        return []
    if done.returncode:
        report.problems.append(f"nvidia-smi failed: {error_line(done.stdout + done.stderr) or 'it printed nothing'}")
        return []
    rows = [[cell.strip() for cell in line.rsplit(",", 2)] for line in done.stdout.splitlines() if line.strip()]
    for row in rows:  # it also prints errors, and [N/A] or [Unknown Error] in place of a number
        if len(row) != 3 or not row[1].isdecimal():
            report.problems.append(f"nvidia-smi does not report the memory of a GPU: {', '.join(row)}")
            return []
    report.versions["driver"] = ", ".join(sorted({row[2] for row in rows}))
    return [(row[0], int(row[1])) for row in rows]


def software_problems(servers_python: str | None) -> list[str]:
    """Return what `megatron_rlvr.doctor` finds that makes training on GPUs fail, one line each.

    It runs in a process of its own, because it uses a GPU, after which no fork of this process could use NCCL.

    Args:
        servers_python: as in `megatron_rlvr.doctor.examine`.
    """
    command = [sys.executable, "-m", "megatron_rlvr.doctor", "--for", "gpu", "--brief"]
    command += ["--servers-python", servers_python] if servers_python else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOCTOR_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return [f"`{' '.join(command)}` did not end in {_DOCTOR_TIMEOUT_S} s"]
    problems = done.stdout.splitlines()
    if done.returncode and not problems:
        problems = [f"megatron_rlvr.doctor failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"]
    return problems if done.returncode else []


def model_files(folder: Path) -> list[Path]:
    """Return config.json and every shard of the weights that the index of a model folder names."""
    index = folder / INDEX
    shards = read_index(index).values() if index.is_file() else ["model.safetensors"]
    return [folder / "config.json", *(folder / shard for shard in sorted(set(shards)))]


def check_readable(path: Path) -> None:
    """Read the first byte of a file. Raises UserError if it is empty or cannot be read."""
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{path} is empty")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
