"""The policy in training: its parameters, their optimizer, and the two passes a step makes over a rollout."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_rlvr import ops
from megatron_rlvr.backend import device, parallel
from megatron_rlvr.backend.huggingface import PolicyBridge
from megatron_rlvr.backend.model import PolicyModel
from megatron_rlvr.config import Config, OptimizerConfig
from megatron_rlvr.control import ClipThresholds, SteeringResponse
from megatron_rlvr.control.regions import classify, entropy_change, gradient_norm, steering_weights
from megatron_rlvr.data.batch import Microbatch, RolloutBatch
from megatron_rlvr.objectives import TokenInputs, TokenObjective


@dataclass
class TokenScores:
    """What the training weights say of a rollout before its updates; flat [T] in the batch's token order.

    Known on the last pipeline stage, and zeros elsewhere: only sums leave it.
    """

    logprob: Tensor
    entropy: Tensor
    entropy_change: Tensor
    """First-order entropy change of each token's objective per unit of learning rate, in nats."""
    ascent: Tensor
    """First-order rise of each token's own objective per unit of learning rate."""


UPDATE_SUMS = (
    "loss",
    "active_tokens",
    "clipped_high",
    "clipped_low",
    "E1",
    "E2",
    "E3",
    "E4",
    "entropy_drift",
)


@dataclass
class UpdateReport:
    """One optimizer step: sums over this rank's tokens (last stage), and the gradient norm every rank agrees on."""

    sums: Tensor
    """float64 [len(UPDATE_SUMS)]"""
    ratio_max: Tensor
    """float32 [], the largest importance ratio; 0 without tokens"""
    grad_norm: float


class Policy:
    """A PolicyModel under megatron-core's data-parallel wrapper and optimizer.

    Collective: every process of the job calls every method together.
    """

    def __init__(self, config: Config, layout: parallel.Layout):
        self.layout = layout
        self.temperature = config.rollout.temperature
        self.microbatch_sequences = config.parallel.microbatch_sequences
        self.width_multiple = config.parallel.tensor if config.parallel.sequence else 1
        self.bridge = PolicyBridge(config.model.path, config.model, config.parallel)
        self.model: PolicyModel = self.bridge.build()
        self.bridge.load(self.model)
        half = self.bridge.dtype != torch.float32
        self._wrapped = DistributedDataParallel(
            self.model.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=config.parallel.distributed_optimizer
            ),
            self.model,
        )
        self._wrapped.broadcast_params()
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
            ),
            [self._wrapped],
            use_gloo_process_groups=False,
        )
        megatron = self.model.config
        megatron.grad_scale_func = self.optimizer.scale_loss if half else None
        megatron.finalize_model_grads_func = finalize_model_grads
        self._forward_backward = get_forward_backward_func()
        self._tensor_group = parallel.tensor_group()
        # Of the last stage's tensor-parallel ranks, which all know the same sums, one reports them.
        self.reports = layout.is_last_stage and parallel_state.get_tensor_model_parallel_rank() == 0

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

        def keep(output: Tensor, part: Microbatch) -> tuple[Tensor, dict]:
            statistics = ops.token_statistics(
                output,
                part.targets.to(output.device),
                temperature=self.temperature,
                group=self._tensor_group,
                second_moments=True,
            )
            squared, squared_logprob = statistics.sum_squared_prob, statistics.sum_squared_prob_logprob
            assert squared is not None and squared_logprob is not None
            token_advantage = advantage[part.sequences][part.sequence_index].to(output.device)
            change = entropy_change(statistics.logprob, statistics.entropy, token_advantage, squared, squared_logprob)
            scores.ascent[part.flat] = gradient_norm(statistics.logprob, token_advantage, squared).cpu()
            scores.logprob[part.flat] = statistics.logprob.cpu()
            scores.entropy[part.flat] = statistics.entropy.cpu()
            scores.entropy_change[part.flat] = change.cpu()
            return torch.zeros(1, device=output.device), {}

        with torch.no_grad():
            sequences = torch.arange(len(batch.tokens))
            self._run(batch, sequences, keep, forward_only=True)
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
        objective: TokenObjective,
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
        where = device.device()
        sums = torch.zeros(len(UPDATE_SUMS), dtype=torch.float64, device=where)
        ratio_max = torch.zeros((), device=where)
        microbatches = -(-len(sequences) // (self.microbatch_sequences or len(sequences)))
        # megatron-core divides the loss by the microbatches and averages gradients over data-parallel ranks; our
        # weights already make the plain sum right.
        undo = microbatches * parallel_state.get_data_parallel_world_size(with_context_parallel=True)

        def loss(output: Tensor, part: Microbatch) -> tuple[Tensor, dict]:
            targets, flat, index = (x.to(where) for x in (part.targets, part.flat, part.sequence_index))
            statistics = ops.token_statistics(output, targets, temperature=self.temperature, group=self._tensor_group)
            old_logprob = scores.logprob.to(where)[flat]
            token_advantage = advantage[part.sequences].to(where)[index]
            change = scores.entropy_change.to(where)[flat]
            outputs = objective(
                TokenInputs(
                    logprob=statistics.logprob,
                    entropy=statistics.entropy,
                    old_logprob=old_logprob,
                    advantage=token_advantage,
                    sequence_index=index,
                    sequence_count=len(part.sequences),
                    thresholds=thresholds,
                    weight=steering_weights(change, thresholds.steering, response) if thresholds.steering else None,
                    rollout_logprob=batch.rollout_logprob.to(where)[flat],
                )
            )
            total = -(token_weight[part.sequences].to(where)[index] * outputs.objective).sum()
            with torch.no_grad():
                region = classify(old_logprob, scores.entropy.to(where)[flat], token_advantage)
                sums.add_(
                    torch.stack(
                        [
                            total.double(),
                            *(
                                x.sum(dtype=torch.float64)
                                for x in (
                                    region > 0,
                                    outputs.clipped_high,
                                    outputs.clipped_low,
                                    *(region == r for r in (1, 2, 3, 4)),
                                    (statistics.entropy - scores.entropy.to(where)[flat]) * (region > 0),
                                )
                            ),
                        ]
                    )
                )
                if len(flat):
                    ratio_max.copy_(torch.maximum(ratio_max, (statistics.logprob - old_logprob).exp().max()))
            return total * undo, {}

        self._wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._run(batch, sequences, loss, forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        return UpdateReport(sums, ratio_max, float(grad_norm))

    def _run(self, batch: RolloutBatch, sequences: Tensor, loss, *, forward_only: bool) -> None:
        """Drive megatron-core's schedule over the microbatches of `sequences`; `loss` sees the last stage's output."""
        parts = list(batch.microbatches(sequences, self.microbatch_sequences, self.width_multiple))

        def forward_step(iterator: Iterator[Microbatch], model: torch.nn.Module):
            part = next(iterator)
            with device.without_shim():
                output = model(part.tokens.to(device.device()), part.rows.to(device.device()))
            return output, lambda output: measure(output, part)

        def measure(output: Tensor, part: Microbatch):
            with device.without_shim():
                return loss(output, part)

        self._wrapped.train()
        self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=iter(parts),
            model=[self._wrapped],
            num_microbatches=len(parts),
            seq_length=parts[0].tokens.size(1),
            micro_batch_size=parts[0].tokens.size(0),
            forward_only=forward_only,
        )


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Linear warm-up over `warmup_steps`, then constant or cosine down to `min_learning_rate` at the last step."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.min_learning_rate is None:
        return config.learning_rate * warm
    progress = step / max(1, total_steps - 1)
    low = config.min_learning_rate
    return warm * (low + (config.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * progress)))
