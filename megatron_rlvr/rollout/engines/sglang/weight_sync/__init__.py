"""Giving the policy's weights to running SGLang servers."""
