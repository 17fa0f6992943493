"""The factor that makes megatron-core sum gradients instead of averaging them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LossScale:
    """Scales losses so that the gradient of a minibatch is the sum over its tokens.

    Token weights are normalized over all microbatches and data-parallel ranks of the job. The gradient of a minibatch
    is therefore the sum over the microbatches of all ranks. megatron-core computes averages instead:

    1. The schedule multiplies the loss of a microbatch by the context-parallel size C and divides it by the number of
       microbatches M.
    2. The data-parallel wrapper divides the gradients, including those of experts, by the number D C of data- and
       context-parallel ranks before it sums them.

    If every loss is first multiplied by D M, the factors cancel: (D M) (C / M) / (D C) = 1. The context-parallel ranks
    of a sequence each have the gradient of their own tokens, so these gradients must be summed as well.

    Attributes:
        data_size: data-parallel size D.
        context_size: context-parallel size C.
    """

    data_size: int
    context_size: int

    def for_schedule(self, loss: Tensor, microbatches: int) -> Tensor:
        """Return the loss to pass to the schedule for one of `microbatches` microbatches."""
        return loss * float(self.data_size) * microbatches

    @property
    def backward(self) -> float:
        """The factor by which the backward pass multiplies a loss, D C.

        An operator that computes gradients in its forward pass must know it beforehand.
        """
        return float(self.data_size) * self.context_size
