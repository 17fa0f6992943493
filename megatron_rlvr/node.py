"""The name of this machine."""

import os


def node_name() -> str:
    """Return the name of this node in Slurm, or its host name outside a Slurm job."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename
