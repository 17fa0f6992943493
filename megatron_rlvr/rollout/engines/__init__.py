"""Rollout engines: the local one, SGLang servers, and the replay of recorded rollouts."""
