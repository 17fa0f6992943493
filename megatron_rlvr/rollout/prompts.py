"""A prompt data set as token ids, checked before anything is generated."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlvr.data import Example, load_examples
from megatron_rlvr.data.config import DataConfig
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.verifiers import VerifierPool, check_answers


@dataclass(frozen=True)
class PromptSet:
    """Examples, and the token ids of their prompts."""

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
        config: names the fields of prompt and answer, and limits the length of prompts.
        tokenization, verifiers: of the run.
        max_response: the maximum length of a response in tokens, after the configuration key that sets it.
        limit: read only this many examples.
        stratify_key: field with the number by which training prompts are stratified.

    Raises:
        UserError: naming the file and the first example that fails.
    """
    prompt_key = {} if config.prompt_key is None else {"prompt_key": config.prompt_key}
    examples = load_examples(path, answer_key=config.answer_key, stratify_key=stratify_key, limit=limit, **prompt_key)
    check_answers(verifiers.verifier, [example.answer for example in examples], path)
    token_ids = tokenization.encode_all(examples, config.max_prompt_tokens)
    key, tokens = max_response
    tokenization.check_context(examples, token_ids, tokens, key)
    return PromptSet(examples, token_ids)
