"""RLVR on Megatron-Core with precise control of policy entropy (arXiv 2602.09782).

``megatron_rlvr.ops`` and ``megatron_rlvr.control`` depend on torch alone, so that other trainers can use them.
"""

__version__ = "0.1.0"
