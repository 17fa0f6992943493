"""What the job scripts of examples/slurm request: nodes, servers, and the configuration with the overrides they add."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.processes import ROOT

FOLDER = ROOT / "examples" / "slurm"


@dataclass(frozen=True)
class JobScript:
    """A script that trains.

    Attributes:
        nodes: nodes of the job, with those that only serve.
        gpus: GPUs per node; 0 if the script requests none.
        servers: RLVR_SERVERS by default.
        config: the configuration.
        overrides: what the script adds to it.
    """

    path: Path
    nodes: int
    gpus: int
    servers: str
    config: Path
    overrides: list[str]

    @property
    def training_nodes(self) -> int:
        return self.nodes - int(self.servers.partition(":")[2] or 0)


def read_script(path: Path) -> JobScript | None:
    """Return what a script requests; None if it does not train a configuration that it names."""
    text = path.read_text()
    command = re.search(r"^train (?:\\\n|.)*", text, re.MULTILINE)
    words = shlex.split(command[0].replace("\\\n", " "))[1:] if command else []
    if not words or not words[0].endswith(".yaml"):
        return None

    def requested(option: str) -> int:
        found = re.search(rf"^#SBATCH --{option}=(\d+)", text, re.MULTILINE)
        return int(found[1]) if found else 0

    servers = re.search(r'"\$\{RLVR_SERVERS:=(\S+)\}"', text)
    overrides = [word for word in words[1:] if re.match(r"[a-z_.]+=", word) and "$" not in word]
    return JobScript(
        path,
        requested("nodes"),
        requested("gpus-per-node"),
        servers[1] if servers else "none",
        ROOT / words[0],
        overrides,
    )


SCRIPTS = [script for path in sorted(FOLDER.glob("*.sbatch")) if (script := read_script(path)) is not None]
