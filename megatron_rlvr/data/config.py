"""The section ``data`` of the configuration."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from megatron_rlvr.checked_input import shown
from megatron_rlvr.config_schema import REQUIRED, Bounds, PositiveInt
from megatron_rlvr.errors import UserError

_NAME = re.compile(r"[\w.+-]+")


@dataclass
class DataSource:
    """One of several sources of training problems."""

    path: str = REQUIRED
    """File of problems, ``.jsonl`` or ``.parquet``."""
    weight: Annotated[float, Bounds(at_least=1e-6, cap=1e6)] = 1.0
    """Probability that a prompt of a step comes from this source, relative to the weights of the others. A step has
    this share of its prompts from the source, rounded down or up so that the mean over steps is exact."""
    name: str | None = None
    """Name in metrics and errors; null means the name of the file without its suffix."""

    @property
    def label(self) -> str:
        """The name in metrics and errors."""
        return Path(self.path).stem if self.name is None else self.name


@dataclass
class DataConfig:
    """Prompt data sets of training and evaluation."""

    train: str | list[DataSource] = REQUIRED
    """File of training problems, ``.jsonl`` or ``.parquet``, or a list of files with weights:
    ``[{path: a.jsonl, weight: 0.7}, {path: b.jsonl, weight: 0.3}]``."""
    heldout: str | None = None
    """File of held-out problems for evaluation; null disables evaluation."""
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

    def sources(self) -> list[DataSource]:
        """The sources of training problems; a text is the only one."""
        return [DataSource(self.train)] if isinstance(self.train, str) else self.train

    def check(self) -> None:
        """Refuse lists of sources that have none, or whose metrics could not be told apart."""
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
