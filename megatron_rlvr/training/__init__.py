"""The policy in training: scoring, loss, updates, metrics, checkpoints."""
