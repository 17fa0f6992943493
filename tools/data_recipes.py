r"""Recipes of tools/prepare_data.py: what the columns of published data sets hold, and how their rows become examples.

gsm8k   openai/gsm8k (parquet) and grade-school-math (JSONL): ``question``, and in ``answer`` what follows "####"
math    the folder of MATH.tar, EleutherAI/hendrycks_math, MATH-lighteval and MATH-500: ``problem``, and ``answer`` or,
        without one, the last \boxed{} in ``solution``
dapo    BytedTsinghua-SIA/DAPO-Math-17k, its AIME-2024 and open-r1/DAPO-Math-17k-Processed: the problem within
        ``prompt``, and ``reward_model.ground_truth``
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_rlvr.checked_input import InvalidInputError, parse_object, read_bytes
from megatron_rlvr.data import Example, load_examples
from megatron_rlvr.data.examples import read_rows
from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers.final_answer import final_answer

BOXED = "{prompt}\n\nThink step by step, and put the final answer within \\boxed{{}}."
_DAPO = re.compile(
    r"Solve the following math problem step by step\. The last line of your response should be of the form Answer: "
    r"\$Answer \(without quotes\) where \$Answer is the answer to the problem\.\s*(.*?)\s*"
    r"Remember to put your answer on its own line after \"Answer:\"\.?\s*",
    re.DOTALL,
)


@dataclass(frozen=True)
class Recipe:
    """How the rows of a published data set become examples whose prompts are the questions alone.

    Attributes:
        read: yields the examples of a file or a folder.
        source: the name of the data set in ``data_source``; None keeps that of the rows.
        template: text of the prompts, with "{prompt}" where the question goes.
    """

    read: Callable[[Path, int | None], list[Example]]
    source: str | None = None
    template: str = BOXED

    def examples(self, path: Path, limit: int | None = None) -> list[Example]:
        """Read a file or a folder of the data set as it is published.

        Raises:
            UserError: if a row has no question or no answer where the data set has them; names it.
        """
        examples = self.read(path, limit)
        return examples if self.source is None else [replace(example, source=self.source) for example in examples]


def _gsm8k(path: Path, limit: int | None) -> list[Example]:
    examples = load_examples(path, prompt_key="question", answer_key="answer", limit=limit)
    for example in examples:
        if not isinstance(example.answer, str) or "####" not in example.answer:
            raise UserError(f"{path}: example {example.index} has no '####' in its answer: is this GSM8K?")
    # Reference answers write 1,000; solutions write <<48/2=24>> for a calculator, which is not part of the answer.
    return [replace(e, answer=e.answer.rpartition("####")[2].strip().replace(",", "")) for e in examples]


def _math(path: Path, limit: int | None) -> list[Example]:
    examples: list[Example] = []
    for where, row in _math_rows(path):
        if not isinstance(problem := row.get("problem"), str) or not problem.strip():
            raise UserError(
                f"{where}: no text under 'problem'; found the keys {', '.join(map(repr, row))}: is this MATH?"
            )
        answer = row["answer"] if isinstance(row.get("answer"), str) else final_answer(str(row.get("solution")))
        if not answer:
            raise UserError(f"{where}: neither 'answer' nor a \\boxed{{}} in 'solution': correct or remove the row")
        examples.append(Example(len(examples), problem, answer, "math"))
        if len(examples) == limit:
            break
    if not examples:
        raise UserError(f"{path}: no problems: give a .jsonl or .parquet file, or a folder of MATH's JSON files")
    return examples


def _math_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_dir():
        yield from read_rows(path)
        return
    # Files are named by numbers within the folder of a subject.
    for file in sorted(path.rglob("*.json"), key=lambda file: (str(file.parent), len(file.name), file.name)):
        try:
            yield str(file), parse_object(read_bytes(file))
        except (OSError, InvalidInputError) as error:
            raise UserError(f"{file} cannot be read ({error}): correct or remove it") from error


def _dapo(path: Path, limit: int | None) -> list[Example]:
    examples = load_examples(path, prompt_key="prompt", answer_key="reward_model.ground_truth", limit=limit)
    return [replace(example, prompt=_dapo_problem(example, path)) for example in examples]


def _dapo_problem(example: Example, path: Path) -> str:
    """Return the problem of a DAPO prompt, without the instructions around it; a text is the problem itself."""
    if isinstance(example.prompt, str):
        return example.prompt
    [message, *others] = example.prompt
    matched = _DAPO.fullmatch(message["content"].strip())
    if others or matched is None:
        raise UserError(
            f"{path}: the prompt of example {example.index} does not have DAPO's instructions: leave out --recipe"
        )
    return matched[1]


RECIPES = {"gsm8k": Recipe(_gsm8k, "gsm8k"), "math": Recipe(_math, "math"), "dapo": Recipe(_dapo)}
