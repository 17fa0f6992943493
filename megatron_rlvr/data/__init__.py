"""Prompt data sets and the order in which they are drawn."""

from megatron_rlvr.data.examples import Example, load_examples
from megatron_rlvr.data.sampler import PromptSampler

__all__ = ["Example", "PromptSampler", "load_examples"]
