"""The section ``data`` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlvr.config_schema import REQUIRED, PositiveInt


@dataclass
class DataConfig:
    """Prompt data sets of training and evaluation."""

    train: str = REQUIRED
    """File of training problems, ``.jsonl`` or ``.parquet``."""
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
