"""What a Slurm job runs around the trainer: the check before training, the launcher of a node, the SGLang servers."""
