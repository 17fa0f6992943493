"""What a training step does with the policy: scoring, loss, update, metrics, checkpoints."""
