"""A prompt data set as token ids, checked before anything is generated."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlvr.data import Example, load_examples
from megatron_rlvr.data.config import DataConfig
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.verifiers import VerifierPool, check_answers


@dataclass(frozen=True)
class PromptSet:
    """The examples of a data set, and the token ids of their prompts in the same order."""

    examples: list[Example]
    token_ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.examples)


def load_prompts(
    path: str,
    config: DataConfig,
    tokenization: Tokenization,
    verifiers: VerifierPool,
    max_response: tuple[str, int],
    *,
    limit: int | None = None,
    stratify_key: str | None = None,
) -> PromptSet:
    """Read a data set and check that every prompt can be tokenized, answered within the context, and verified.

    Args:
        path: JSONL or parquet file.
        config: section ``data``, for the names of the fields and the maximum length of prompts.
        tokenization: tokenizer of the model.
        verifiers: pool whose verifier must be able to read the answers.
        max_response: the configuration key that limits the length of responses, and its value in tokens.
        limit: read only this many examples.
        stratify_key: field with the number by which training prompts are stratified.

    Raises:
        UserError: for the first example that cannot be used; names the file and the example.
    """
    prompt_key = {} if config.prompt_key is None else {"prompt_key": config.prompt_key}
    examples = load_examples(path, answer_key=config.answer_key, stratify_key=stratify_key, limit=limit, **prompt_key)
    check_answers(verifiers.verifier, [example.answer for example in examples], path)
    token_ids = tokenization.encode_all(examples, config.max_prompt_tokens)
    key, tokens = max_response
    tokenization.check_context(examples, token_ids, tokens, key)
    return PromptSet(examples, token_ids)
