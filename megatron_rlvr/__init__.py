"""RLVR on Megatron-Core with precise control of policy entropy (arXiv 2602.09782).

``megatron_rlvr.ops`` and ``megatron_rlvr.control`` stand on torch alone, to be used from other trainers too.
"""

__version__ = "0.1.0"
