"""The tokenizer of a run: prompts to token ids, completions to text. Between the two there are only token ids."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rlvr.data import Example
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError


class Tokenization:
    """The tokenizer of a model's folder, checked against the model.

    Args:
        model_path: Hugging Face folder.
        vocab_size: of the model.
        context: the longest sequence that the model supports; None if unknown.

    Attributes:
        stop_token_ids: end a completion; from the tokenizer and the generation configuration.
        padding: token id for padding, which the loss never sees.

    Raises:
        UserError: when the folder has no tokenizer, or one with more tokens than the model has.
    """

    def __init__(self, model_path: str | Path, vocab_size: int, context: int | None = None):
        from transformers import AutoTokenizer

        folder = Path(model_path)
        self.context = context
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} has no tokenizer that can be loaded ({str(error).splitlines()[0]})") from error
        # transformers makes up an empty tokenizer where there are no files.
        if not list(folder.glob("tokenizer*")) or len(self.tokenizer) < 2:
            raise UserError(f"{folder} has no tokenizer: save it there with tokenizer.save_pretrained({str(folder)!r})")
        largest = max(self.tokenizer.get_vocab().values(), default=-1)
        if largest >= vocab_size:
            raise UserError(
                f"{folder}: the tokenizer has token id {largest} but the model's vocabulary ends at {vocab_size - 1}: "
                "the folder's tokenizer belongs to another model"
            )
        self.stop_token_ids = _end_of_sequence_tokens(folder, self.tokenizer)
        pad = self.tokenizer.pad_token_id
        self.padding: int = self.stop_token_ids[0] if pad is None else pad

    def stops(self, texts: Sequence[str]) -> tuple[int, ...]:
        """The end-of-sequence tokens and those of `texts`.

        Raises:
            UserError: for a text that is not a single token.
        """
        stops = set(self.stop_token_ids)
        for text in texts:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            if len(ids) != 1:
                raise UserError(
                    f"rollout.stop: {text!r} is {len(ids)} tokens of this tokenizer, but a completion ends with one "
                    "token: give a text that is a single token"
                )
            stops.add(ids[0])
        return tuple(sorted(stops))

    def encode(self, example: Example) -> list[int]:
        """Token ids of a prompt; chat messages go through the tokenizer's chat template."""
        if isinstance(example.prompt, str):
            return self.tokenizer(example.prompt)["input_ids"]
        if not self.tokenizer.chat_template:
            raise UserError(
                f"example {example.index} of {example.source} is a list of chat messages, but the tokenizer has no "
                "chat template: use an instruct model, or prompts that are plain text"
            )
        encoded = self.tokenizer.apply_chat_template(example.prompt, add_generation_prompt=True, return_dict=True)
        return encoded["input_ids"]

    def encode_all(self, examples: Sequence[Example], max_tokens: int) -> list[list[int]]:
        """Token ids of every prompt.

        Raises:
            UserError: naming the first prompt that is empty, is longer than `max_tokens`, or loses text.
        """
        texts = [e.prompt for e in examples]
        all_plain = all(isinstance(t, str) for t in texts)
        encoded = self.tokenizer(texts)["input_ids"] if all_plain else [self.encode(e) for e in examples]
        for example, ids in zip(examples, encoded, strict=True):
            if not 0 < len(ids) <= max_tokens:
                raise UserError(
                    f"the prompt of example {example.index} of {example.source} has {len(ids)} tokens; it must have 1 "
                    f"to data.max_prompt_tokens={max_tokens}: raise that, or remove the example"
                )
        if all_plain:
            self._check_that_no_text_is_lost(examples[:64], encoded[:64])
        return encoded

    def _check_that_no_text_is_lost(self, examples: Sequence[Example], encoded: Sequence[Sequence[int]]) -> None:
        """Refuse a tokenizer that drops text, as that of another model may do: training would use what is left.

        Tokenizers may normalize white space, case and the Unicode form.
        """
        for example, decoded in zip(examples, self.tokenizer.batch_decode(encoded), strict=True):
            if _normalized(str(example.prompt)) not in _normalized(decoded):
                raise UserError(
                    f"the tokenizer reads the prompt of example {example.index} of {example.source}, "
                    f"{_short(str(example.prompt))}, as {_short(decoded)}: it has no tokens for the rest; use data in "
                    "the model's language"
                )

    def check_context(
        self, examples: Sequence[Example], encoded: Sequence[Sequence[int]], response: int, setting: str
    ) -> None:
        """Refuse prompts that leave no room in the model's context for `response` tokens.

        Raises:
            UserError: naming the first such prompt, and the `setting` that `response` comes from.
        """
        for example, ids in zip(examples, encoded, strict=True):
            if self.context is not None and len(ids) + response > self.context:
                raise UserError(
                    f"the prompt of example {example.index} of {example.source} has {len(ids)} tokens, and {setting}="
                    f"{response} makes more than the model's context of {self.context}: lower {setting}, remove the "
                    "example, or raise max_position_embeddings in the model's config.json if the model supports it"
                )

    def decode(self, completions: Sequence[Completion]) -> list[str]:
        """The text of completions, without special tokens."""
        return self.tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)


def _end_of_sequence_tokens(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Token ids that end a sequence according to the tokenizer or to ``generation_config.json``."""
    from transformers import GenerationConfig

    stops = {tokenizer.eos_token_id}
    if (folder / "generation_config.json").is_file():
        try:
            configured = GenerationConfig.from_pretrained(folder).eos_token_id
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder}/generation_config.json cannot be read: {error}") from error
        stops |= set(configured) if isinstance(configured, list) else {configured}
    ids = tuple(sorted(s for s in stops if s is not None))
    if not ids:
        raise UserError(f"{folder}: neither the tokenizer nor generation_config.json names an end-of-sequence token")
    return ids


def _normalized(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
