"""One sampled response, as a rollout engine returns it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_rlvr.checked_input import InvalidInputError, checked, describe
from megatron_rlvr.data.kept_tokens import KeptTokens, checked_kept_tokens
from megatron_rlvr.data.routes import Routes


@dataclass(frozen=True)
class Completion:
    """One sampled response.

    Attributes:
        token_ids: token ids of the response, including the stop token.
        logprobs: log-prob (natural logarithm) of each token at the sampling temperature, under the distribution from
            which it was drawn: that of its kept set if there is one.
        finish_reason: ``stop`` after a stop token, ``length`` at the maximum length.
        weight_version: version of the weights that generated the last token: the number of training steps before them.
        version_spans: (version, number of tokens) in the order of the tokens if the weights changed during generation;
            otherwise empty.
        kept: the kept set of each token; None if tokens were drawn from the whole vocabulary.
        routes: the experts of all tokens of prompt and response but the last; None unless they were requested.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    weight_version: int
    version_spans: tuple[tuple[int, int], ...] = ()
    kept: KeptTokens | None = None
    routes: Routes | None = None

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """(version, number of tokens) in the order of the tokens, also if the weights did not change."""
        return self.version_spans or ((self.weight_version, len(self.token_ids)),)

    @property
    def oldest_version(self) -> int:
        """Version of the weights that generated the first token."""
        return self.version_spans[0][0] if self.version_spans else self.weight_version


LARGEST_TOKEN_ID = 2**31 - 1
LOWEST_LOGPROB = -1e4
"""Far below the log-prob of any token that was sampled."""
ROUNDING = 1e-3
"""A server computes log-probs in reduced precision, so that they may be a little above 0."""


def checked_completion(
    token_ids: Any,
    logprobs: Any,
    finish_reason: Any,
    weight_version: int,
    spans: Any,
    *,
    max_tokens: int,
    kept: Any = None,
    routes: Routes | None = None,
) -> Completion:
    """Build a completion from values that a server sent or a file holds.

    Args:
        token_ids, logprobs, finish_reason, weight_version: see `Completion`.
        spans: pairs (version, number of tokens); empty if the weights did not change during generation.
        max_tokens: maximum length of a completion.
        kept: one list of token ids per token, from which it was drawn; None if that is the whole vocabulary.
        routes: checked routes of the sequence (`decoded_routes`); None if there are none.

    Raises:
        InvalidInputError: if there are no or too many tokens, not one log-prob for each, a token id or log-prob that is
            impossible, an unknown finish reason, spans of another number of tokens, or a token that is not in its kept
            set.
    """
    tokens = checked(token_ids, list, "token_ids")
    if not 0 < len(tokens) <= max_tokens:
        raise InvalidInputError(f"{len(tokens)} tokens instead of 1 to {max_tokens}")
    if not set(map(type, tokens)) <= {int} or min(tokens) < 0 or max(tokens) > LARGEST_TOKEN_ID:
        wrong = next(t for t in tokens if type(t) is not int or not 0 <= t <= LARGEST_TOKEN_ID)
        raise InvalidInputError(f"the token id {describe(wrong)}")
    values = checked(logprobs, list, "logprobs")
    if len(values) != len(tokens):
        raise InvalidInputError(f"{len(tokens)} tokens with log-probs of {len(values)}")
    floats = [checked(value, float, "logprob", at_least=LOWEST_LOGPROB, at_most=ROUNDING) for value in values]
    if finish_reason not in ("stop", "length"):
        raise InvalidInputError(f"the finish reason {describe(finish_reason)}")
    pairs = tuple((version, length) for version, length in spans)
    if pairs and sum(length for _, length in pairs) != len(tokens):
        raise InvalidInputError(f"{len(tokens)} tokens with weight versions of another number of tokens: {pairs}")
    sets = None if kept is None else checked_kept_tokens(kept, tokens, largest_id=LARGEST_TOKEN_ID)
    return Completion(tokens, floats, finish_reason, weight_version, pairs, sets, routes)
