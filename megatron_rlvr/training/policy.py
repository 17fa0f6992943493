"""The policy in training: its parameters, their optimizer, and the two passes a step makes over a rollout."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rlvr.config import Config
from megatron_rlvr.control import ClipThresholds, SteeringResponse
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.microbatch import Microbatch, MicrobatchConfig, microbatch, partition
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import collectives, cpu_shim, device, optimizer_state, parallel
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.config import OptimizerConfig
from megatron_rlvr.megatron.model import packed_sequences
from megatron_rlvr.objectives import PolicyObjective
from megatron_rlvr.training.head import LOSS_SUMS, Head, MinibatchLoss, TokenScores
from megatron_rlvr.weights.loading import load_folder


@dataclass
class UpdateReport:
    """One optimizer step: sums over this rank's tokens (last stage), and the gradient norm every rank agrees on."""

    sums: Tensor
    """float64 [len(LOSS_SUMS)]"""
    ratio_max: Tensor
    """float32 [], the largest importance ratio; 0 without tokens"""
    grad_norm: float
    forward_backward_seconds: float
    optimizer_seconds: float


class Policy:
    """A PolicyModel under megatron-core's data-parallel wrapper and optimizer.

    Collective: every process of the job calls every method together.

    Attributes:
        parts: this rank's parts of the model, one for each virtual pipeline stage.
        bridge: carries them to and from Hugging Face folders.
    """

    def __init__(self, config: Config, layout: parallel.Layout):
        self.layout = layout
        self.microbatching = MicrobatchConfig(
            # Scoring a whole rollout in one pass would move more memory than its minibatches one by one.
            sequences=config.parallel.microbatch_sequences
            or config.rollout.prompts_per_step
            * config.rollout.samples_per_prompt
            // (config.algorithm.minibatches * layout.data_size),
            tokens=config.parallel.microbatch_tokens,
            # fp8 multiplies rows by the 16, or the 32 of mxfp8's blocks.
            width_multiple=(config.parallel.tensor if config.parallel.sequence else 1)
            * (1 if config.model.fp8 == "none" else 32),
            context_size=config.parallel.context,
            context_rank=parallel.context_rank(),
            mark_padding=config.model.router_aux_loss > 0,
        )
        self.bridge = PolicyBridge(config.model.path, config.model, config.parallel)
        self.model_chunks = self.bridge.build()
        load_folder(self.bridge, self.model_chunks)
        half = self.bridge.dtype != torch.float32
        megatron = self.bridge.config
        wrapping = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=config.parallel.distributed_optimizer
        )
        self._wrapped = [
            DistributedDataParallel(megatron, wrapping, part, disable_bucketing=number > 0)
            for number, part in enumerate(self.model_chunks)
        ]
        for wrapped in self._wrapped:
            wrapped.broadcast_params()
        self.optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.optimizer.learning_rate,
                weight_decay=config.optimizer.weight_decay,
                adam_beta1=config.optimizer.beta1,
                adam_beta2=config.optimizer.beta2,
                adam_eps=config.optimizer.epsilon,
                clip_grad=config.optimizer.clip_grad,
                bf16=half,
                params_dtype=self.bridge.dtype,
                use_distributed_optimizer=config.parallel.distributed_optimizer,
                **_offload(config.optimizer),
            ),
            self._wrapped,
            use_gloo_process_groups=config.parallel.distributed_optimizer,
        )
        _fuse_adam(self.optimizer)
        megatron.grad_scale_func = self.optimizer.scale_loss if half else None
        megatron.finalize_model_grads_func = finalize_model_grads
        self._forward_backward = get_forward_backward_func()
        self.head = Head(
            self.model_chunks[-1], config.rollout.temperature, parallel.tensor_group(), config.algorithm.fused_linear
        )

    def set_learning_rate(self, value: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def score(self, batch: RolloutBatch, advantage: Tensor) -> TokenScores:
        """Log-probs, exact entropies and first-order entropy changes under the present weights.

        Args:
            batch: this rank's rollouts.
            advantage: float32 [N], one for each sequence.
        """
        scores = TokenScores(*(torch.zeros(batch.token_count) for _ in range(4)))

        def keep(output: Tensor, part: Microbatch) -> Tensor:
            self.head.score(output, part, advantage, scores)
            return torch.zeros(1, device=output.device)

        with torch.no_grad():
            self._run(batch, torch.arange(len(batch.tokens)), keep, forward_only=True)
        return scores

    def update(
        self,
        batch: RolloutBatch,
        sequences: Tensor,
        advantage: Tensor,
        token_weight: Tensor,
        scores: TokenScores,
        thresholds: ClipThresholds,
        response: SteeringResponse,
        objective: PolicyObjective,
    ) -> UpdateReport:
        """One optimizer step on a minibatch.

        Args:
            batch: this rank's rollouts.
            sequences: int64 [n], this rank's share of the minibatch.
            advantage: float32 [N], one for each sequence of the batch.
            token_weight: float32 [N], the aggregation weight of every token of each sequence; the loss is
                ``-sum(token_weight * objective)`` over the minibatch's tokens on all data-parallel ranks.
            scores: of `score`, the old policy.
            thresholds: of this step.
            response: of this step's tokens to region steering.
            objective: the token objective.
        """
        # megatron-core averages gradients over data- and context-parallel ranks; our weights already make the plain sum
        # right. Its schedule multiplies by the context-parallel ones itself.
        scale = float(self.layout.data_size)
        loss = MinibatchLoss(
            head=self.head,
            batch=batch,
            advantage=advantage,
            token_weight=token_weight,
            scores=scores,
            thresholds=thresholds,
            response=response,
            objective=objective,
            gradient_scale=scale * self.microbatching.context_size,
            sums=torch.zeros(len(LOSS_SUMS), dtype=torch.float64, device=device.device()),
            ratio_max=torch.zeros((), device=device.device()),
        )
        began = time.perf_counter()
        for wrapped in self._wrapped:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._run(batch, sequences, lambda output, part: loss(output, part) * scale, forward_only=False)
        passed = time.perf_counter()
        _, grad_norm, _ = self.optimizer.step()
        seconds = passed - began, time.perf_counter() - passed
        return UpdateReport(loss.sums, loss.ratio_max, float(grad_norm), *seconds)

    def _partition(self, batch: RolloutBatch, sequences: Tensor) -> list[Tensor]:
        """The microbatches of `sequences`, as many as pipeline and expert-parallel ranks agree on."""
        found = partition(batch, sequences, self.microbatching)
        count = len(found)
        if parallel_state.get_expert_model_parallel_world_size() > 1:
            # Experts get tokens from every data-parallel rank of their group, at every microbatch of each.
            count = int(collectives.max_over_job({"microbatches": count})["microbatches"])
        if len(self.model_chunks) > 1:
            stages = parallel_state.get_pipeline_model_parallel_world_size()
            count = -(-count // stages) * stages
        return found if count == len(found) else partition(batch, sequences, self.microbatching, at_least=count)

    def _run(
        self,
        batch: RolloutBatch,
        sequences: Tensor,
        loss: Callable[[Tensor, Microbatch], Tensor],
        *,
        forward_only: bool,
    ) -> None:
        """Drive megatron-core's schedule over the microbatches of `sequences`; `loss` sees the last stage's output."""
        parts = [microbatch(batch, members, self.microbatching) for members in self._partition(batch, sequences)]
        here = device.device()

        def forward_step(iterator: Iterator[Microbatch], model: torch.nn.Module):
            part = next(iterator)
            with cpu_shim.without_shim():
                output = model(
                    part.tokens.to(here),
                    part.rows.to(here),
                    positions=None if part.positions is None else part.positions.to(here),
                    packed=packed_sequences(part.boundaries, here),
                    padding=None if part.padding is None else part.padding.to(here),
                    hidden_only=self.head.fused,
                )
            return output, lambda output: measure(output, part)

        def measure(output: Tensor, part: Microbatch):
            with cpu_shim.without_shim():
                # megatron-core divides by the number of microbatches, ours are parts of one sum
                return loss(output, part) * len(parts), {}

        for wrapped in self._wrapped:
            wrapped.train()
        self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=[iter(parts) for _ in self._wrapped],
            model=self._wrapped,
            num_microbatches=len(parts),
            seq_length=parts[0].tokens.size(1) * self.microbatching.context_size,
            micro_batch_size=parts[0].tokens.size(0),
            forward_only=forward_only,
        )


def _fuse_adam(optimizer: MegatronOptimizer) -> None:
    """Have torch's Adam, taken without Transformer Engine, pass once over parameters, not ten times.

    On a GPU that spares a float32 copy of all parameters, too.
    """
    for part in optimizer_state.parts(optimizer):
        if isinstance(part.optimizer, torch.optim.Adam):
            for group in part.optimizer.param_groups:
                group["foreach"], group["fused"] = False, True


def _offload(config: OptimizerConfig) -> dict[str, Any]:
    """megatron-core's settings of an optimizer whose state lies, in part, in the memory of the host.

    Raises:
        UserError: on a machine without a GPU, where there is nothing to offload from.
    """
    if not config.cpu_offload:
        return {}
    if not device.on_gpu():
        raise UserError(f"optimizer.cpu_offload={config.cpu_offload} needs a GPU: set it to 0")
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": config.cpu_offload,
        "use_precision_aware_optimizer": True,
        "overlap_cpu_optimizer_d2h_h2d": True,
    }


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Linear warm-up over `warmup_steps`, then constant or cosine down to `min_learning_rate` at the last step."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.min_learning_rate is None:
        return config.learning_rate * warm
    progress = step / max(1, total_steps - 1)
    low = config.min_learning_rate
    return warm * (low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * progress)))
