"""Rollouts: engines that generate completions, their verification in groups, collection for training, evaluation."""
