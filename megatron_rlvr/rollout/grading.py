"""Decode completions to text and verify them."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from megatron_rlvr.data import Example
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.verifiers import Verdict, VerifierPool


class Grader:
    """Decodes completions and verifies them against the reference answers. Several threads may call `grade`."""

    def __init__(self, tokenization: Tokenization, verifiers: VerifierPool):
        self.tokenization, self.verifiers = tokenization, verifiers
        self._decoding = threading.Lock()  # tokenizers are not thread-safe

    def grade(
        self, examples: Sequence[Example], groups: Sequence[Sequence[Completion]]
    ) -> list[tuple[list[str], list[Verdict]]]:
        """Return the texts and verdicts of each group; ``groups[i]`` completes the prompt of ``examples[i]``.

        All groups are verified in one call, so that no worker is idle while another has several items left.

        Raises:
            UserError: if an answer has a form that the verifier cannot read.
        """
        with self._decoding:
            texts = self.tokenization.decode([completion for group in groups for completion in group])
        answers = [example.answer for example, group in zip(examples, groups, strict=True) for _ in group]
        verdicts = self.verifiers.verify(texts, answers)
        graded, start = [], 0
        for group in groups:
            end = start + len(group)
            graded.append((texts[start:end], verdicts[start:end]))
            start = end
        return graded
