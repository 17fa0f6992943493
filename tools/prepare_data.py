"""Convert a public data set to JSONL for training: reword prompts, remove duplicates, hold out a part.

    python tools/prepare_data.py --recipe gsm8k train-00000-of-00001.parquet --heldout test-00000-of-00001.parquet \
        --output data/gsm8k
    python tools/prepare_data.py --recipe math MATH/train --heldout MATH/test --output data/math
    python tools/prepare_data.py --recipe dapo dapo-math-17k.parquet --heldout aime-2024.parquet --output data/dapo
    python tools/prepare_data.py mine.jsonl --output data/mine --prompt-key question --answer-after "####" \
        --chat --template "{prompt} Put the final answer within \\boxed{{}}."

The tool writes train.jsonl and heldout.jsonl with lines {"prompt": ..., "answer": ..., "data_source": ...}. A recipe
(data_recipes.py) knows the columns of a data set as it is published, and makes chat prompts that ask for \\boxed{}.
Without one, the tool reads JSONL and parquet files in the plain, slime and verl (DAPO) formats. Training can read
these files directly, but the file of DAPO-Math-17k, for example, contains each prompt a hundred times.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_recipes import RECIPES

from megatron_rlvr.atomic_write import atomic_file
from megatron_rlvr.data import Example, load_examples
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, user_errors_reported


@dataclass
class Prepared:
    """The lines of both splits, and how many rows and prompts were dropped.

    Attributes:
        train, held_out: the lines.
        duplicates: rows whose prompt and answer an earlier row has.
        contradictions: prompts with different answers.
        leaked: prompts of the training file that the held-out file has, too.
    """

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    duplicates: int
    contradictions: int
    leaked: int = 0


def prepare(
    examples: list[Example],
    *,
    held_out_share: float,
    template: str = "{prompt}",
    chat: bool = False,
    answer_after: str = "",
) -> Prepared:
    """Reword, deduplicate and split examples.

    A prompt that occurs with different answers is dropped, because at least one of them is wrong. Whether a prompt is
    held out depends only on its hash, so that added, removed or reordered lines do not change the split.

    Args:
        examples: the rows of the data set.
        held_out_share: expected fraction of the prompts to hold out.
        template: the new text of a text prompt, with "{prompt}" where the old one goes.
        chat: convert text prompts to user messages.
        answer_after: keep only what follows the last occurrence of this in a text answer.

    Raises:
        UserError: for a template without "{prompt}", `template` or `chat` with prompts that are chat messages already,
            or an answer without `answer_after`.
    """
    answers: dict[str, Any] = {}
    sources: dict[str, str] = {}
    contradicted: set[str] = set()
    duplicates = 0
    for example in examples:
        key = json.dumps(_reworded(example, template, chat), ensure_ascii=False)
        answer = _final_part(example, answer_after)
        if key not in answers:
            answers[key], sources[key] = answer, example.source
        elif answers[key] == answer:
            duplicates += 1
        else:
            contradicted.add(key)
    prepared = Prepared([], [], duplicates, len(contradicted))
    for key, answer in answers.items():
        if key in contradicted:
            continue
        line = {"prompt": json.loads(key), "answer": answer, "data_source": sources[key]}
        (prepared.held_out if _unit_hash(key) < held_out_share else prepared.train).append(line)
    return prepared


def prepare_splits(train: list[Example], held_out: list[Example], **wording: Any) -> Prepared:
    """Reword and deduplicate a data set that is published in two splits.

    Training prompts that are also held out are dropped.

    Args:
        train, held_out: the rows of both splits.
        wording: `template`, `chat` and `answer_after` of `prepare`.

    Raises:
        UserError: as `prepare`.
    """
    first, second = (prepare(examples, held_out_share=0, **wording) for examples in (train, held_out))
    kept_out = {json.dumps(line["prompt"]) for line in second.train}
    lines = [line for line in first.train if json.dumps(line["prompt"]) not in kept_out]
    return Prepared(
        lines,
        second.train,
        first.duplicates + second.duplicates,
        first.contradictions + second.contradictions,
        len(first.train) - len(lines),
    )


def _reworded(example: Example, template: str, chat: bool) -> str | list[dict[str, str]]:
    if isinstance(example.prompt, list):
        if chat or template != "{prompt}":
            raise UserError("the prompts of this file are chat messages already: omit --chat and --template")
        return example.prompt
    if "{prompt}" not in template:
        raise UserError(f"--template {template!r} does not contain {{prompt}}")
    try:
        text = template.format(prompt=example.prompt)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"--template {template!r}: {error!r}; write {{prompt}}, and double any other brace") from error
    return [{"role": "user", "content": text}] if chat else text


def _final_part(example: Example, marker: str) -> Any:
    if not marker:
        return example.answer
    if not isinstance(example.answer, str) or marker not in example.answer:
        raise UserError(f"example {example.index}: no {marker!r} in the answer {example.answer!r}; see --answer-after")
    return example.answer.rpartition(marker)[2].strip()


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that depends only on the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]) / (1 << 56)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a JSONL file, which gets its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.writelines((json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines)


def _read(path: Path, arguments: argparse.Namespace) -> list[Example]:
    """Read a file of the data set, by the recipe or by the keys."""
    if arguments.recipe:
        return RECIPES[arguments.recipe].examples(path, arguments.limit)
    return load_examples(
        path, prompt_key=arguments.prompt_key or "prompt", answer_key=arguments.answer_key, limit=arguments.limit
    )


def run(arguments: argparse.Namespace) -> None:
    """Read, prepare and write a data set, and print what was done."""
    if not 0 <= arguments.held_out_share < 1:
        raise UserError(f"--held-out-share must be at least 0 and below 1, found {arguments.held_out_share}")
    keys = [name for name in ("prompt_key", "answer_key", "answer_after") if getattr(arguments, name)]
    if arguments.recipe and keys:
        raise UserError(f"--recipe {arguments.recipe} knows the columns: omit --{keys[0].replace('_', '-')}")
    if arguments.text and not arguments.recipe:
        raise UserError("--text is for recipes, whose prompts are chat messages: omit it")
    examples = [example for path in arguments.input for example in _read(path, arguments)]
    wording: dict[str, Any] = {
        "template": "{prompt}" if arguments.template is None else arguments.template,
        "chat": arguments.chat,
        "answer_after": arguments.answer_after,
    }
    if arguments.recipe:
        wording["template"] = arguments.template or RECIPES[arguments.recipe].template
        wording["chat"] = not arguments.text
    if arguments.heldout:
        held_out = [example for path in arguments.heldout for example in _read(path, arguments)]
        prepared = prepare_splits(examples, held_out, **wording)
    else:
        prepared = prepare(examples, held_out_share=arguments.held_out_share, **wording)
    names = ", ".join(map(str, [*arguments.input, *(arguments.heldout or [])]))
    print(
        f"{names}: {len(examples)} rows, {prepared.duplicates} duplicates dropped, "
        f"{prepared.contradictions} prompts with different answers dropped"
        + (f", {prepared.leaked} training prompts that are held out dropped" if arguments.heldout else "")
    )
    if not prepared.train:
        raise UserError(f"{names}: no training example is left; lower --held-out-share")
    for name, lines in (("train", prepared.train), ("heldout", prepared.held_out)):
        if lines:
            write_lines(arguments.output / f"{name}.jsonl", lines)
            print(f"{arguments.output / f'{name}.jsonl'}: {len(lines)} examples")


@user_errors_reported
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Convert a public data set to JSONL for training.")
    parser.add_argument("input", type=Path, nargs="+", help="a .jsonl or .parquet file; of MATH also its folder")
    parser.add_argument("--recipe", choices=list(RECIPES), help="the data set, as it is published")
    parser.add_argument("--heldout", type=Path, nargs="+", help="files of the published test split, to hold out")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--prompt-key", help="key of the prompt; a.b is key b of the object at key a")
    parser.add_argument("--answer-key", help="key of the answer; not needed for the known formats")
    parser.add_argument("--answer-after", default="", help='keep only what follows the last of these, e.g. "####"')
    parser.add_argument("--template", help="new text of a text prompt")
    parser.add_argument("--chat", action="store_true", help="convert text prompts to user messages")
    parser.add_argument("--text", action="store_true", help="with a recipe: plain text prompts instead of messages")
    parser.add_argument("--held-out-share", type=float, default=0.02, help="share of the prompts to hold out")
    parser.add_argument("--limit", type=int, help="read only this many rows")
    run(parser.parse_args(arguments))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
