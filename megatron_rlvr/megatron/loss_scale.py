"""The factor that turns megatron-core's averages of gradients into sums."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LossScale:
    """Makes the gradient of a minibatch the plain sum over its tokens.

    The token weights of a minibatch add up over the microbatches and data-parallel ranks of the whole job. Its gradient
    is therefore the sum of what every microbatch of every rank computes. megatron-core forms averages instead:

    1. the schedule multiplies the loss of a microbatch by the context-parallel size C and divides it by the number of
       microbatches M;
    2. the data-parallel wrapper divides the gradients, those of experts included, by the number D C of data- and
       context-parallel ranks before it adds them up.

    With every loss multiplied by D M first, the factors cancel: (D M) (C / M) / (D C) = 1. The context-parallel ranks
    of a sequence each hold the gradient of their own tokens, so adding these up is right, too.

    Attributes:
        data_size: data-parallel size D.
        context_size: context-parallel size C.
    """

    data_size: int
    context_size: int

    def for_schedule(self, loss: Tensor, microbatches: int) -> Tensor:
        """What to give to the schedule as the loss of one of `microbatches` microbatches."""
        return loss * float(self.data_size) * microbatches

    @property
    def backward(self) -> float:
        """The number by which the backward pass multiplies a loss, D C.

        An operator that adds to the gradient buffers in its forward pass must know it beforehand.
        """
        return float(self.data_size) * self.context_size
