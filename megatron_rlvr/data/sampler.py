"""Which prompts a step draws."""

from collections.abc import Sequence

import numpy as np

from megatron_rlvr.errors import UserError


class PromptSampler:
    """Prompts in a new random order every epoch, as a pure function of (seed, step).

    The epochs' permutations are laid end to end and step k reads places [k * prompts_per_step, (k + 1) *
    prompts_per_step): every prompt is drawn once an epoch, no remainder is dropped, and a resumed run needs no saved
    position to go on exactly. A step that crosses the end of an epoch may draw a prompt twice.

    With ``strata``, a number for each example, steps are stratified: the examples in the order of their numbers are cut
    into prompts_per_step runs of equal length, and a step draws one of each. Every step then has nearly the same mix of
    prompts, and what differs between prompts of different strata does not blur its means.
    """

    def __init__(self, count: int, prompts_per_step: int, seed: int, strata: Sequence[float] | None = None) -> None:
        """count: number of examples, and of ``strata``. Raises UserError if a step needs more prompts than that."""
        if count < 1:
            raise UserError(f"the data set has {count} examples; at least 1 is needed")
        if not 1 <= prompts_per_step <= count:
            raise UserError(
                f"rollout.prompts_per_step={prompts_per_step} must be between 1 and the number of examples, {count}"
            )
        if seed < 0:
            raise UserError(f"the seed of the prompt order must not be negative, found {seed}")
        self.count = count
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self._epoch = -1
        self._order: list[int] = []
        self._sorted = None if strata is None else np.argsort(np.asarray(strata, dtype=np.float64), kind="stable")

    def indices(self, step: int) -> list[int]:
        """The example indices of a step (counted from 0), ``prompts_per_step`` of them."""
        if step < 0:
            raise ValueError(f"step must not be negative, found {step}")
        drawn: list[int] = []
        position = step * self.prompts_per_step
        while len(drawn) < self.prompts_per_step:
            epoch, offset = divmod(position + len(drawn), self.count)
            drawn += self._permutation(epoch)[offset : offset + self.prompts_per_step - len(drawn)]
        if self._sorted is not None:
            # The strata come in the same order in all steps of an epoch; minibatches, cut from a step, must not.
            drawn = np.random.default_rng([self.seed, step, self.count]).permutation(drawn).tolist()
        return drawn

    @property
    def stratified(self) -> bool:
        return self._sorted is not None

    def epoch(self, step: int) -> int:
        """The epoch in which a step's first prompt lies, counted from 0."""
        return step * self.prompts_per_step // self.count

    def _permutation(self, epoch: int) -> list[int]:
        # Only the latest is kept: a pure function of (seed, epoch), so this changes time and nothing else.
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            if self._sorted is None:
                order = rng.permutation(self.count)
            else:
                order = self._sorted[np.argsort(self._places(rng), kind="stable")]
            self._order, self._epoch = order.tolist(), epoch
        return self._order

    def _places(self, rng: np.random.Generator) -> np.ndarray:
        """Where in the epoch each example of the sorted order stands, in [0, 1): one of a stratum's n in every nth."""
        places = np.empty(self.count)
        for stratum in np.array_split(np.arange(self.count), self.prompts_per_step):
            size = len(stratum)
            places[stratum] = (rng.permutation(size) + rng.random()) / size
        return places
