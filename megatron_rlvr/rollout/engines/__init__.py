"""Rollout engines: the local one, SGLang servers, and replay of recorded rollouts."""
