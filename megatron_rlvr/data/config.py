"""The section ``data`` of the configuration."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from megatron_rlvr.checked_input import shown
from megatron_rlvr.config_schema import REQUIRED, Bounds, PositiveInt, Seconds
from megatron_rlvr.errors import UserError

GYM_PREFIX = "reasoning_gym:"
"""Begins a source of problems that the package reasoning-gym generates."""
_NAME = re.compile(r"[\w.+-]+")


@dataclass
class DataSource:
    """One of several sources of training problems."""

    path: str = REQUIRED
    """File of problems, ``.jsonl`` or ``.parquet``, or ``reasoning_gym:NAME``."""
    weight: Annotated[float, Bounds(at_least=1e-6, cap=1e6)] = 1.0
    """Probability that a prompt of a step comes from this source, relative to the weights of the others. A step has
    this share of its prompts from the source, rounded down or up so that the mean over steps is exact."""
    name: str | None = None
    """Name in metrics and errors; null means the name of the file without its suffix, or of the task."""

    @property
    def label(self) -> str:
        """The name in metrics and errors."""
        if self.name is not None:
            return self.name
        return self.path.removeprefix(GYM_PREFIX) if is_gym(self.path) else Path(self.path).stem


def is_gym(path: str) -> bool:
    """Whether a source of problems is a task of the package reasoning-gym."""
    return path.startswith(GYM_PREFIX)


@dataclass
class ReasoningGymConfig:
    """Problems that the package reasoning-gym generates, for ``data.train`` and ``data.heldout`` of the form
    ``reasoning_gym:NAME``. They are generated at every start, and are the same for the same settings and versions."""

    size: Annotated[int, Bounds(above=0, cap=10**6)] = 2048
    """Training problems of each task. Held-out problems have other seeds, and are none of the training problems; there
    are ``evaluation.prompts`` of them, or as many as the task has."""
    seed: Annotated[int, Bounds(at_least=0, cap=2**30)] = 0
    """Seed of the problems. It does not depend on the seed of the run."""
    chat: bool = True
    """Make chat messages for the tokenizer's chat template, with `system_prompt` as the first; false makes plain text
    of both."""
    system_prompt: str | None = (
        "Solve the problem. Think step by step. Then write nothing but the answer between <answer> and </answer>, in "
        "the form that the problem asks for."
    )
    """What precedes each problem; null for nothing. The verifier reads the answer from these tags
    (``verifier.options.answer_tag``)."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Parameters of tasks, by the name of the task: ``options.leg_counting.max_animals=5``."""
    timeout_seconds: Seconds = 600.0
    """Longest time for the generation of a task's problems."""


@dataclass
class DataConfig:
    """Prompt data sets of training and evaluation."""

    train: str | list[DataSource] = REQUIRED
    """Training problems: a file, ``.jsonl`` or ``.parquet``; ``reasoning_gym:NAME``, a task of that package; or a list
    of these with weights: ``[{path: a.jsonl, weight: 0.7}, {path: b.jsonl, weight: 0.3}]``."""
    heldout: str | None = None
    """Held-out problems for evaluation: a file or a task; null disables evaluation."""
    prompt_key: str | None = None
    """Field that holds the prompt, dotted for a nested field; null means ``prompt``, or ``messages`` if the first row
    has no ``prompt``."""
    answer_key: str | None = None
    """Field that holds the reference answer, dotted for a nested field; null takes the first of ``answer``, ``label``
    and ``reward_model.ground_truth`` that the first row has, or else the last message of the assistant in
    ``messages``."""
    stratify_key: str | None = None
    """Field of the training data that holds a number to stratify prompts by; null draws prompts uniformly. Every step
    then draws evenly from the whole range of the number, so that reward, entropy and length vary less between steps.
    Similar prompts should have similar numbers."""
    max_prompt_tokens: PositiveInt = 1024
    """Longest prompt, in tokens; a longer one in the data is refused before training starts."""
    reasoning_gym: ReasoningGymConfig = field(default_factory=ReasoningGymConfig)

    def sources(self) -> list[DataSource]:
        """The sources of training problems; a text is the only one."""
        return [DataSource(self.train)] if isinstance(self.train, str) else self.train

    def unused_options(self) -> list[str]:
        """The tasks of `reasoning_gym.options` that are no source of problems."""
        paths = [source.path for source in self.sources()] + [self.heldout or ""]
        return [task for task in self.reasoning_gym.options if f"{GYM_PREFIX}{task}" not in paths]

    def check(self) -> None:
        """Refuse an empty list of sources, several held-out ones, and sources whose metrics could not be told apart."""
        if self.heldout and self.heldout[0] in "[{" and self.heldout[-1] in "]}":
            raise UserError(f"data.heldout={shown(self.heldout)} is a list: write one file or task, without brackets")
        if not self.train:
            raise UserError("data.train=[] has no files: write data.train=[{path: a.jsonl, weight: 1}, ...]")
        if isinstance(self.train, str):
            return
        for number, source in enumerate(self.train):
            if not _NAME.fullmatch(source.label):
                raise UserError(
                    f"data.train[{number}] is called {shown(source.label)} in metrics, which must consist of letters, "
                    f"digits and . _ + -: set data.train[{number}].name"
                )
        name, times = Counter(source.label for source in self.train).most_common(1)[0]
        if times > 1:
            raise UserError(f"{times} files of data.train are called {name}: give each of them another name")
