"""Policies with adapters, trained for two updates in any parallel layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from megatron_rlvr.config import Config
from megatron_rlvr.control import AffineThreshold, ClipThresholds
from megatron_rlvr.megatron import lora, parallel
from megatron_rlvr.megatron.config import LoRAConfig, OptimizerConfig, ParallelConfig
from megatron_rlvr.objectives import UpdateObjective, build_objective
from megatron_rlvr.training.checkpoint import Checkpoints
from megatron_rlvr.training.config import CheckpointConfig
from megatron_rlvr.training.policy import Policy, UpdateReport
from tests.families import ADVANTAGE, MICROBATCH, WEIGHT, make_batch, policy_config

LORA = LoRAConfig(rank=3, alpha=12.0)


def config(model: Path, layout: ParallelConfig, adapters: LoRAConfig = LORA) -> Config:
    """Adam with a rate that changes the policy visibly in one update."""
    return dataclasses.replace(
        policy_config(model, dataclasses.replace(layout, microbatch_sequences=MICROBATCH)),
        seed=5,
        lora=adapters,
        optimizer=OptimizerConfig(learning_rate=3e-2, clip_grad=1e9, weight_decay=0.1),
    )


def update(policy: Policy, here: parallel.Layout, scores: Any) -> UpdateReport:
    bounds = AffineThreshold(0.2, 0.0)
    objective = UpdateObjective(build_objective("clip"), ClipThresholds(bounds, bounds))
    weight = WEIGHT / here.data_size  # every data-parallel rank has the whole batch
    return policy.update(make_batch(), torch.arange(8), ADVANTAGE, weight, scores, objective)


def trained(policy: Policy, here: parallel.Layout, updates: int = 2) -> dict[str, Any]:
    """Gradient norms of some updates, log-probs and adapters before and after, and the merged weights after."""
    batch = make_batch()
    with lora.without_adapters(policy.model_chunks):
        base = policy.score(batch, ADVANTAGE)
    before = policy.score(batch, ADVANTAGE)
    reports = [update(policy, here, base) for _ in range(updates)]
    return {
        "grad_norms": [report.grad_norm for report in reports],
        "before": before.logprob,
        "after": policy.score(batch, ADVANTAGE).logprob,
        "base": base.logprob,
        "adapters": {n: t.clone() for n, t in policy.bridge.adapter_export(policy.model_chunks).tensors()},
        "merged": {n: t.clone() for n, t in policy.bridge.export(policy.model_chunks)},
    }


def run(job: dict[str, Any], here: parallel.Layout, output: Path) -> None:
    """Train in the layout of this process, and save ``<name>.pt``: a job of tests/layout_jobs.py.

    A job has "name", "model", "layout" (fields of ParallelConfig) and perhaps "lora", fields of LoRAConfig. One with
    "save" continues after its first update from a checkpoint of its own, which it writes there; one with "resume"
    continues from the checkpoint of another layout.
    """
    settings = dataclasses.replace(LORA, **job.get("lora", {}))
    policy_settings = config(Path(job["model"]), ParallelConfig(**job["layout"]), settings)
    policy = Policy(policy_settings, here)
    source = job.get("resume") or job.get("save")
    if "save" in job:
        update(policy, here, policy.score(make_batch(), ADVANTAGE))
        Checkpoints(Path(source), CheckpointConfig()).save(1, policy, {}, {})
        policy = Policy(policy_settings, here)
    if source:
        Checkpoints(Path(source), CheckpointConfig()).load(1, policy)
    result = trained(policy, here, 1 if source else 2)
    if here.is_reporting_rank and here.data_rank == 0:
        torch.save(result, output / f"{job['name']}.pt")
