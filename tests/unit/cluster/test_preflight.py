"""The whole preflight on one machine: nodes are processes, with the names that Slurm would give them."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import reserved_port
from tests.processes import ROOT, environment

# megatron-core binds a GPU when it is imported, after which no fork of this process could use NCCL.
PROGRAM = """
import sys
from megatron_rlvr.cluster.preflight import main
status = main(sys.argv[1:])
assert "megatron.core" not in sys.modules, "the plan was not made in a process of its own"
sys.exit(status)
"""


@pytest.fixture
def port() -> Iterator[int]:
    with reserved_port() as port:
        yield port


def start(
    node: str, nodes: str, port: int, report: Path, *training: object, python_path: object = ROOT
) -> subprocess.Popen[str]:
    options = [f"--nodes={nodes}", f"--endpoint=localhost:{port}", f"--train-nodes={nodes.count(',') + 1}"]
    options += ["--processes-per-node=1", "--seconds=800", f"--report={report}", "--", *map(str, training)]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *options],
        env=environment() | {"SLURMD_NODENAME": node, "PYTHONPATH": str(python_path)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_good_nodes(run_yaml: Path, port: int, tmp_path: Path) -> None:
    report = tmp_path / "run" / "report"
    processes = [start(node, "n1,n2", port, report, run_yaml) for node in ("n1", "n2")]
    output, other = (process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], output + other
    assert "preflight: 2 nodes agree on python 3." in output
    assert "preflight: layout: 2 data-parallel ranks on 2 x 1 processes, no GPUs" in output
    assert "preflight: all-reduce over 2 x 1 processes: 4 MiB in " in output
    assert (report / "verdict").read_text() == "0 all nodes passed\n"
    assert (report / "bad_nodes").read_text() == ""
    assert {file.name for file in report.glob("*.json")} == {"n1.json", "n2.json"}


def test_a_layout_that_does_not_divide_the_job_is_refused_by_the_plan(
    run_yaml: Path, port: int, tmp_path: Path
) -> None:
    process = start("n1", "n1", port, tmp_path / "report", run_yaml, "parallel.tensor=2")
    output = process.communicate()[0]
    assert process.returncode == 2, output
    assert (tmp_path / "report" / "verdict").read_text().startswith("2 parallel.tensor x ")


def test_a_port_that_is_taken_asks_for_another_attempt(run_yaml: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start("n1", "n1", port, tmp_path / "report", run_yaml)
        output = process.communicate()[0]
    assert process.returncode == 1, output
    expected = f"1 port {port} of 127.0.0.1 cannot be used (Address already in use)\n"
    assert (tmp_path / "report" / "verdict").read_text() == expected


def test_a_node_with_another_version_is_bad(run_yaml: Path, port: int, tmp_path: Path) -> None:
    patched = tmp_path / "patched"
    patched.mkdir()
    (patched / "sitecustomize.py").write_text("import platform; platform.python_version = lambda: '3.99'")
    report = tmp_path / "report"
    processes = [start(node, "n1,n2,n3", port, report, run_yaml) for node in ("n1", "n2")]
    processes.append(start("n3", "n1,n2,n3", port, report, run_yaml, python_path=f"{patched}:{ROOT}"))
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [69, 0, 0], outputs
    assert (report / "bad_nodes").read_text() == "n3\n"
    assert (report / "verdict").read_text().startswith("69 n3: python 3.99 instead of 3.")
