"""The policy in training: its weights and optimizer, and the two passes over a rollout, scoring and updating."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlvr.config import Config
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.microbatch import Microbatch, MicrobatchConfig, build_microbatch, partition
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import lora, optimizer, parallel, pipeline, waiting
from megatron_rlvr.megatron.batch_invariance import batch_invariant, check_products
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.layout_checks import check_routers
from megatron_rlvr.megatron.loss_scale import LossScale
from megatron_rlvr.megatron.routing_replay import connect, router_shape
from megatron_rlvr.objectives import UpdateObjective
from megatron_rlvr.training.head import Head, TokenScores
from megatron_rlvr.training.loss import MinibatchLoss
from megatron_rlvr.weights.adapter_record import adapter_record, weights_digest
from megatron_rlvr.weights.companions import check_companions
from megatron_rlvr.weights.loading import check_folder, load_folder
from megatron_rlvr.weights.shape_checks import FolderWeights


@dataclass
class UpdateReport:
    """Measurements of one optimizer step."""

    sums: Tensor
    """float64 [len(LOSS_SUMS)], `MinibatchLoss.sums` over this rank's tokens; zeros before the last pipeline stage."""
    ratio_max: Tensor
    """float32 [], the largest importance ratio; 0 without tokens."""
    grad_norm: float
    """Norm of the gradient before clipping, the same on every rank."""
    applied: bool
    """Whether the optimizer stepped: it does not if the loss or the gradient is not finite on some rank."""
    forward_backward_seconds: float
    optimizer_seconds: float


class Policy:
    """The model chunks of this rank with megatron-core's data-parallel wrapper and optimizer.

    Collective: every process of the job calls every method together.

    Attributes:
        layout: position of this process in the process groups.
        bridge: maps the weights to and from Hugging Face tensors.
        model_chunks: one model chunk, or one per virtual pipeline stage.
        optimizer: megatron-core's optimizer.
        adapter_record: what checkpoints say of the adapters; None if all weights are trained.
        microbatching: how a minibatch is split into microbatches.
        routers: routers of the model, whose routes rollouts must have; None without ``rollout.routing_replay``.

    Raises:
        UserError: if the model, its weights or a setting cannot be used.
    """

    def __init__(self, config: Config, layout: parallel.Layout):
        distributed = config.parallel.distributed_optimizer
        self.layout = layout
        self.microbatching = _microbatching(config, layout)
        self.bridge = PolicyBridge(config.model, config.parallel, config.lora)
        self.routers = None
        if config.rollout.routing_replay:
            check_routers(self.bridge.hf_config, config.model.path)
            self.routers = router_shape(self.bridge.config)
        found = check_folder(self.bridge)
        check_companions(self.bridge.path)
        self.model_chunks = self.bridge.build()
        if self.routers is not None:
            connect(self.model_chunks, self.routers)
        load_folder(self.bridge, self.model_chunks, found)
        self._batch_invariant = config.model.batch_invariant
        if self._batch_invariant:
            check_products(weight for chunk in self.model_chunks for weight in chunk.parameters() if weight.dim() == 2)
        self.adapter_record = None
        if self.bridge.adapters is not None:
            lora.initialize(self.model_chunks, config.seed)
            self.adapter_record = adapter_record(self.bridge, _base_digest(found, layout))
        self._wrapped = optimizer.wrap_data_parallel(
            self.model_chunks, self.bridge.config, distributed_optimizer=distributed
        )
        self.optimizer = optimizer.build_optimizer(
            self._wrapped, config.optimizer, self.bridge.config, distributed=distributed
        )
        self._loss_scale = LossScale(layout.data_size, config.parallel.context)
        self._head = Head(
            self.model_chunks[-1], config.rollout.temperature, parallel.tensor_group(), config.algorithm.fused_linear
        )

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of the next updates."""
        optimizer.set_learning_rate(self.optimizer, value)

    def score(self, batch: RolloutBatch, advantage: Tensor | None = None) -> TokenScores:
        """Compute log-probs, exact entropies and first-order entropy changes under the current weights.

        Args:
            batch: this rank's rollouts; their routes are replayed.
            advantage: float32 [N], advantage of each sequence; None scores for advantage 1 (see `TokenScores.under`).
        """
        scores = TokenScores.zeros(batch.token_count)
        advantage = torch.ones(len(batch.tokens)) if advantage is None else advantage

        def score_microbatch(output: Tensor, microbatch: Microbatch) -> Tensor:
            self._head.score(output, microbatch, advantage, scores)
            return torch.zeros(1, device=output.device)  # the pipeline schedule needs a loss

        with torch.no_grad():
            self._run(batch, torch.arange(len(batch.tokens)), score_microbatch, forward_only=True)
        return scores

    def update(
        self,
        batch: RolloutBatch,
        sequences: Tensor,
        advantage: Tensor,
        token_weight: Tensor,
        scores: TokenScores,
        objective: UpdateObjective,
    ) -> UpdateReport:
        """Take one optimizer step on a minibatch.

        Args:
            batch: this rank's rollouts.
            sequences: int64 [n], this rank's share of the minibatch.
            advantage: float32 [N], advantage of each sequence of the batch.
            token_weight: float32 [N], aggregation weight of the tokens of each sequence. The loss is
                ``-sum(token_weight * objective)`` over the minibatch's tokens on all data-parallel ranks.
            scores: result of `score` before the first update of the step.
            objective: what this update maximises.
        """
        loss = MinibatchLoss(
            head=self._head,
            batch=batch,
            advantage=advantage,
            token_weight=token_weight,
            scores=scores,
            objective=objective,
            backward_scale=self._loss_scale.backward,
        )
        began = time.perf_counter()
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.bridge.config.finalize_model_grads_func = optimizer.finalize_gradients_with(loss.zero_if_finite)
        self._run(batch, sequences, loss, forward_only=False)
        backward_ended = time.perf_counter()
        grad_norm, applied = optimizer.take_step(self.optimizer)
        seconds = backward_ended - began, time.perf_counter() - backward_ended
        return UpdateReport(loss.sums, loss.ratio_max, grad_norm, applied, *seconds)

    @property
    def own_routers(self) -> list[int]:
        """Numbers of the routers in this process's layers, ascending; empty without ``rollout.routing_replay``."""
        connected = [chunk.routing.routers for chunk in self.model_chunks if chunk.routing is not None]
        return sorted(number for routers in connected for number in range(routers.start, routers.stop))

    def take_route_counts(self) -> Tensor:
        """Return and clear `RoutingReplay.counts` of this process: int64 [2] on the CPU."""
        counts = torch.zeros(2, dtype=torch.int64)
        for chunk in self.model_chunks:
            if chunk.routing is not None:
                counts += chunk.routing.counts.cpu()
                chunk.routing.counts.zero_()
        return counts

    @torch.no_grad()
    def weights_are_finite(self) -> Tensor:
        """Return whether all weights of this rank are finite: bool [], without waiting for the device."""
        weights = [weight for chunk in self.model_chunks for weight in chunk.parameters()]
        return torch.isfinite(torch.nn.utils.get_total_norm(weights, float("inf")))

    def _run(
        self,
        batch: RolloutBatch,
        sequences: Tensor,
        loss: Callable[[Tensor, Microbatch], Tensor],
        *,
        forward_only: bool,
    ) -> None:
        """Run `sequences` through the pipeline in microbatches; `loss` receives the output of the last stage."""
        members = partition(batch, sequences, self.microbatching)
        count = pipeline.agreed_microbatch_count(len(members), len(self.model_chunks))
        if count != len(members):
            members = partition(batch, sequences, self.microbatching, at_least=count)
        with batch_invariant(self._batch_invariant):
            pipeline.forward_backward(
                self._wrapped,
                [build_microbatch(batch, chosen, self.microbatching) for chosen in members],
                loss,
                scale=self._loss_scale,
                hidden_only=self._head.fused,
                forward_only=forward_only,
            )
        for chunk in self.model_chunks:
            if chunk.routing is not None:
                chunk.routing.check_finished()


def _base_digest(found: FolderWeights, layout: parallel.Layout) -> str:
    """Return the checksum of the frozen weights, which rank 0 reads. Collective over the job."""
    digest = weights_digest(found) if layout.is_main else None
    return waiting.broadcast_from_main(digest, "rank 0 to identify the weights of model.path")


def check_finite_weights(policy: Policy, remedy: str) -> None:
    """Refuse weights that are not finite on some process. Collective over the job: one all-reduce.

    Raises:
        UserError: on every process; its text ends with `remedy`.
    """
    if not weights_are_finite_everywhere(policy):
        raise UserError(f"the policy has weights that are not finite: {remedy}")


def weights_are_finite_everywhere(policy: Policy) -> bool:
    """Whether all weights of all processes are finite. Collective over the job: one all-reduce.

    It waits outside NCCL, because other processes may still write the metrics of the step to the disk.
    """
    return not waiting.any_rank(not bool(policy.weights_are_finite()), "every process to check its weights")


def _microbatching(config: Config, layout: parallel.Layout) -> MicrobatchConfig:
    """Return how a minibatch is split into microbatches. Scoring splits the rollout in the same way."""
    sequences_per_step = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    return MicrobatchConfig(
        # By default a microbatch is a rank's share of a minibatch, also in scoring: one pass over the whole rollout
        # would move more memory.
        sequences=config.parallel.microbatch_sequences
        or sequences_per_step // (config.algorithm.minibatches * layout.data_size),
        tokens=config.parallel.microbatch_tokens,
        # Sequence parallelism splits the width over tensor-parallel ranks. fp8 needs a multiple of 16 rows, and mxfp8 a
        # multiple of 32, the size of its blocks.
        width_multiple=(config.parallel.tensor if config.parallel.sequence else 1)
        * (1 if config.model.fp8 == "none" else 32),
        width_step=config.parallel.width_step or 1,
        context_size=config.parallel.context,
        context_rank=parallel.context_rank(),
        mark_padding=config.model.router_aux_loss > 0,
    )
