"""The prompts that a step draws."""

from collections.abc import Sequence

import numpy as np

from megatron_rlvr.errors import UserError


class PromptSampler:
    """Draws prompts in a new random order every epoch, as a pure function of (seed, step).

    The permutations of the epochs are concatenated, and step k reads places [k * prompts_per_step, (k + 1) *
    prompts_per_step). Every prompt is drawn once per epoch, no remainder is dropped, and a resumed run needs no saved
    position. A step that crosses the end of an epoch may draw a prompt twice.

    With ``strata``, the prompts of a step are stratified. The examples are sorted by their number and divided into
    prompts_per_step strata of equal size, and a step draws one example from each. All steps then have nearly the same
    mix of prompts, so differences between strata do not add noise to the means of a step.
    """

    def __init__(self, count: int, prompts_per_step: int, seed: int, strata: Sequence[float] | None = None) -> None:
        """
        Args:
            count: number of examples.
            prompts_per_step: prompts that a step draws, over all data-parallel ranks.
            seed: seed of the run, at least 0.
            strata: one number per example, by which the examples are stratified; None draws uniformly.

        Raises:
            UserError: if a step needs more prompts than there are, or an argument is out of range.
        """
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
        """Return the indices of the ``prompts_per_step`` examples that a step draws; steps count from 0."""
        if step < 0:
            raise ValueError(f"step must not be negative, found {step}")
        drawn: list[int] = []
        position = step * self.prompts_per_step
        while len(drawn) < self.prompts_per_step:
            epoch, offset = divmod(position + len(drawn), self.count)
            drawn += self._permutation(epoch)[offset : offset + self.prompts_per_step - len(drawn)]
        if self._sorted is not None:
            # Within an epoch the strata come in the same order in every step. Minibatches are cut from a step in order,
            # so without this shuffle the same strata would always share a minibatch.
            drawn = np.random.default_rng([self.seed, step, self.count]).permutation(drawn).tolist()
        return drawn

    @property
    def stratified(self) -> bool:
        """Whether the prompts of a step are stratified."""
        return self._sorted is not None

    def _permutation(self, epoch: int) -> list[int]:
        """Return the order of an epoch. The latest one is cached."""
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            if self._sorted is None:
                order = rng.permutation(self.count)
            else:
                order = self._sorted[np.argsort(self._places(rng), kind="stable")]
            self._order, self._epoch = order.tolist(), epoch
        return self._order

    def _places(self, rng: np.random.Generator) -> np.ndarray:
        """Return the place in the epoch, in [0, 1), of each example in sorted order: float64 [count].

        The n examples of a stratum are spread evenly over the epoch, one in each n-th of it.
        """
        places = np.empty(self.count)
        for stratum in np.array_split(np.arange(self.count), self.prompts_per_step):
            size = len(stratum)
            places[stratum] = (rng.permutation(size) + rng.random()) / size
        return places
