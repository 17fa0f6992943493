"""The projection of hidden states onto one shard of the vocabulary, a chunk of tokens at a time, and its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .statistics import LOGIT_TYPES
from .vocab_parallel import VocabShard, all_reduce_sum

# By type of device. Long enough that a matrix product per chunk runs at full speed, and that the weight's gradient,
# which every chunk reads and writes, does not dominate; short against the logits of a whole microbatch.
DEFAULT_CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
# Chunks are a multiple of so many tokens, the first that fits: a GPU multiplies in tiles of up to 256 rows, and 187
# tokens took 8 % longer than 192 on the CPU.
CHUNK_MULTIPLES = (128, 32)
# Vocabulary rows of one float32 product on the CPU: a wide and short product streams the weight from memory more often
# than it needs to (a fifth slower at 65536 rows and 192 tokens).
CPU_TILE = 2048


@dataclass(frozen=True)
class TokenChunks:
    """Logits of a chunk of tokens at a time, in one buffer of at most ``chunk_bytes`` (but at least one token).

    ``chunk_bytes`` None is the default of the device; ``hidden`` [T, h] and ``weight`` [V/tp, h] of one type.
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
        """Tokens of a chunk, at most ``most``: no more chunks than needed, of about equal length."""
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
    """Where the float32 gradient of the vocabulary weight is summed: Megatron's ``main_grad``, or a buffer of ours."""

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
            # tensor cores multiply in half precision and sum in float32, onto what is there
            torch.addmm(total, grad_logits.t(), hidden, out_dtype=torch.float32, out=total)
        else:
            total.addmm_(grad_logits.t().to(total.dtype), hidden.to(total.dtype))

    def for_autograd(self) -> Tensor | None:
        """What a backward pass returns for the weight."""
        if self.main_grad is None:
            return self.total.to(self.weight.dtype)
        if hasattr(self.weight, "grad_added_to_main_grad"):
            # Megatron's data-parallel hook wants a gradient to arrive, and does not read it when this is set.
            self.weight.grad_added_to_main_grad = True
            # A weight that is the embedding too gets a second gradient, added to this one, and Megatron reads the sum.
            shared = getattr(self.weight, "zero_out_wgrad", False)
            return torch.zeros_like(self.weight) if shared else torch.empty_like(self.weight)
        return None


def gather_hidden(
    hidden: Tensor, shard: VocabShard, group: dist.ProcessGroup | None, sequence_parallel: bool
) -> Tensor:
    """All tokens' hidden states: under sequence parallelism one all-gather along the tokens, else ``hidden`` itself."""
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
    own = gradient.new_empty((gradient.shape[0] // shard.count, gradient.shape[1]))
    dist.reduce_scatter_tensor(own, gradient, op=dist.ReduceOp.SUM, group=group)
    return own


def check_projection(
    hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard, sequence_parallel: bool, chunk_bytes: int | None
) -> None:
    """Raise ValueError, naming the argument, unless the shapes, types and devices fit together."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden, weight: must be [T, h] and [V/tp, h], found {list(hidden.shape)} and {list(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight: must be [V/tp, h] with V/tp > 0, found {list(weight.shape)}")
    if hidden.dtype not in LOGIT_TYPES or weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden, weight: must be of one type (float32, bfloat16, float16), found {hidden.dtype}, {weight.dtype}"
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
