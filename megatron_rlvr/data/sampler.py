"""Which prompts a step draws."""

import numpy as np

from megatron_rlvr.errors import UserError


class PromptSampler:
    """Prompts in a new random order every epoch, as a pure function of (seed, step).

    The epochs' permutations are laid end to end and step k reads places [k * prompts_per_step, (k + 1) *
    prompts_per_step): every prompt is drawn once an epoch, no remainder is dropped, and a resumed run needs no saved
    position to go on exactly. A step that crosses the end of an epoch may draw a prompt twice.
    """

    def __init__(self, count: int, prompts_per_step: int, seed: int) -> None:
        """count: number of examples. Raises UserError if a step needs more prompts than there are."""
        if count < 1:
            raise UserError(f"the data set has {count} examples; at least 1 is needed")
        if not 1 <= prompts_per_step <= count:
            raise UserError(
                f"prompts per step must be between 1 and the number of examples ({count}), found {prompts_per_step}"
            )
        if seed < 0:
            raise UserError(f"the seed of the prompt order must not be negative, found {seed}")
        self.count = count
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def indices(self, step: int) -> list[int]:
        """The example indices of a step (counted from 0), ``prompts_per_step`` of them."""
        if step < 0:
            raise ValueError(f"step must not be negative, found {step}")
        drawn: list[int] = []
        position = step * self.prompts_per_step
        while len(drawn) < self.prompts_per_step:
            epoch, offset = divmod(position + len(drawn), self.count)
            drawn += self._permutation(epoch)[offset : offset + self.prompts_per_step - len(drawn)]
        return drawn

    def epoch(self, step: int) -> int:
        """The epoch in which a step's first prompt lies, counted from 0."""
        return step * self.prompts_per_step // self.count

    def _permutation(self, epoch: int) -> list[int]:
        # Only the latest is kept: a pure function of (seed, epoch), so this changes time and nothing else.
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.count).tolist()
            self._epoch = epoch
        return self._order
