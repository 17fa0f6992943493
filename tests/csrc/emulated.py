"""The emulated kernels as functions of torch tensors, and their expected results in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

LOGITS_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NO_BAD_ROW = 2**31 - 1
IGNORED = -100


@dataclass
class Statistics:
    logprob: Tensor
    entropy: Tensor
    state: Tensor
    moments: Tensor | None
    bad_rows: list[int]


class Kernels:
    """Calls the kernels: allocates the outputs and passes addresses."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def partials(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        temperature: float = 1.0,
        vocabulary_start: int = 0,
        second_moments: bool = False,
        multiprocessors: int = 1,
    ) -> Tensor:
        rows, vocabulary = logits.shape
        width = 6 if second_moments else 4
        partials = torch.full((rows, width), torch.nan)
        needed = self.module.row_statistics_workspace(rows, vocabulary, second_moments, multiprocessors)
        workspace = torch.full((needed,), torch.nan)
        self.module.row_statistics(
            logits.data_ptr(), LOGITS_TYPES[logits.dtype], rows, vocabulary, logits.stride(0), targets.data_ptr(),
            vocabulary_start, 1.0 / temperature, second_moments, partials.data_ptr(), workspace.data_ptr(),
            multiprocessors,
        )  # fmt: skip
        return partials

    def combine(
        self, partials: Tensor, targets: Tensor, vocabulary: int, *, temperature: float = 1.0, report: bool = True
    ) -> Statistics:
        shards, rows, width = partials.shape
        second_moments = width == 6
        logprob, entropy = torch.full((rows,), torch.nan), torch.full((rows,), torch.nan)
        state = torch.full((rows, 4), torch.nan)
        moments = torch.full((2, rows), torch.nan) if second_moments else None
        bad_rows = torch.full((2,), NO_BAD_ROW, dtype=torch.int32)
        self.module.combine_statistics(
            partials.data_ptr(), shards, rows, second_moments, targets.data_ptr(), vocabulary, 1.0 / temperature,
            logprob.data_ptr(), entropy.data_ptr(), state.data_ptr(), 0 if moments is None else moments.data_ptr(),
            bad_rows.data_ptr() if report else 0,
        )  # fmt: skip
        return Statistics(logprob, entropy, state, moments, bad_rows.tolist())

    def statistics(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        shards: int = 1,
        temperature: float = 1.0,
        second_moments: bool = False,
        multiprocessors: int = 1,
    ) -> Statistics:
        """Log-prob and entropy; the vocabulary is cut into equal shards, which combine as tensor-parallel ranks do."""
        width = logits.shape[1] // shards
        partials = [
            self.partials(
                # Copied, as on a separate rank: the memory after a row of the shard must not be the next shard.
                logits[:, rank * width : (rank + 1) * width].contiguous() if shards > 1 else logits,
                targets,
                temperature=temperature,
                vocabulary_start=rank * width,
                second_moments=second_moments,
                multiprocessors=multiprocessors,
            )
            for rank in range(shards)
        ]
        return self.combine(torch.stack(partials), targets, logits.shape[1], temperature=temperature)

    def gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        state: Tensor,
        gradient_logprob: Tensor | None,
        gradient_entropy: Tensor | None,
        *,
        out: Tensor,
        temperature: float = 1.0,
        vocabulary_start: int = 0,
        multiprocessors: int = 1,
    ) -> None:
        self.module.logits_gradient(
            logits.data_ptr(), out.data_ptr(), LOGITS_TYPES[logits.dtype], logits.shape[0], logits.shape[1],
            logits.stride(0), out.stride(0), targets.data_ptr(), vocabulary_start, 1.0 / temperature,
            state.data_ptr(), 0 if gradient_logprob is None else gradient_logprob.data_ptr(),
            0 if gradient_entropy is None else gradient_entropy.data_ptr(), multiprocessors,
        )  # fmt: skip

    def kept_partials(
        self,
        logits: Tensor,
        targets: Tensor,
        ids: Tensor,
        offsets: Tensor,
        *,
        temperature: float = 1.0,
        vocabulary_start: int = 0,
    ) -> Tensor:
        """Partial statistics with second moments, under kept sets: row r keeps ids[offsets[r]:offsets[r + 1]]."""
        rows, vocabulary = logits.shape
        partials = torch.full((rows, 6), torch.nan)
        self.module.kept_row_statistics(
            logits.data_ptr(), LOGITS_TYPES[logits.dtype], rows, vocabulary, logits.stride(0), targets.data_ptr(),
            ids.data_ptr(), len(ids), offsets.data_ptr(), vocabulary_start, 1.0 / temperature, True,
            partials.data_ptr(),
        )  # fmt: skip
        return partials

    def kept_gradient(
        self,
        logits: Tensor,
        targets: Tensor,
        ids: Tensor,
        offsets: Tensor,
        state: Tensor,
        gradient_logprob: Tensor,
        gradient_entropy: Tensor,
        *,
        out: Tensor,
        temperature: float = 1.0,
        vocabulary_start: int = 0,
    ) -> None:
        self.module.kept_logits_gradient(
            logits.data_ptr(), out.data_ptr(), LOGITS_TYPES[logits.dtype], *logits.shape, logits.stride(0),
            out.stride(0), targets.data_ptr(), ids.data_ptr(), len(ids), offsets.data_ptr(), vocabulary_start,
            1.0 / temperature, state.data_ptr(), gradient_logprob.data_ptr(), gradient_entropy.data_ptr(),
        )  # fmt: skip

    def objective(
        self,
        logprob: Tensor,
        old_logprob: Tensor,
        advantage: Tensor,
        clip: tuple[float, float, float, float] | tuple[Tensor, Tensor],
        *,
        dual_clip: float = math.inf,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        entropy: Tensor | None = None,
        counts: Tensor | None = None,
        gate: Tensor | None = None,
        multiprocessors: int = 2,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``clip``: lower intercept, lower slope, upper intercept, upper slope; or (low, high) of each token.

        ``gate`` uint8 [T], where given, is filled in.
        """
        objective, gradient = torch.full_like(logprob, torch.nan), torch.full_like(logprob, torch.nan)
        counts = torch.zeros(6, dtype=torch.int64) if counts is None else counts
        optional = [0 if tensor is None else tensor.data_ptr() for tensor in (mask, weight, entropy)]
        scalars, bounds = (clip, (0, 0)) if len(clip) == 4 else ((0.0,) * 4, [bound.data_ptr() for bound in clip])
        self.module.clipped_objective(
            logprob.data_ptr(), old_logprob.data_ptr(), advantage.data_ptr(), *optional, logprob.numel(), *scalars,
            *bounds, dual_clip, objective.data_ptr(), gradient.data_ptr(), 0 if gate is None else gate.data_ptr(),
            counts.data_ptr(), multiprocessors,
        )  # fmt: skip
        return objective, gradient, counts

    def traffic(self) -> tuple[int, int]:
        """Bytes loaded and stored since the last ``reset_traffic``."""
        return self.module.traffic()

    def reset_traffic(self) -> None:
        self.module.reset_traffic()

    def set_order(self, order: int) -> None:
        self.module.set_order(order)


def exact_statistics(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and the two second moments [2, T] in float64; log-prob is 0 for ignored targets."""
    scaled = logits.double() / temperature
    log_probability = torch.log_softmax(scaled, dim=-1)
    probability = log_probability.exp()
    finite = torch.where(probability > 0, log_probability, torch.zeros_like(log_probability))
    entropy = -(probability * finite).sum(-1)
    moments = torch.stack([probability.square().sum(-1), (probability.square() * finite).sum(-1)])
    logprob = log_probability.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets == IGNORED, torch.zeros_like(logprob), logprob), entropy, moments


def exact_gradient(
    logits: Tensor, targets: Tensor, gradient_logprob: Tensor, gradient_entropy: Tensor, temperature: float = 1.0
) -> Tensor:
    """d (g . logprob + h . entropy) / d logits in float64, by the plain formula, which is accurate in float64."""
    log_probability = torch.log_softmax(logits.double() / temperature, dim=-1)
    probability = log_probability.exp()
    finite = torch.where(probability > 0, log_probability, torch.zeros_like(log_probability))
    entropy = -(probability * finite).sum(-1, keepdim=True)
    has_target = targets != IGNORED
    g = torch.where(has_target, gradient_logprob.double(), 0.0).unsqueeze(-1)
    h = gradient_entropy.double().unsqueeze(-1)
    one_hot = torch.zeros_like(probability)
    one_hot[has_target] = one_hot[has_target].scatter(-1, targets[has_target].unsqueeze(-1), 1.0)
    others = torch.where(one_hot == 1, 0.0, probability).sum(-1, keepdim=True)  # 1 - p of the target, uncancelled
    from_logprob = torch.where(one_hot == 1, others, -probability)
    return (g * from_logprob - h * probability * (finite + entropy)) / temperature
