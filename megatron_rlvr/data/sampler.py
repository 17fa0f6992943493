"""The prompts that a step draws from one data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megatron_rlvr.errors import UserError


class Sampler(Protocol):
    """Draws the prompts of a step, as a pure function of (seed, step): a resumed run needs no saved position."""

    def indices(self, step: int) -> list[int]:
        """Return the indices of the examples that a step draws; steps count from 0."""
        ...

    def replacement(self, draw: int) -> int:
        """Return the index of an example that replaces a drawn one, chosen by the random number `draw`."""
        ...


class EpochOrder:
    """The examples of a data set in endless epochs, each in a new random order.

    The orders of the epochs are concatenated: every example comes once per epoch, and no remainder is dropped.

    With ``strata``, an order is stratified. The examples are sorted by their number and divided into strata of equal
    size, whose examples are spread evenly over the epoch.

    Args:
        count: number of examples.
        seed: seed of the run, at least 0.
        source: number of the data set, so that data sets of one size have different orders.
        strata: one number per example, by which the examples are stratified; None for a uniform order.
        stratum_count: number of strata.
    """

    def __init__(
        self, count: int, seed: int, source: int = 0, strata: Sequence[float] | None = None, stratum_count: int = 1
    ) -> None:
        self.count, self.seed, self.source = count, seed, source
        self._epoch = -1
        self._order: list[int] = []
        self._stratum_count = stratum_count
        self._sorted = None if strata is None else np.argsort(np.asarray(strata, dtype=np.float64), kind="stable")

    def take(self, position: int, number: int) -> list[int]:
        """Return the examples at places `position` to `position + number - 1` of the concatenated epochs."""
        taken: list[int] = []
        while len(taken) < number:
            epoch, offset = divmod(position + len(taken), self.count)
            taken += self._permutation(epoch)[offset : offset + number - len(taken)]
        return taken

    def _permutation(self, epoch: int) -> list[int]:
        """Return the order of an epoch. The latest one is cached."""
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch, self.source])
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
        for stratum in np.array_split(np.arange(self.count), self._stratum_count):
            size = len(stratum)
            places[stratum] = (rng.permutation(size) + rng.random()) / size
        return places


class PromptSampler:
    """Draws prompts from one data set in a new random order every epoch, as a pure function of (seed, step).

    Step k reads places [k * prompts_per_step, (k + 1) * prompts_per_step) of the epochs. A step that crosses the end of
    an epoch may draw a prompt twice.

    With ``strata``, there are prompts_per_step strata, and a step draws one example from each. All steps then have
    nearly the same mix of prompts, so differences between strata do not add noise to the means of a step.
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
        self._epochs = EpochOrder(count, seed, strata=strata, stratum_count=prompts_per_step)
        self._stratified = strata is not None

    def indices(self, step: int) -> list[int]:
        """Return the indices of the ``prompts_per_step`` examples that a step draws; steps count from 0."""
        if step < 0:
            raise ValueError(f"step must not be negative, found {step}")
        drawn = self._epochs.take(step * self.prompts_per_step, self.prompts_per_step)
        # Within an epoch the strata come in the same order in every step. Minibatches are cut from a step in order, so
        # without this shuffle the same strata would always share a minibatch.
        return shuffled(drawn, self.seed, step, self.count) if self._stratified else drawn

    def replacement(self, draw: int) -> int:
        """Return the index of an example that replaces a drawn one, chosen by the random number `draw`."""
        return draw % self.count


def shuffled(drawn: list[int], *key: int) -> list[int]:
    """Return the prompts of a step in a random order that depends on `key` alone."""
    return np.random.default_rng(key).permutation(drawn).tolist()
