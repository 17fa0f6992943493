"""The projection of hidden states onto a shard of the vocabulary, one chunk of tokens at a time, and its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .kept import KeptSets, check_kept
from .statistics import LOGIT_TYPES, statistics_of_shard, write_gradient
from .vocab_parallel import VocabShard, all_reduce_sum

# Per type of device. Large enough for a chunk's matrix products to run at full speed, and for the weight's gradient,
# which every chunk reads and writes, not to dominate. Small compared with the logits of a whole microbatch.
DEFAULT_CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
# The number of tokens of a chunk is a multiple of the first of these that fits: a GPU multiplies in tiles of up to 256
# rows, and on the CPU 187 tokens took 8 % longer than 192.
CHUNK_MULTIPLES = (128, 32)
# Vocabulary rows of one float32 product on the CPU. A wide and short product reads the weight from memory more often
# than necessary (20 % slower at 65536 rows and 192 tokens).
CPU_TILE = 2048


@dataclass(frozen=True)
class VocabSoftmax:
    """The softmax that all chunks share: vocabulary shard, temperature, parallel layout, kept sets of the rows."""

    shard: VocabShard
    group: dist.ProcessGroup | None
    inverse_temperature: float
    sequence_parallel: bool
    chunk_bytes: int | None
    kept: KeptSets | None = None

    def statistics(
        self, chunk: slice, logits: Tensor, targets: Tensor, second_moments: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-prob, entropy, row state and moments of a chunk, with one all-gather; ``targets`` of all rows."""
        kept = None if self.kept is None else self.kept.rows(chunk)
        settings = (self.inverse_temperature, self.shard, self.group, second_moments, kept)
        return statistics_of_shard(logits, targets[chunk], *settings)

    def write_gradient(
        self, chunk: slice, logits: Tensor, targets: Tensor, state: Tensor, g: Tensor, h: Tensor
    ) -> None:
        """Overwrite a chunk's logits with their gradient; ``state``, ``g`` and ``h`` are those of the chunk."""
        kept = None if self.kept is None else self.kept.rows(chunk)
        write_gradient(logits, targets[chunk], kept, state, g, h, self.shard.start, self.inverse_temperature)


@dataclass(frozen=True)
class TokenChunks:
    """Iterates over the logits of one chunk of tokens at a time, in one buffer of at most ``chunk_bytes``.

    A chunk has at least one token. ``chunk_bytes`` None means the default of the device. ``hidden`` [T, h] and
    ``weight`` [V/tp, h] have one type.
    """

    hidden: Tensor
    weight: Tensor
    chunk_bytes: int | None

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        tokens, width = self.hidden.shape[0], self.weight.shape[0]
        budget = self.chunk_bytes or DEFAULT_CHUNK_BYTES["cuda" if self.hidden.is_cuda else "cpu"]
        rows = self._rows(tokens, max(1, min(tokens, budget // (width * self.hidden.element_size()))))
        buffer = self.hidden.new_empty((rows, width))
        for start in range(0, tokens, rows):
            chunk = slice(start, min(start + rows, tokens))
            logits = buffer[: chunk.stop - start]
            self._project(self.hidden[chunk], logits)
            yield chunk, logits

    @staticmethod
    def _rows(tokens: int, most: int) -> int:
        """Tokens per chunk, at most ``most``: as few chunks as possible, of about equal length."""
        if tokens == 0:
            return 1
        equal = -(-tokens // -(-tokens // most))
        round_numbers = (-(-equal // multiple) * multiple for multiple in CHUNK_MULTIPLES)
        return next((number for number in round_numbers if number <= most), equal)

    def _project(self, hidden: Tensor, logits: Tensor) -> None:
        """logits = hidden weight^T."""
        width = self.weight.shape[0]
        tiled = logits.device.type == "cpu" and logits.dtype == torch.float32
        tile = CPU_TILE if tiled else max(1, width)
        for start in range(0, width, tile):
            torch.mm(hidden, self.weight[start : start + tile].t(), out=logits[:, start : start + tile])


class WeightGradient:
    """The sum of the vocabulary weight's gradient in float32: in Megatron's ``main_grad``, or in a new buffer."""

    def __init__(self, weight: Tensor, into_main_grad: bool):
        self.weight = weight
        self.main_grad: Tensor | None = getattr(weight, "main_grad", None) if into_main_grad else None
        self.total = torch.zeros_like(weight, dtype=torch.float32) if self.main_grad is None else self.main_grad

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """total += grad_logits^T hidden, every product and sum in float32."""
        total = self.total
        if grad_logits.dtype == total.dtype:
            total.addmm_(grad_logits.t(), hidden)
        elif grad_logits.device.type == "cuda":
            # tensor cores multiply in half precision and add to `total` in float32
            torch.addmm(total, grad_logits.t(), hidden, out_dtype=torch.float32, out=total)
        else:
            total.addmm_(grad_logits.t().to(total.dtype), hidden.to(total.dtype))

    def for_autograd(self) -> Tensor | None:
        """The gradient that a backward pass returns for the weight; None if it is in ``main_grad`` already."""
        if self.main_grad is None:
            return self.total.to(self.weight.dtype)
        if hasattr(self.weight, "grad_added_to_main_grad"):
            # Megatron's data-parallel hook runs only if a gradient arrives, and ignores its value if this is set.
            self.weight.grad_added_to_main_grad = True
            # If the weight is also the embedding, Megatron sets `zero_out_wgrad` and adds what arrives. The gradient of
            # the embedding does, so zeros of the size of the vocabulary would only be added to it.
            return None if getattr(self.weight, "zero_out_wgrad", False) else torch.empty_like(self.weight)
        return None


class ProjectionGradients:
    """Gradients of hidden states and weight, accumulated chunk by chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs_gradient: tuple[bool, bool], into_main_grad: bool):
        self.weight = weight
        self.hidden = torch.empty_like(hidden) if needs_gradient[0] else None
        self.of_weight = WeightGradient(weight, into_main_grad) if needs_gradient[1] else None

    def add(self, chunk: slice, grad_logits: Tensor, hidden: Tensor) -> None:
        if self.hidden is not None:
            torch.mm(grad_logits, self.weight, out=self.hidden[chunk])
        if self.of_weight is not None:
            self.of_weight.add(grad_logits, hidden[chunk])


def gather_hidden(
    hidden: Tensor, shard: VocabShard, group: dist.ProcessGroup | None, sequence_parallel: bool
) -> Tensor:
    """Hidden states of all tokens: one all-gather along the tokens under sequence parallelism, else ``hidden``."""
    if not sequence_parallel or shard.count == 1:
        return hidden.contiguous()
    full = hidden.new_empty((hidden.shape[0] * shard.count, hidden.shape[1]))
    dist.all_gather_into_tensor(full, hidden.contiguous(), group=group)
    return full


def reduce_hidden_gradient(
    gradient: Tensor, shard: VocabShard, group: dist.ProcessGroup | None, sequence_parallel: bool
) -> Tensor:
    """Sum the shards' gradients of the hidden states: one all-reduce, or one reduce-scatter along the tokens."""
    if not sequence_parallel or shard.count == 1:
        return all_reduce_sum(gradient, group)
    scattered = gradient.new_empty((gradient.shape[0] // shard.count, gradient.shape[1]))
    dist.reduce_scatter_tensor(scattered, gradient, op=dist.ReduceOp.SUM, group=group)
    return scattered


def check_projection(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    shard: VocabShard,
    sequence_parallel: bool,
    chunk_bytes: int | None,
    kept: KeptSets | None,
) -> None:
    """Raise ValueError, naming the argument, unless the shapes, types and devices fit together."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden, weight: must be [T, h] and [V/tp, h], found {list(hidden.shape)} and {list(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight: must be [V/tp, h] with V/tp > 0, found {list(weight.shape)}")
    if hidden.dtype not in LOGIT_TYPES or weight.dtype != hidden.dtype:
        remedy = "; pass weight.to(hidden.dtype), as autocast would" if hidden.dtype in LOGIT_TYPES else ""
        raise ValueError(
            f"hidden, weight: must be of one type (float32, bfloat16, float16), found {hidden.dtype}, {weight.dtype}"
            f"{remedy}"
        )
    tokens = hidden.shape[0] * (shard.count if sequence_parallel else 1)
    if targets.dtype != torch.int64 or targets.shape != (tokens,):
        raise ValueError(f"targets: must be int64 [{tokens}], found {targets.dtype} {list(targets.shape)}")
    if not weight.device == targets.device == hidden.device:
        raise ValueError(
            f"hidden, weight, targets: must be on one device, found {hidden.device}, {weight.device}, {targets.device}"
        )
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes: must be positive, found {chunk_bytes}")
    if kept is not None:
        check_kept(kept, targets)
