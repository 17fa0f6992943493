"""Verifiable rewards: verifiers, and the pool of worker processes that runs them.

A verifier is a callable ``verifier(completion_text: str, answer) -> float``. This package does not import torch, so
worker processes start in a fraction of a second.
"""

from megatron_rlvr.verifiers.build import Verifier, build_verifier, check_answers
from megatron_rlvr.verifiers.pool import VerifierPool, build_pool
from megatron_rlvr.verifiers.verdict import Verdict

__all__ = ["Verdict", "Verifier", "VerifierPool", "build_pool", "build_verifier", "check_answers"]
