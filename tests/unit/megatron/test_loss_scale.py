"""The loss scale, tested against megatron-core's scaling of a loss and its gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss

from megatron_rlvr.megatron.loss_scale import LossScale


@pytest.mark.parametrize(("data_size", "context_size", "microbatches"), [(1, 1, 1), (2, 1, 3), (3, 2, 5), (4, 4, 1)])
def test_the_gradient_of_a_minibatch_is_a_sum(data_size: int, context_size: int, microbatches: int) -> None:
    scale = LossScale(data_size, context_size)
    total = torch.zeros((), dtype=torch.float64)
    for _rank in range(data_size * context_size):
        weight = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        for number in range(microbatches):

            def scaled(output: torch.Tensor) -> tuple[torch.Tensor, dict]:
                return scale.for_schedule(output, microbatches), {}

            loss, _ = forward_step_calc_loss(
                model=None,
                output_tensor=weight * (number + 1) / context_size,  # a rank's share of the loss over all tokens
                loss_func=scaled,
                config=SimpleNamespace(timers=None, calculate_per_token_loss=False),
                vp_stage=None,
                collect_non_loss_data=False,
                num_microbatches=microbatches,
                forward_data_store=[],
                cp_group_size=context_size,
                is_last_stage=True,
            )
            before = 0.0 if weight.grad is None else float(weight.grad)
            loss.backward()
            assert float(weight.grad) - before == pytest.approx(scale.backward * (number + 1) / context_size)
        total += weight.grad / (data_size * context_size)  # the data-parallel wrapper's average
    assert float(total) == pytest.approx(data_size * microbatches * (microbatches + 1) / 2)
