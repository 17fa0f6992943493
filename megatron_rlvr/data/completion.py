"""One sampled response, as a rollout engine returns it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Attributes:
        token_ids: token ids of the response, including the stop token.
        logprobs: log-prob (natural logarithm) of each token at the sampling temperature.
        finish_reason: ``stop`` after a stop token, ``length`` at the maximum length.
        weight_version: version of the weights that generated the last token: the number of training steps before them.
        version_spans: (version, number of tokens) in the order of the tokens if the weights changed during generation;
            otherwise empty.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    weight_version: int
    version_spans: tuple[tuple[int, int], ...] = ()

    @property
    def oldest_version(self) -> int:
        """Version of the weights that generated the first token."""
        return self.version_spans[0][0] if self.version_spans else self.weight_version
