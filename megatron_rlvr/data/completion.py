"""One sampled response: what a rollout engine returns and training reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Attributes:
        token_ids: response tokens, the stop token included.
        logprobs: their log-probabilities (natural logarithm) under the sampling temperature.
        finish_reason: ``stop`` or ``length``.
        weight_version: optimizer state that generated its last token: the step whose weights the engine held.
        version_spans: (version, tokens) from the first token to the last, where weights changed on the way; else empty.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    weight_version: int
    version_spans: tuple[tuple[int, int], ...] = ()

    @property
    def oldest_version(self) -> int:
        """The version that generated its first token."""
        return self.version_spans[0][0] if self.version_spans else self.weight_version
