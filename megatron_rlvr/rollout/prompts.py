"""A prompt data set as token ids, checked before anything is generated."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlvr.data import Example, load_examples
from megatron_rlvr.data.config import DataConfig
from megatron_rlvr.rollout.config import EvaluationConfig, RolloutConfig
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.verifiers import VerifierPool, check_answers


@dataclass(frozen=True)
class PromptSet:
    """The examples of a data set, and the token ids of their prompts in the same order."""

    examples: list[Example]
    token_ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def strata(self) -> list[float] | None:
        """The number of each example by which prompts are stratified; None if they are not stratified."""
        strata = [example.stratum for example in self.examples if example.stratum is not None]
        return strata if len(strata) == len(self.examples) else None


def load_prompts(
    data: DataConfig,
    rollout: RolloutConfig,
    tokenization: Tokenization,
    verifiers: VerifierPool,
    *,
    evaluation: EvaluationConfig | None = None,
) -> PromptSet:
    """Read the training data and check that every prompt can be tokenized, answered within the context, and verified.

    Args:
        data, rollout: sections of the configuration.
        tokenization: tokenizer of the model.
        verifiers: pool whose verifier must be able to read the answers.
        evaluation: section ``evaluation``. With it, the held-out prompts of an evaluation are read instead.

    Raises:
        UserError: for the first example that cannot be used; names the file and the example.
    """
    if evaluation is None:
        path, stratify_key, limit = data.train, data.stratify_key, None
    else:
        assert data.heldout is not None
        path, stratify_key, limit = data.heldout, None, evaluation.prompts
    examples = load_examples(
        path, prompt_key=data.prompt_key, answer_key=data.answer_key, stratify_key=stratify_key, limit=limit
    )
    check_answers(verifiers.verifier, [example.answer for example in examples], path)
    token_ids = tokenization.encode_all(examples, data.max_prompt_tokens)
    if evaluation is None or evaluation.max_tokens is None:
        tokenization.check_context(examples, token_ids, rollout.max_tokens, "rollout.max_tokens")
    else:
        tokenization.check_context(examples, token_ids, evaluation.max_tokens, "evaluation.max_tokens")
    return PromptSet(examples, token_ids)
