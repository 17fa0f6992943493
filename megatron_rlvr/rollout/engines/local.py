"""The built-in engine: batched generation with the training weights themselves, through a key/value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import collectives, cpu_shim, device
from megatron_rlvr.megatron.attention import KeyValueCache, SDPAttention
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.rollout.engines.base import SamplingPolicy
from megatron_rlvr.rollout.sampling import draw, uniforms

# Taking finished sequences out copies the whole cache; below this share of running ones the copy pays.
WORTH_COMPACTING = 0.85


class LocalEngine:
    """Generates on the processes that train; there are no weights to move.

    Prompts are prefilled once each, whatever the number of samples; finished sequences leave the batch.

    Raises:
        UserError: under the Transformer Engine layer spec, whose attention does not share this engine's cache.
    """

    collective = True

    def __init__(self, model_chunks: Sequence[PolicyModel], batch: int):
        self.model_chunks = model_chunks
        self.config = model_chunks[0].config
        self.batch = batch
        self.version = 0
        self.attentions = [m for chunk in model_chunks for m in chunk.modules() if isinstance(m, SDPAttention)]
        if len(self.attentions) != sum(len(chunk.decoder.layers) for chunk in model_chunks):
            raise UserError("rollout.engine=local needs model.layer_spec=local: set it, or choose another engine")

    def offload(self) -> None:
        pass

    def update_weights(self, version: int) -> None:
        self.version = version

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingPolicy, seeds: Sequence[int]
    ) -> list[Completion]:
        """See `RolloutEngine.generate`. Collective over the model replica's processes."""
        completions: list[Completion | None] = [None] * len(seeds)
        seed_array = np.array(seeds, dtype=np.uint64)
        # Prompts of like length share a batch, so that little of it is padding.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        prompts_a_batch = max(1, self.batch // sampling.samples)
        was_training = self.model_chunks[0].training
        for chunk in self.model_chunks:
            chunk.eval()
        split = self._without_sequence_parallelism()
        try:
            for start in range(0, len(order), prompts_a_batch):
                chosen = order[start : start + prompts_a_batch]
                slots = np.array([p * sampling.samples + s for p in chosen for s in range(sampling.samples)])
                with cpu_shim.without_shim():
                    drawn = self._generate([prompts[p] for p in chosen], sampling, seed_array[slots])
                for slot, completion in zip(slots, drawn, strict=True):
                    completions[slot] = completion
        finally:
            for chunk in self.model_chunks:
                chunk.train(was_training)
            for owner, name in split:
                setattr(owner, name, True)
        return completions  # type: ignore[return-value]

    def _without_sequence_parallelism(self) -> list[tuple[Any, str]]:
        """Switch it off, for one new token cannot be split over ranks; returns what to switch on again."""
        names = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
        owners = [self.config, *(module for chunk in self.model_chunks for module in chunk.modules())]
        found = [(owner, name) for owner in owners for name in names if getattr(owner, name, False) is True]
        for owner, name in found:
            setattr(owner, name, False)
        return found

    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingPolicy, seeds: np.ndarray
    ) -> list[Completion]:
        rows = torch.arange(len(prompts)).repeat_interleave(sampling.samples)
        logits, padding, width = self._prefill(prompts, width_to_come=sampling.max_tokens)
        for attention in self.attentions:
            attention.cache.reorder(rows, width + sampling.max_tokens)  # type: ignore[union-attr]
        logits, padding = (logits[rows] if logits is not None else None), padding[rows]

        stop = torch.tensor(sampling.stop_token_ids, dtype=torch.long)
        tokens = torch.zeros(len(rows), sampling.max_tokens, dtype=torch.long)
        logprobs = torch.zeros(len(rows), sampling.max_tokens)
        lengths = torch.full((len(rows),), sampling.max_tokens)
        stopped = torch.zeros(len(rows), dtype=torch.bool)
        alive = torch.arange(
            len(rows)
        )  # the sequences still in the batch, finished ones among them until they are many
        for t in range(sampling.max_tokens):
            token, logprob = self._draw(logits, uniforms(seeds[alive.numpy()], t), sampling)
            running = ~stopped[alive]
            tokens[alive[running], t], logprobs[alive[running], t] = token[running], logprob[running]
            ends = alive[running & torch.isin(token, stop)]
            lengths[ends] = t + 1
            stopped[ends] = True
            running = ~stopped[alive]
            if t + 1 == sampling.max_tokens or not bool(running.any()):
                break
            if running.float().mean() < WORTH_COMPACTING:
                keep = running.nonzero()[:, 0]
                alive, token, padding = alive[keep], token[keep], padding[keep]
                for attention in self.attentions:
                    attention.cache.reorder(keep, width + sampling.max_tokens)  # type: ignore[union-attr]
            logits = self._decode(token, padding, width + t)
        for attention in self.attentions:
            attention.cache = None
        return [
            Completion(ids[:n], values[:n], "stop" if done else "length", self.version)
            for ids, values, n, done in zip(
                tokens.tolist(), logprobs.tolist(), lengths.tolist(), stopped.tolist(), strict=True
            )
        ]

    def _prefill(self, prompts: Sequence[Sequence[int]], width_to_come: int) -> tuple[Tensor | None, Tensor, int]:
        """Run the prompts, padded on the left; return last-position logits, paddings [n] and the padded width."""
        width = max(len(p) for p in prompts)
        padding = torch.tensor([width - len(p) for p in prompts])
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        config = self.config
        heads = config.num_query_groups // config.tensor_model_parallel_size
        for attention in self.attentions:
            attention.cache = KeyValueCache(
                len(prompts), heads, width, config.kv_channels, config.params_dtype, device.device()
            )
        position = torch.arange(width)
        hidden_key = position[None, None, :] > position[None, :, None]
        hidden_key = hidden_key | (position[None, None, :] < padding[:, None, None])
        hidden_key = hidden_key & ~torch.eye(width, dtype=torch.bool)  # a padding query sees itself, or softmax is 0/0
        last = (width - 1) * len(prompts) + torch.arange(len(prompts))
        logits = self._forward(tokens, (position - padding[:, None]).clamp(min=0), hidden_key[:, None], last)
        return logits, padding, width

    def _decode(self, token: Tensor, padding: Tensor, position: int) -> Tensor | None:
        keys = torch.arange(position + 1)
        mask = (keys < padding[:, None])[:, None, None] if bool(padding.any()) else None
        return self._forward(token[:, None], (position - padding)[:, None], mask, None)

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, rows: Tensor | None) -> Tensor | None:
        """One pass through the pipeline; whole-vocabulary logits [n, V] on the last stage, None before it."""
        where = device.device()
        tokens, positions = tokens.to(where), positions.to(where)
        mask = mask.to(where) if mask is not None else None
        rows = rows.to(where) if rows is not None else None
        for chunk in self.model_chunks:
            output = self._through(chunk, tokens, rows, positions, mask)
        return output

    def _through(
        self, chunk: PolicyModel, tokens: Tensor, rows: Tensor | None, positions: Tensor, mask: Tensor | None
    ) -> Tensor | None:
        """One pass through this rank's part of a pipeline stage, from and to its neighbours."""
        if not chunk.pre_process:
            shape = (tokens.size(1), tokens.size(0), self.config.hidden_size)
            received = torch.empty(shape, dtype=self.config.params_dtype, device=tokens.device)
            collectives.receive_from_previous_stage(received)
            chunk.set_input_tensor(received)
        output = chunk(tokens, rows, positions=positions, attention_mask=mask)
        if not chunk.post_process:
            collectives.send_to_next_stage(output)
            return None
        if self.config.tensor_model_parallel_size > 1:
            ranks = self.config.tensor_model_parallel_size
            missing = -(-chunk.vocabulary // ranks) - output.size(-1)  # of the last shard, if ranks do not divide it
            output = torch.nn.functional.pad(output, (0, missing))
            output = torch.cat(collectives.all_gather_over_tensor_ranks(output), dim=-1)[:, : chunk.vocabulary]
        return output

    def _draw(self, logits: Tensor | None, uniform: np.ndarray, sampling: SamplingPolicy) -> tuple[Tensor, Tensor]:
        """Draw on the last stage; every process of the replica gets the tokens [n] and log-probs [n], on the CPU."""
        drawn = torch.empty(2, len(uniform), dtype=torch.float64, device=device.device())
        if logits is not None:
            threshold = torch.from_numpy(uniform).to(logits.device)
            drawn[0], drawn[1] = draw(logits, threshold, sampling.temperature, sampling.top_p, sampling.top_k)
        collectives.broadcast_from_last_stage(drawn)
        token, logprob = drawn.cpu()
        return token.long(), logprob.float()
