"""What a trainer process imports before it trains, imported once for all processes of `tests.forked`."""

import gc

import torch._dynamo  # imported by the first optimizer
from transformers import AutoConfig  # whose import lists the folders of all models

import megatron_rlvr.train

IMPORTED = (megatron_rlvr.train, torch._dynamo, AutoConfig)
gc.freeze()  # a garbage collection of a process that is forked from this one would copy its memory
