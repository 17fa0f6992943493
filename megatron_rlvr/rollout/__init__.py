"""Prompts in, verified completions out: rollout engines, groups, collection for training, evaluation."""
