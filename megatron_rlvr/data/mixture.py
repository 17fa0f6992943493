"""The prompts that a step draws from several data sets with weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megatron_rlvr.data.sampler import EpochOrder, shuffled
from megatron_rlvr.errors import UserError

# Multiples of the golden ratio, modulo 1, are spread evenly: after any number of steps, the prompts that a data set has
# given differ from its share by little more than one.
_GOLDEN_RATIO = (math.sqrt(5.0) - 1.0) / 2.0


class MixtureSampler:
    """Draws every step's prompts from several data sets, as a pure function of (seed, step).

    The weight of a data set, divided by the sum of all weights, is the probability that a prompt of a step comes from
    it. The prompts of a step are drawn by systematic sampling (Madow 1949): a step has weight * prompts_per_step
    prompts of each data set, rounded down or up so that the mean over steps is exact. So the mix of the steps varies no
    more than it must.

    Every data set has epochs of its own: its next prompt follows the last one that an earlier step drew from it.
    Examples are numbered through all data sets, in their order.

    Args:
        counts: number of examples of each data set.
        weights: weight of each data set, above 0.
        names: name of each data set in errors.
        prompts_per_step: prompts that a step draws, over all data-parallel ranks.
        seed: seed of the run, at least 0.
        strata: one number per example of all data sets, by which the examples of each are stratified; None draws
            uniformly from each.

    Raises:
        UserError: if a step can need more prompts of a data set than it has.
    """

    def __init__(
        self,
        counts: Sequence[int],
        weights: Sequence[float],
        names: Sequence[str],
        prompts_per_step: int,
        seed: int,
        strata: Sequence[float] | None = None,
    ) -> None:
        self.prompts_per_step, self.seed = prompts_per_step, seed
        self.first = np.cumsum([0, *counts]).tolist()
        bounds = np.cumsum([0.0, *weights])
        self._bounds = bounds / bounds[-1]  # ends with exactly 1
        self._offset = float(np.random.default_rng(seed).random())
        self._epochs = []
        for source, (count, name) in enumerate(zip(counts, names, strict=True)):
            share = float(self._bounds[source + 1] - self._bounds[source])
            most = math.ceil(prompts_per_step * share - 1e-9)  # the sums of weights are rounded
            if most > count:
                raise UserError(
                    f"{name} has {count} examples, but its weight is {most} of rollout.prompts_per_step="
                    f"{prompts_per_step} prompts: lower its weight or rollout.prompts_per_step, or add examples"
                )
            own = None if strata is None else strata[self.first[source] : self.first[source + 1]]
            self._epochs.append(EpochOrder(count, seed, source, own, stratum_count=max(1, most)))

    def drawn(self, first: int, last: int) -> list[int]:
        """Return how many prompts steps `first` to `last - 1` draw from each data set."""
        offset = np.modf(self._offset + _GOLDEN_RATIO * np.arange(first, last))[0][:, None]
        below = np.ceil(self.prompts_per_step * self._bounds[None, :] - offset)
        return np.diff(below).sum(axis=0).astype(np.int64).tolist()

    def epochs(self, step: int) -> list[float]:
        """Return how often each data set has been drawn through before a step; 1 is once."""
        return [drawn / order.count for drawn, order in zip(self.drawn(0, step), self._epochs, strict=True)]

    def source(self, index: int) -> int:
        """Return the number of the data set that an example belongs to."""
        return int(np.searchsorted(self.first, index, side="right")) - 1

    def indices(self, step: int) -> list[int]:
        """Return the indices of the ``prompts_per_step`` examples that a step draws; steps count from 0."""
        if step < 0:
            raise ValueError(f"step must not be negative, found {step}")
        drawn: list[int] = []
        numbers = zip(self._epochs, self.first, self.drawn(0, step), self.drawn(step, step + 1), strict=False)
        for order, first, position, number in numbers:
            drawn += [first + index for index in order.take(position, number)]
        # Minibatches are cut from a step in order: all of them shall have the mix of the step.
        return shuffled(drawn, self.seed, step, self.first[-1])

    def replacement(self, draw: int) -> int:
        """Return the index of an example that replaces a drawn one, chosen by the random number `draw`.

        Its data set is drawn by the weights.
        """
        rng = np.random.default_rng(draw)
        source = int(np.searchsorted(self._bounds, rng.random(), side="right")) - 1
        return int(self.first[source] + rng.integers(self._epochs[source].count))
