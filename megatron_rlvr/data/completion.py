"""One sampled response, as a rollout engine returns it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Attributes:
        token_ids: of the response, stop token included.
        logprobs: natural logarithms of their probabilities under the sampling temperature.
        finish_reason: ``stop`` after a stop token, ``length`` at the maximum length.
        weight_version: version of the weights that generated the last token: the number of training steps before them.
        version_spans: (version, tokens) from the first token to the last, if the weights changed during generation;
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
