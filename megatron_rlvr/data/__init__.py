"""Prompt data sets, the prompts that each step draws, and rollouts as tensors."""

from megatron_rlvr.data.examples import Example, load_examples
from megatron_rlvr.data.mixture import MixtureSampler
from megatron_rlvr.data.sampler import PromptSampler, Sampler

__all__ = ["Example", "MixtureSampler", "PromptSampler", "Sampler", "load_examples"]
