"""Weights at rest and in transit: Hugging Face folders, conversion, checkpoints, buckets."""
