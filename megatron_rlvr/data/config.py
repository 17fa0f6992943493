"""The `data` section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DataConfig:
    train: str = "???"
    """JSONL or parquet file of training problems."""
    heldout: str | None = None
    """File of held-out problems for evaluation; without it there is no evaluation."""
    prompt_key: str | None = None
    """Field of the prompt; by default recognised (prompt)."""
    answer_key: str | None = None
    """Field of the answer; by default recognised (answer, label, reward_model.ground_truth)."""
    stratify_key: str | None = None
    """Field of the training data with a number by which prompts are stratified: every step draws evenly from all of its
    range, so that reward, entropy and length of a step vary less with the mix of prompts. Alike prompts should have
    near numbers."""
    max_prompt_tokens: int = 1024
    """A longer prompt is refused before training starts."""
