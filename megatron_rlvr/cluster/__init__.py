"""What a Slurm job runs around the trainer: the check before training, the launcher of a node, the SGLang servers."""

from megatron_rlvr.node import node_name

__all__ = ["node_name"]
