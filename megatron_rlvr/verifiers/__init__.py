"""Rewards that can be checked: verifiers, and the pool that runs them.

A verifier is a callable ``verifier(completion_text: str, answer) -> float``. Nothing here imports torch, so that a
worker process starts in a fraction of a second.
"""

from megatron_rlvr.verifiers.build import Verifier, build_pool, build_verifier, check_answers
from megatron_rlvr.verifiers.pool import Verdict, VerifierPool

__all__ = ["Verdict", "Verifier", "VerifierPool", "build_pool", "build_verifier", "check_answers"]
