"""The tokenizer of a run: prompts to token ids, and completions to text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rlvr.data import Example
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError


class Tokenization:
    """The tokenizer of a Hugging Face folder, checked against the model.

    Args:
        model_path: Hugging Face folder of the model.
        vocab_size: vocabulary size of the model.
        context: longest sequence that the model supports, in tokens; None if unknown.

    Attributes:
        vocab_size, context: as given.
        stop_token_ids: tokens that end a completion, from the tokenizer and from ``generation_config.json``.
        padding: token id for padding. The loss ignores padding.

    Raises:
        UserError: if the folder has no tokenizer, or the tokenizer has more tokens than the model.
    """

    def __init__(self, model_path: str | Path, vocab_size: int, context: int | None = None):
        from transformers import AutoTokenizer

        folder = Path(model_path)
        self.context, self.vocab_size = context, vocab_size
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} has no tokenizer that can be loaded ({str(error).splitlines()[0]}): copy the files of the "
                "model's tokenizer there"
            ) from error
        # Without tokenizer files, transformers returns an empty tokenizer.
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
        """Return the ids of the end-of-sequence tokens and of the stop texts `texts`, sorted.

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
        """Return the token ids of a prompt; chat messages go through the tokenizer's chat template.

        Raises:
            UserError: if the prompt is a list of chat messages and the tokenizer has no chat template.
        """
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
        """Return the token ids of every prompt.

        Raises:
            UserError: for the first prompt that is empty, longer than `max_tokens`, or not fully representable.
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
            self._check_round_trip(examples[:64], encoded[:64])
        return encoded

    def _check_round_trip(self, examples: Sequence[Example], encoded: Sequence[Sequence[int]]) -> None:
        """Refuse a tokenizer that drops parts of the prompts, because training would silently use the rest.

        Differences in white space, case and Unicode form are allowed, because tokenizers may normalize them.
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
            UserError: for the first such prompt; names the configuration key `setting` that `response` comes from.
        """
        for example, ids in zip(examples, encoded, strict=True):
            if self.context is not None and len(ids) + response > self.context:
                raise UserError(
                    f"the prompt of example {example.index} of {example.source} has {len(ids)} tokens, and {setting}="
                    f"{response} makes more than the model's context of {self.context}: lower {setting}, remove the "
                    "example, or raise max_position_embeddings in the model's config.json if the model supports it"
                )

    def decode(self, completions: Sequence[Completion]) -> list[str]:
        """Return the text of each completion, without special tokens.

        Raises:
            UserError: for a token id that the model does not have; the embedding would read beyond its weights.
        """
        largest = max((max(completion.token_ids) for completion in completions), default=0)
        if largest >= self.vocab_size:
            raise UserError(
                f"a completion has token id {largest}, but the model's vocabulary ends at {self.vocab_size - 1}: the "
                "server or recording belongs to another model; use one of the model in model.path"
            )
        return self.tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)


def _end_of_sequence_tokens(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids of the tokens that end a sequence according to the tokenizer or ``generation_config.json``."""
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
