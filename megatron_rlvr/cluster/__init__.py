"""What a run needs on a cluster around the trainer: the launcher of a node, the check before training, the servers."""
