"""Prompts with their reference answers, read from JSONL or parquet."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlvr.checked_input import DEPTH, InvalidInputError, describe, float_or_inf, one_line, parse_json
from megatron_rlvr.errors import UserError, truncated

# Keys of the reference answer, tried in this order if the configuration names none: the plain format, slime's JSONL and
# verl's parquet. A dot reaches into a nested object.
ANSWER_KEYS = ("answer", "label", "reward_model.ground_truth")
# Likewise keys of the prompt. Of chat data under "messages", a last message of the assistant is no part of the prompt,
# but the reference answer, unless the row has another.
PROMPT_KEY, MESSAGES_KEY = "prompt", "messages"
SOURCE_KEY = "data_source"
LARGEST_ROW = 64 * 2**20
"""Maximum size of a line of a JSONL file, in bytes."""

_EXPECTED_LINE = 'expected one JSON object per line, such as {"prompt": "3 5 7 : 22 >", "answer": 22}'


@dataclass(frozen=True)
class Example:
    """One prompt with its reference answer.

    Attributes:
        index: position in the data set, counted from 0.
        prompt: plain text, or chat messages [{"role": ..., "content": ...}] for the tokenizer's chat template, with
            all other fields that a message of the file has: some templates read ``name`` or ``reasoning_content``.
        answer: reference answer for the verifier, unchanged from the file.
        source: the row's "data_source", or the name of the file without its suffix.
        stratum: number by which prompts are stratified; None without a `stratify_key`.
    """

    index: int
    prompt: str | list[dict[str, Any]]
    answer: Any
    source: str
    stratum: float | None = None


def load_examples(
    path: str | Path,
    *,
    prompt_key: str | None = None,
    answer_key: str | None = None,
    stratify_key: str | None = None,
    limit: int | None = None,
) -> list[Example]:
    """Read the examples of a ``.jsonl`` or ``.parquet`` file, in file order.

    Args:
        path: the file. Blank lines of a JSONL file are skipped.
        prompt_key, answer_key, stratify_key: names of fields; dots reach into objects
            ("reward_model.ground_truth"). Without `prompt_key` the prompt is under "prompt", or under "messages" if the
            first row has no "prompt"; without `answer_key`, the first row decides which of `ANSWER_KEYS` the file uses,
            or that answers are the last messages of the assistant.
        limit: stop after this many examples.

    Raises:
        UserError: for a missing file, an unknown suffix, a line that is not a JSON object, a missing key, a prompt that
            is neither text nor messages, or a file without examples; names the file and the line or row.
    """
    path = Path(path)
    chat = answered_in_chat = False
    if limit is not None and limit < 1:
        raise UserError(f"limit of examples must be at least 1, found {limit}")
    examples: list[Example] = []
    for where, row in read_rows(path):
        if prompt_key is None:
            chat = _lookup(row, PROMPT_KEY) is None and _lookup(row, MESSAGES_KEY) is not None
            prompt_key = MESSAGES_KEY if chat else PROMPT_KEY
        prompt = _lookup(row, prompt_key)
        if prompt is None:
            raise UserError(_missing_key(where, "prompt", prompt_key, row))
        prompt, response = _plain(prompt, where, prompt_key), None
        if chat:
            prompt, response = _without_response(prompt)
        if answer_key is None and not answered_in_chat:
            answered_in_chat = response is not None and all(_lookup(row, key) is None for key in ANSWER_KEYS)
            answer_key = None if answered_in_chat else _find_answer_key(row, where)
        answer = response if answer_key is None else _lookup(row, answer_key)
        if answer is None:
            if answer_key is None:
                raise UserError(f"{where}: {MESSAGES_KEY} must end with the answer, a message of the assistant")
            raise UserError(_missing_key(where, "answer", answer_key, row))
        source = _lookup(row, SOURCE_KEY)
        examples.append(
            Example(
                index=len(examples),
                prompt=_checked_prompt(prompt, where, prompt_key),
                answer=_plain(answer, where, answer_key or MESSAGES_KEY),
                source=path.stem if source is None else str(source),
                stratum=None if stratify_key is None else read_stratum(row, stratify_key, where),
            )
        )
        if len(examples) == limit:
            break
    if not examples:
        raise UserError(f"{path}: no examples in the file; {_EXPECTED_LINE}")
    return examples


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, row) for every row of a JSONL or parquet file; ``where`` names file and line for error messages.

    Raises:
        UserError: if the file does not exist, has another suffix, or cannot be parsed.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{path}: the file type {path.suffix!r} is not supported; write a .jsonl or .parquet file")
    if not os.path.isfile(path):  # noqa: PTH113, Path.is_file raises for a name that is too long
        raise UserError(f"{path}: no such file; give the path of a .jsonl or .parquet file")
    yield from _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Lines are parsed one by one, so that an error names the line.
    try:
        opened = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct its permissions") from error
    with opened as file:
        number = 0
        while raw := file.readline(LARGEST_ROW + 1):
            number += 1
            where = f"{path} line {number}"
            if not raw.strip():
                continue
            try:
                row = parse_json(raw, limit=LARGEST_ROW, finite=False)  # only the fields that are read must be
            except InvalidInputError as error:
                raise UserError(f"{where}: {error}; {_EXPECTED_LINE}") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: found {describe(row)}; {_EXPECTED_LINE}")
            yield where, row


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            # Small batches, because a row group may hold millions of rows.
            batches = file.iter_batches(batch_size=4096)
            number = 0
            while (batch := next(batches, None)) is not None:
                for row in batch.to_pylist():
                    yield f"{path} row {number}", row
                    number += 1
    except UserError:
        raise
    # Damage that Arrow notices late has other types: OSError, UnicodeDecodeError, OverflowError in a date.
    except (arrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, RecursionError) as error:
        raise UserError(
            f"{path}: not a readable parquet file ({one_line(error)}); write it again, or write JSONL"
        ) from error


def _plain(value: Any, where: str, name: str, depth: int = 0) -> Any:
    """Return a value of a row as JSON has it: parquet columns have more types.

    Text, numbers, booleans, lists and structs stay; dates, decimals and bytes become text. A map, a list of pairs
    in Arrow, stays one.

    Raises:
        UserError: for values that JSON cannot hold: infinite numbers, bytes that are not UTF-8, deep nesting.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    problem = f"{where}: {name} holds"
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UserError(f"{problem} {value}, which is not a finite number: correct or remove the row")
        return value
    if depth >= DEPTH:
        raise UserError(f"{problem} values nested deeper than {DEPTH} levels: remove the row")
    if isinstance(value, list | tuple):
        return [_plain(item, where, name, depth + 1) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item, where, name, depth + 1) for key, item in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise UserError(f"{problem} bytes that are not UTF-8 text: store text, or drop the column") from None
    return str(value)


def _find_answer_key(row: dict[str, Any], where: str) -> str:
    for key in ANSWER_KEYS:
        if _lookup(row, key) is not None:
            return key
    raise UserError(f"{where}: no answer under {', '.join(ANSWER_KEYS)}; found the keys {_keys(row)}; set answer_key")


def _lookup(row: dict[str, Any], key: str) -> Any:
    """Return the value at a dotted key, or None. A key of the row that itself contains the dots takes precedence."""
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def read_stratum(row: dict[str, Any], key: str, where: str) -> float:
    """Return the number at the dotted `key` of a row, by which prompts are stratified.

    Raises:
        UserError: if it is not a number; names the row, `where`.
    """
    value = _lookup(row, key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(float_or_inf(value)):
        raise UserError(f"{where}: data.stratify_key={key} must name a number, found {describe(value)}")
    return float(value)


def _checked_prompt(prompt: Any, where: str, key: str) -> str | list[dict[str, Any]]:
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        # In parquet all messages of a file have the same fields, and null where JSON has none.
        return [{name: value for name, value in message.items() if value is not None} for message in prompt]
    raise UserError(
        f'{where}: {key} must be text or a list of {{"role": ..., "content": ...}} messages, not empty; '
        f"found {describe(prompt)}"
    )


def _without_response(messages: Any) -> tuple[Any, str | None]:
    """Return chat messages without a last message of the assistant, and its content; None if there is none."""
    if not (isinstance(messages, list) and len(messages) > 1 and _is_message(messages[-1])):
        return messages, None
    *prompt, last = messages
    return (prompt, last["content"]) if last["role"] == "assistant" else (messages, None)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
    )


def _missing_key(where: str, what: str, key: str, row: dict[str, Any]) -> str:
    return f"{where}: no {what} under {key!r}; found the keys {_keys(row)}; set {what}_key to the one that holds it"


def _keys(row: dict[str, Any]) -> str:
    return truncated(", ".join(repr(key) for key in row) or "(none)", 300)
