"""A prompt data set as token ids, checked before anything is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_rlvr.data import Example, MixtureSampler, PromptSampler, Sampler, load_examples
from megatron_rlvr.data.config import DataConfig, is_gym
from megatron_rlvr.data.gym_problems import load_gym_examples
from megatron_rlvr.rollout.config import EvaluationConfig, RolloutConfig
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.verifiers import VerifierPool, check_answers


@dataclass(frozen=True)
class PromptSet:
    """The examples of a data set, and the token ids of their prompts in the same order.

    Attributes:
        examples: of one file, or of several files in their order.
        token_ids: of the prompt of each example.
        sources: name of each file, if there are several with weights; otherwise empty.
        sizes: number of examples of each of them.
    """

    examples: list[Example]
    token_ids: list[list[int]]
    sources: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def strata(self) -> list[float] | None:
        """The number of each example by which prompts are stratified; None if they are not stratified.

        Of several files, each is at least one stratum, and its numbers are above those of the files before it.
        """
        strata = [example.stratum for example in self.examples if example.stratum is not None]
        if len(strata) != len(self.examples):
            strata = [0.0] * len(self.examples)
            if not self.sources:
                return None
        if not self.sources:
            return strata
        order = np.lexsort((np.asarray(strata), np.repeat(np.arange(len(self.sizes)), self.sizes)))
        places = np.empty(len(order))
        places[order] = np.arange(len(order))
        return places.tolist()

    def sampler(self, weights: Sequence[float], prompts_per_step: int, seed: int) -> Sampler:
        """Return what draws the prompts of a step.

        Args:
            weights: of the files, if there are several.
            prompts_per_step: prompts that a step draws, over all data-parallel ranks.
            seed: seed of the run.

        Raises:
            UserError: if a step needs more prompts than there are.
        """
        stratified = all(example.stratum is not None for example in self.examples)
        if not self.sources:
            return PromptSampler(len(self), prompts_per_step, seed, self.strata)
        names = [f"the source {name} of data.train" for name in self.sources]
        strata = self.strata if stratified else None
        return MixtureSampler(self.sizes, weights, names, prompts_per_step, seed, strata)


def load_training_prompts(
    data: DataConfig, rollout: RolloutConfig, tokenization: Tokenization, verifiers: VerifierPool
) -> PromptSet:
    """Read the training data and check that every prompt can be tokenized, answered within the context, and verified.

    Args:
        data, rollout: sections of the configuration.
        tokenization: tokenizer of the model.
        verifiers: pool whose verifier must be able to read the answers.

    Raises:
        UserError: for the first example that cannot be used; names the file and the example.
    """
    loaded = [
        _checked(
            _load(source.path, data),
            source.path,
            data.max_prompt_tokens,
            tokenization,
            verifiers,
            (rollout.max_tokens, "rollout.max_tokens"),
        )
        for source in data.sources()
    ]
    if isinstance(data.train, str):
        return loaded[0]
    examples = [example for prompts in loaded for example in prompts.examples]
    return PromptSet(
        # Samples name an example by its index, which was the one in its file so far, for errors.
        [replace(example, index=index) for index, example in enumerate(examples)],
        [ids for prompts in loaded for ids in prompts.token_ids],
        tuple(source.label for source in data.train),
        tuple(len(prompts) for prompts in loaded),
    )


def load_heldout_prompts(
    data: DataConfig,
    rollout: RolloutConfig,
    evaluation: EvaluationConfig,
    tokenization: Tokenization,
    verifiers: VerifierPool,
) -> PromptSet:
    """Read the held-out prompts of an evaluation, with the checks of `load_training_prompts`."""
    assert data.heldout is not None
    examples = _load(data.heldout, data, heldout=evaluation.prompts)
    response = (rollout.max_tokens, "rollout.max_tokens")
    if evaluation.max_tokens is not None:
        response = (evaluation.max_tokens, "evaluation.max_tokens")
    return _checked(examples, data.heldout, data.max_prompt_tokens, tokenization, verifiers, response)


def _load(path: str, data: DataConfig, heldout: int | None = None) -> list[Example]:
    """Read or generate training problems or, with `heldout`, that many held-out problems."""
    stratify_key = data.stratify_key if heldout is None else None
    if is_gym(path):
        return load_gym_examples(path, data.reasoning_gym, stratify_key=stratify_key, heldout=heldout)
    return load_examples(
        path, prompt_key=data.prompt_key, answer_key=data.answer_key, stratify_key=stratify_key, limit=heldout
    )


def _checked(
    examples: list[Example],
    path: str,
    max_prompt_tokens: int,
    tokenization: Tokenization,
    verifiers: VerifierPool,
    response: tuple[int, str],
) -> PromptSet:
    """Tokenize the examples of a file, and check that each can be answered within the context and verified.

    Args:
        response: largest number of tokens of a response, and the key that sets it.
    """
    check_answers(verifiers.verifier, [example.answer for example in examples], path)
    token_ids = tokenization.encode_all(examples, max_prompt_tokens)
    tokenization.check_context(examples, token_ids, *response)
    return PromptSet(examples, token_ids)
