"""Measure what clip thresholds alone can do to entropy: train on the same rollout under several thresholds.

    python examples/entropy_study/authority.py RUN_DIRECTORY ... [--output authority.csv]
    PYTHONPATH=. python examples/entropy_study/authority.py runs/real_model/... --rates 2.5e-6 --passes 1 2 4 \\
        --output docs/real_model/authority.csv

Complete runs say little about thresholds, because the effect of a threshold on one step is small compared with the
differences between runs. This program loads checkpoints of a run (weights and Adam's state), repeats the rollout of the
next step, and trains on that rollout under each of the thresholds from the same state, for 1, 2, 4 and 8 passes and
several learning rates. Entropy is measured on the same tokens before and after, so comparisons contain no sampling
noise. Every case is measured with the task's rewards and with random ones, which leave nothing to learn.

The output is a CSV file with one line per measurement. Measurements that the file already holds are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from measurements import BOUNDS, PASSES, RATES, REWARDS, Measurement, read
from torch import Tensor

from megatron_rlvr.components import Components, build_components
from megatron_rlvr.config import Config, load_config, resolve
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.megatron import parallel
from megatron_rlvr.objectives import UpdateObjective, build_objective, group_advantages
from megatron_rlvr.training.checkpoints_folder import steps
from megatron_rlvr.training.loss import LOSS_SUMS
from megatron_rlvr.training.rollout_metrics import measure_rollout
from megatron_rlvr.training.token_weights import token_weights

warnings.simplefilter("ignore")

Case = tuple[str, float, str, Sequence[int]]
"""Rewards, learning rate, name of the thresholds, and the numbers of passes after which to measure."""
OUTPUT = Path(__file__).resolve().parents[2] / "docs" / "entropy_study" / "authority.csv"


@dataclass(frozen=True)
class Bench:
    """A policy and one rollout, to be trained on under any thresholds."""

    components: Components
    batch: RolloutBatch
    step: int

    def advantage(self, rewards: str) -> Tensor:
        """Group advantages of the task's rewards or of random ones, float32 [N]."""
        values = self.batch.rewards
        if rewards == "coin":
            coin = torch.Generator().manual_seed(1000 * self.components.config.seed + self.step)
            values = torch.randint(0, 2, values.shape, generator=coin).to(values.dtype)
        advantage = self.components.config.algorithm.advantage
        return group_advantages(values.view(-1, self.batch.group_size), advantage).flatten()

    def train(self, rewards: str, rate: float, bound: str, measured: Sequence[int]) -> Iterator[Measurement]:
        """Train on the rollout from the policy's present state; yield a measurement after each of `measured` passes."""
        config, layout, policy = self.components.config, self.components.layout, self.components.policy
        batch, algorithm = self.batch, config.algorithm
        advantage = self.advantage(rewards)
        weight = token_weights(batch, algorithm, config.rollout.max_tokens, layout)
        scores = policy.score(batch, advantage)
        before = measure_rollout(batch, weight, scores, layout)
        objective = UpdateObjective(build_objective(algorithm.objective), BOUNDS[bound], before.response)
        policy.set_learning_rate(rate)
        sums = torch.zeros(len(LOSS_SUMS), dtype=torch.float64)
        for passes in range(1, max(measured) + 1):
            for sequences in batch.minibatches(algorithm.minibatches, advantage != 0):
                done = policy.update(batch, sequences, advantage, weight, scores, objective)
                sums += done.sums
            if passes in measured:
                shift = math.log(float(policy.score(batch, advantage).entropy.double().mean()) / before.entropy)
                counted = dict(zip(LOSS_SUMS, sums.tolist(), strict=True))
                clipped = (counted[name] / counted["active_tokens"] for name in ("clipped_high", "clipped_low"))
                case = (config.seed, self.step, rewards, rate, bound, passes)
                yield Measurement(*case, before.entropy, shift, *clipped)


def measure(
    config: Config, layout: parallel.Layout, resources: ExitStack, cases: Sequence[Case], done: set[tuple]
) -> Iterator[Measurement]:
    """Measure `cases` at every checkpoint of a run; ``done`` holds the measurements to skip.

    A measurement in ``done`` is (seed, step, rewards, rate, bound, passes).
    """
    components = build_components(config, layout, resources)
    collector, checkpoints = components.collector(), components.checkpoints
    for step in steps(checkpoints.folder):
        left = {
            (rewards, rate, bound): missing
            for rewards, rate, bound, passes in cases
            if (missing := [n for n in passes if (config.seed, step, rewards, rate, bound, n) not in done])
        }
        if not left:
            continue
        checkpoints.load(step, components.policy)
        components.engine.update_weights(step)
        bench = Bench(components, collector.collect(step)[0], step)
        for case, missing in left.items():
            checkpoints.load(step, components.policy)
            yield from bench.train(*case, missing)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure what clip thresholds alone do to entropy.")
    parser.add_argument("runs", nargs="+", type=Path, help="run directories with checkpoints")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=REWARDS, help="the task's, or random ones")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="learning rates")
    parser.add_argument("--passes", nargs="+", type=int, default=PASSES, help="measure after so many passes")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    cases = list(itertools.product(options.rewards, options.rates, BOUNDS, [options.passes]))
    names = [field.name for field in fields(Measurement)]
    for run in options.runs:
        done = {(m.seed, m.step, m.rewards, m.rate, m.bound, m.passes) for m in read(options.output)}
        config = resolve(load_config(run / "config.yaml", [f"run_directory={run}"]), on_gpu=torch.cuda.is_available())
        options.output.parent.mkdir(parents=True, exist_ok=True)
        fresh = not options.output.is_file()
        with options.output.open("a", newline="") as file, ExitStack() as resources:
            writer = csv.DictWriter(file, names, lineterminator="\n")
            if fresh:
                writer.writeheader()
            layout = resources.enter_context(parallel.parallel_groups(config.parallel, config.seed))
            for measurement in measure(config, layout, resources, cases, done):
                row = asdict(measurement)
                rounded = {k: f"{row[k]:.6f}" for k in ("entropy", "shift", "clipped_high", "clipped_low")}
                writer.writerow(row | rounded)
                file.flush()
                print(*(row | rounded).values(), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    main()
