"""Read the tokenizer of a Hugging Face folder, and the ids of the tokens that end a sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rlvr.checked_input import InvalidInputError, checked, one_line, read_json
from megatron_rlvr.errors import UserError

_REMEDY = "copy the files of the model's tokenizer there again"


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder with transformers. Python code in the folder is never run.

    Raises:
        UserError: if there is none, or its files cannot be read.
    """
    from transformers import AutoTokenizer

    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            read_json(folder / name, remedy=_REMEDY)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        # Without tokenizer files, transformers returns an empty tokenizer.
        missing = not list(folder.glob("tokenizer*")) or len(tokenizer) < 2
        _ = tokenizer.get_vocab(), tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id
    except BaseException as error:
        # The library behind transformers raises plain Exception, and panics, which Python does not count as one.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        needs_code = "trust_remote_code" in str(error)
        raise UserError(
            f"{folder} has no tokenizer that can be loaded ("
            + ("it needs Python code of the folder, which is never run): save it as" if needs_code else one_line(error))
            + (" a tokenizer of transformers, with tokenizer.json" if needs_code else f"): {_REMEDY}")
        ) from error
    if missing:
        raise UserError(f"{folder} has no tokenizer: save it there with tokenizer.save_pretrained({str(folder)!r})")
    return tokenizer


def end_of_sequence_tokens(folder: Path, tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Return the sorted ids of all tokens that end a sequence according to any file of a model folder.

    Models name them in different places: an instruct model may name the end of a turn in ``generation_config.json`` or
    ``config.json`` alone, and the end of a text in the tokenizer.

    Raises:
        UserError: if a file cannot be read, names a token that the model does not have, or none names any.
    """
    stops = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        if not (folder / name).is_file():
            continue
        configured = read_json(folder / name, remedy="download the model again").get("eos_token_id")
        try:
            for token in configured if isinstance(configured, list) else [configured]:
                if token is not None:
                    stops.add(checked(token, int, "eos_token_id", at_least=0, at_most=vocab_size - 1))
        except InvalidInputError as error:
            raise UserError(f"{folder / name}: {error}: correct it, or download the model again") from error
    if not stops:
        raise UserError(
            f"{folder}: neither the tokenizer nor config.json nor generation_config.json names an end-of-sequence "
            "token: set eos_token_id in generation_config.json"
        )
    return tuple(sorted(stops))
