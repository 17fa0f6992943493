"""Rollout engines: generation in the training processes, on SGLang servers, or replayed from a recording."""
