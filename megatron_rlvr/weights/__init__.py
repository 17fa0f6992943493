"""Model weights on disk and in transit: Hugging Face folders, conversion to and from Megatron checkpoints, buckets.

It depends on `megatron_rlvr.megatron`, whose `PolicyBridge` builds the models and maps their weights.
"""
