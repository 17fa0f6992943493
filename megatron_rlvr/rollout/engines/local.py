"""The local engine: batched generation in the training processes, with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from megatron_rlvr import ops
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.data.kept_tokens import KeptTokens
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import collectives, cpu_shim, device, waiting
from megatron_rlvr.megatron.attention import KeyValueCache, SDPAttention
from megatron_rlvr.megatron.batch_invariance import batch_invariant
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.megatron.pipeline_forward import pipeline_forward
from megatron_rlvr.rollout.engines.base import GroupRequest, OnGroup
from megatron_rlvr.rollout.engines.rounded_weights import RoundedWeights
from megatron_rlvr.rollout.engines.route_recorder import RouteRecorder
from megatron_rlvr.rollout.sampling import SamplingSettings, draw, uniforms

# Finished sequences are removed from the batch when a smaller share than this is still running. Removing them copies
# the whole cache, so removing a few would cost more than it saves.
COMPACT_BELOW = 0.85

# The leader verifies completions between two of its calls, so the other processes wait outside NCCL.
_NEXT_PROMPTS = "the leader's next prompts, or the end of its rollout"


class LocalEngine:
    """Generates in the training processes, so that no weights need to be transferred.

    Each prompt is prefilled once for all its completions. Finished sequences leave the batch.

    Args:
        model_chunks: model chunks of this process.
        batch: number of sequences that are decoded together.
        rounded: the weights to generate with; None generates with the trained weights.
        invariant: whether to compute as ``model.batch_invariant`` asks for.

    Raises:
        UserError: if the model uses Transformer Engine layers, whose attention cannot use this engine's cache.
    """

    streaming = False
    draws_from_policy = True

    def __init__(
        self,
        model_chunks: Sequence[PolicyModel],
        batch: int,
        rounded: RoundedWeights | None = None,
        invariant: bool = False,
    ):
        self.rounded, self.invariant = rounded, invariant
        self.model_chunks = model_chunks
        self.config = model_chunks[0].config
        self.batch = batch
        self.version = 0
        self.attentions = [m for chunk in model_chunks for m in chunk.modules() if isinstance(m, SDPAttention)]
        if len(self.attentions) != sum(len(chunk.decoder.layers) for chunk in model_chunks):
            raise UserError("rollout.engine=local needs model.layer_spec=local: set it, or choose another engine")

    def offload(self) -> None:
        pass

    def update_weights(self, version: int) -> dict[str, float]:
        self.version = version
        if self.rounded is not None:
            self.rounded.update()
        return {}

    def generate(
        self, requests: Sequence[GroupRequest], sampling: SamplingSettings, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. Broadcasts the requests to the replica's other processes."""
        waiting.broadcast_from_leader((requests, sampling), _NEXT_PROMPTS)
        return self._generate(requests, sampling)

    def assist(self) -> None:
        """See `RolloutEngine.assist`. Computes this process's share of the model in the leader's calls."""
        shared: tuple[Sequence[GroupRequest], SamplingSettings] | None
        while (shared := waiting.broadcast_from_leader(None, _NEXT_PROMPTS)) is not None:
            self._generate(*shared)

    def dismiss(self) -> None:
        waiting.broadcast_from_leader(None, _NEXT_PROMPTS)

    @torch.no_grad()
    def _generate(self, requests: Sequence[GroupRequest], sampling: SamplingSettings) -> list[list[Completion]]:
        """Generate batch by batch. Collective over the model replica's processes."""
        groups: list[list[Completion]] = [[] for _ in requests]
        prompts_per_batch = max(1, self.batch // sampling.samples)
        with (
            self._inference_mode(),
            self.rounded.in_place() if self.rounded else nullcontext(),
            batch_invariant(self.invariant),
        ):
            for chosen in self._batches(requests, prompts_per_batch):
                recorder = RouteRecorder(self.model_chunks, sampling.routers) if sampling.routers else None
                with cpu_shim.without_shim(), recorder.recording() if recorder else nullcontext():
                    completions = self._generate_batch([requests[i] for i in chosen], sampling, recorder)
                for place, index in enumerate(chosen):
                    groups[index] = completions[place * sampling.samples : (place + 1) * sampling.samples]
        return groups

    def _batches(self, requests: Sequence[GroupRequest], prompts: int) -> Iterator[list[int]]:
        """Yield the indices of the requests of each batch: prompts of similar length, so that there is little padding.

        Blocks of attention begin at the first key, so prompts must not be padded on the left for batch invariance.
        """
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        lengths: Iterable[tuple[int, Iterable[int]]]
        lengths = groupby(order, key=lambda i: len(requests[i].prompt)) if self.invariant else [(0, order)]
        for _, same in lengths:
            members = list(same)
            yield from (members[start : start + prompts] for start in range(0, len(members), prompts))

    @contextmanager
    def _inference_mode(self) -> Iterator[None]:
        """Switch the model to evaluation mode, without sequence parallelism, which cannot split one new token."""
        was_training = self.model_chunks[0].training
        names = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
        owners = [self.config, *(module for chunk in self.model_chunks for module in chunk.modules())]
        switched_off = [(owner, name) for owner in owners for name in names if getattr(owner, name, False) is True]
        for owner, name in switched_off:
            setattr(owner, name, False)
        for chunk in self.model_chunks:
            chunk.eval()
        try:
            yield
        finally:
            for chunk in self.model_chunks:
                chunk.train(was_training)
            for owner, name in switched_off:
                setattr(owner, name, True)

    def _generate_batch(
        self, requests: Sequence[GroupRequest], sampling: SamplingSettings, recorder: RouteRecorder | None
    ) -> list[Completion]:
        seeds = np.array([seed for request in requests for seed in request.seeds], dtype=np.uint64)
        rows = torch.arange(len(requests)).repeat_interleave(sampling.samples)
        logits, padding, width = self._prefill([request.prompt for request in requests])
        if recorder:
            recorder.prefilled(padding, width, sampling.samples, sampling.max_tokens)
        for attention in self.attentions:
            attention.cache.reorder(rows, width + sampling.max_tokens)  # type: ignore[union-attr]
        logits, padding = (logits[rows] if logits is not None else None), padding[rows]

        stop = torch.tensor(sampling.stop_token_ids, dtype=torch.long)
        tokens = torch.zeros(len(rows), sampling.max_tokens, dtype=torch.long)
        logprobs = torch.zeros(len(rows), sampling.max_tokens)
        lengths = torch.full((len(rows),), sampling.max_tokens)
        stopped = torch.zeros(len(rows), dtype=torch.bool)
        # Indices of the sequences in the batch. Finished ones stay in it until enough of them can be removed at once.
        batch = torch.arange(len(rows))
        kept_sets: list[list[np.ndarray]] = [[] for _ in rows]  # filled on the last pipeline stage
        for t in range(sampling.max_tokens):
            token, logprob, kept = self._draw(logits, uniforms(seeds[batch.numpy()], t), sampling)
            running = ~stopped[batch]
            if kept is not None:
                for sequence, ids in zip(batch[running].tolist(), _ids_of_rows(kept[running]), strict=True):
                    kept_sets[sequence].append(ids)
            tokens[batch[running], t], logprobs[batch[running], t] = token[running], logprob[running]
            ends = batch[running & torch.isin(token, stop)]
            lengths[ends] = t + 1
            stopped[ends] = True
            running = ~stopped[batch]
            if t + 1 == sampling.max_tokens or not bool(running.any()):
                break
            if running.float().mean() < COMPACT_BELOW:
                keep = running.nonzero()[:, 0]
                batch, token, padding = batch[keep], token[keep], padding[keep]
                for attention in self.attentions:
                    attention.cache.reorder(keep, width + sampling.max_tokens)  # type: ignore[union-attr]
            logits = self._decode(token, padding, width + t)
            if recorder:
                recorder.decoded(batch, t)
        for attention in self.attentions:
            attention.cache = None
        kept_tokens: list[KeptTokens | None] = [None] * len(rows)
        if sampling.returns_kept:
            kept_tokens = collectives.object_from_last_stage([_kept_tokens(sets) for sets in kept_sets])
        routes = recorder.routes(lengths) if recorder else [None] * len(rows)
        return [
            Completion(ids[:n], values[:n], "stop" if done else "length", self.version, kept=kept, routes=experts)
            for ids, values, n, done, kept, experts in zip(
                tokens.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist(), kept_tokens, routes, strict=True
            )
        ]

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor | None, Tensor, int]:
        """Run the prompts, padded on the left, and fill the cache.

        Returns:
            the logits of the last position [n, V], None before the last pipeline stage; the number of padding tokens of
            each prompt, int64 [n]; and the padded width.
        """
        width = max(len(p) for p in prompts)
        padding = torch.tensor([width - len(p) for p in prompts])
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        for attention in self.attentions:
            attention.cache = KeyValueCache(width)
        position = torch.arange(width)
        hidden_key = position[None, None, :] > position[None, :, None]
        hidden_key = hidden_key | (position[None, None, :] < padding[:, None, None])
        # A padding query must see itself, because softmax without any key is 0 / 0.
        hidden_key = hidden_key & ~torch.eye(width, dtype=torch.bool)
        last = (width - 1) * len(prompts) + torch.arange(len(prompts))
        positions = (position - padding[:, None]).clamp(min=0)
        return pipeline_forward(self.model_chunks, tokens, positions, hidden_key[:, None], last), padding, width

    def _decode(self, token: Tensor, padding: Tensor, position: int) -> Tensor | None:
        """Return the logits [n, V] after one more token per sequence; None before the last pipeline stage.

        Args:
            token: int64 [n], the latest token of each sequence.
            padding: int64 [n], padding tokens on the left of each sequence.
            position: column of `token`, counted with the padding.
        """
        keys = torch.arange(position + 1)
        mask = (keys < padding[:, None])[:, None, None] if bool(padding.any()) else None
        return pipeline_forward(self.model_chunks, token[:, None], (position - padding)[:, None], mask, None)

    def _draw(
        self, logits: Tensor | None, uniform: np.ndarray, sampling: SamplingSettings
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draw a token per sequence on the last pipeline stage and send them to every process of the replica.

        Returns:
            tokens int64 [n] and log-probs float32 [n]; and, on the last stage, if `sampling` asks for them, the kept
            tokens, bool [n, V]. All on the CPU.
        """
        drawn = torch.empty(2, len(uniform), dtype=torch.float64, device=device.device())
        kept = None
        if logits is not None:
            threshold = torch.from_numpy(uniform).to(logits.device)
            drawn[0], drawn[1], kept = draw(logits, threshold, sampling.temperature, sampling.top_p, sampling.top_k)
            if self.invariant:  # the operator of the scoring pass, whose sums have another order than torch's
                sets = None if kept is None else ops.KeptSets.of(kept.sum(-1), kept.nonzero()[:, 1])
                drawn[1] = ops.token_statistics(
                    logits, drawn[0].long(), temperature=sampling.temperature, kept=sets
                ).logprob
            if sampling.returns_kept and kept is None:  # top_k is at least the vocabulary
                kept = torch.ones_like(logits, dtype=torch.bool)
        collectives.broadcast_from_last_stage(drawn)
        token, logprob = drawn.cpu()
        returned = kept.cpu() if kept is not None and sampling.returns_kept else None
        return token.long(), logprob.float(), returned


def _ids_of_rows(mask: Tensor) -> list[np.ndarray]:
    """Return the columns that are true in each row of `mask`, bool [n, V]: int32 arrays."""
    if not len(mask):
        return []
    ends = mask.sum(-1).cumsum(0).numpy()
    return np.split(mask.nonzero()[:, 1].int().numpy(), ends[:-1])


def _kept_tokens(sets: Sequence[np.ndarray]) -> KeptTokens | None:
    """Join the kept sets of a completion's tokens; None on a stage that has none."""
    if not sets:
        return None
    return KeptTokens(np.array([len(ids) for ids in sets], np.int32), np.concatenate(sets))
