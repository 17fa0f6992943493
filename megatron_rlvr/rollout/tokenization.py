"""The tokenizer of a run: prompts to token ids, and completions to text."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rlvr.checked_input import one_line
from megatron_rlvr.data import Example
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError, truncated
from megatron_rlvr.rollout.tokenizer_folder import end_of_sequence_tokens, load_tokenizer


def exceeds_context(prompt: int, response: int, positions: int) -> bool:
    """Whether a prompt and its response, in tokens, can exceed the positions of the model."""
    return prompt + response > positions


class Tokenization:
    """The tokenizer of a Hugging Face folder, checked against the model.

    Args:
        model_path: Hugging Face folder of the model.
        vocab_size: vocabulary size of the model.
        context: longest sequence that the model supports, in tokens; None if unknown.

    Attributes:
        vocab_size, context: as given.
        stop_token_ids: tokens that end a completion, see `end_of_sequence_tokens`.
        padding: token id for padding. The loss ignores padding.

    Raises:
        UserError: if the folder has no tokenizer, or the tokenizer has more tokens than the model.
    """

    def __init__(self, model_path: str | Path, vocab_size: int, context: int | None = None):
        folder = Path(model_path)
        self.context, self.vocab_size = context, vocab_size
        self.tokenizer = load_tokenizer(folder)
        largest = max(self.tokenizer.get_vocab().values(), default=-1)
        if largest >= vocab_size:
            raise UserError(
                f"{folder}: the tokenizer has token id {largest} but the model's vocabulary ends at {vocab_size - 1}: "
                "the folder's tokenizer belongs to another model"
            )
        self.stop_token_ids = end_of_sequence_tokens(folder, self.tokenizer, vocab_size)
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

        A last message of the assistant is the beginning of the completion, which continues it. A text that already
        begins with the beginning-of-sequence token, because a chat template was applied to it, gets no second one.

        Raises:
            UserError: if the prompt cannot be encoded, for example because the tokenizer has no chat template.
        """
        where = f"example {example.index} of {example.source}"
        if not isinstance(example.prompt, str) and not self.tokenizer.chat_template:
            raise UserError(
                f"{where} is a list of chat messages, but the tokenizer has no chat template: use an instruct model, "
                "or prompts that are plain text"
            )
        try:
            ids = self._encode_text(example.prompt) if isinstance(example.prompt, str) else self._chat(example.prompt)
        except Exception as error:  # a chat template can raise anything
            raise UserError(f"{where} cannot be encoded ({one_line(error)}): correct or remove it") from error
        if ids and ids[-1] in self.stop_token_ids and not self._ends_with_stop(example.prompt):
            raise UserError(
                f"the tokenizer ends the prompt of {where} with an end-of-sequence token, so the model would begin "
                "a new text instead of a completion: set add_eos_token to false in tokenizer_config.json, or correct "
                "the chat template"
            )
        return ids

    def _encode_text(self, text: str) -> list[int]:
        starts = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        ids = self.tokenizer(text)["input_ids"]
        return ids[1:] if starts and ids[:2] == [self.tokenizer.bos_token_id] * 2 else ids

    def _chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        continued = messages[-1]["role"] == "assistant"
        if continued and not messages[-1]["content"].strip():  # there is nothing to continue, so the template begins it
            messages, continued = messages[:-1], False
        encoded = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=not continued, continue_final_message=continued, return_dict=True
        )
        return encoded["input_ids"]

    def _ends_with_stop(self, prompt: str | Sequence[Mapping[str, str]]) -> bool:
        """Whether the prompt itself, not the tokenizer, ends with an end-of-sequence token."""
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        return text.rstrip().endswith(tuple(self.tokenizer.convert_ids_to_tokens(list(self.stop_token_ids))))

    def encode_all(self, examples: Sequence[Example], max_tokens: int) -> list[list[int]]:
        """Return the token ids of every prompt.

        Raises:
            UserError: for the first prompt that is empty, longer than `max_tokens`, or not fully representable.
        """
        encoded = [self.encode(example) for example in examples]
        for example, ids in zip(examples, encoded, strict=True):
            if not 0 < len(ids) <= max_tokens:
                raise UserError(
                    f"the prompt of example {example.index} of {example.source} has {len(ids)} tokens; it must have 1 "
                    f"to data.max_prompt_tokens={max_tokens}: raise that, or remove the example"
                )
        if all(isinstance(example.prompt, str) for example in examples):
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
                    f"{_short(str(example.prompt))}, as {_short(decoded)}: it lacks tokens for the rest; use data in "
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
            if self.context is not None and exceeds_context(len(ids), response, self.context):
                raise UserError(
                    f"the prompt of example {example.index} of {example.source} has {len(ids)} tokens, which "
                    f"with {setting}={response} exceed the model's context of {self.context}: lower {setting}, remove "
                    "the example, or raise max_position_embeddings in the model's config.json if the model supports it"
                )

    def text(self, token_ids: Sequence[int]) -> str:
        """Return tokens as text, special ones included."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False))

    def decode(self, completions: Sequence[Completion]) -> list[str]:
        """Return the text of each completion, without special tokens.

        Raises:
            UserError: for a token id that the model does not have; the embedding would read beyond its weights.
        """
        largest = max((max(completion.token_ids) for completion in completions), default=0)
        largest = max([largest, *(int(c.kept.ids.max()) for c in completions if c.kept is not None)])
        if largest >= self.vocab_size:
            raise UserError(
                f"a completion has, or was drawn from, token id {largest}, but the model's vocabulary "
                f"ends at {self.vocab_size - 1}: the "
                "server or recording belongs to another model; use one that was made with model.path"
            )
        return self.tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)


def _normalized(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _short(text: str) -> str:
    return repr(truncated(text, 60))
