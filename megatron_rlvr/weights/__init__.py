"""Model weights on disk and in transit: Hugging Face folders, conversion to and from Megatron checkpoints, buckets.

This package stands above `megatron_rlvr.megatron`: it moves the weights of models that the bridge there builds.
"""
