"""What a Slurm job runs around the trainer: the check before training, the launcher of a node, the SGLang servers."""

import os


def node_name() -> str:
    """Return the name of this node in Slurm."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename
