"""Train a policy: ``python -m megatron_rlvr.train CONFIG [key=value ...]``, alone or under torchrun.

`train` is the algorithm: roll out, verify, form advantages, score under the old policy, let the schedule see the
entropy and give this step's clip thresholds, update in minibatches, repeat.
"""

from __future__ import annotations

import os
import statistics
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

# Read when torch loads. Idle OpenMP threads spin for a moment: not at all costs wake-ups, for long takes others' cores.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from megatron_rlvr.config import Config, load_config, save_config, warnings_of
from megatron_rlvr.control import build_schedule
from megatron_rlvr.errors import UserError, as_user_error
from megatron_rlvr.lifecycle import (
    EXIT_DONE,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    StopSignal,
    locked_run_directory,
    user_error_on_full_disk,
)
from megatron_rlvr.megatron import collectives, parallel
from megatron_rlvr.objectives import build_objective, group_advantages
from megatron_rlvr.resume import check_same_run
from megatron_rlvr.rollout.collection import RolloutCollector
from megatron_rlvr.rollout.engines.base import EngineLostError, RolloutError
from megatron_rlvr.rollout.engines.build import build_engine
from megatron_rlvr.rollout.evaluation import Evaluator
from megatron_rlvr.rollout.mismatch import MismatchAlarm
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.telemetry.reporter import Reporter
from megatron_rlvr.telemetry.timer import StepTimer
from megatron_rlvr.training.checkpoint import Checkpoints
from megatron_rlvr.training.learning_rate import learning_rate
from megatron_rlvr.training.policy import Policy, UpdateReport
from megatron_rlvr.training.step_metrics import entropy_shift, measure_rollout, update_metrics
from megatron_rlvr.training.token_weights import token_weights
from megatron_rlvr.verifiers import build_pool
from megatron_rlvr.weights.export import export_folder


def train(config: Config, layout: parallel.Layout, resources: ExitStack) -> int:
    """Run the steps of `config` from the newest checkpoint on; returns the exit status."""
    algorithm, directory = config.algorithm, Path(config.run_directory)
    schedule = build_schedule(algorithm.schedule, config.steps)
    objective = build_objective(algorithm.objective)
    verifiers = resources.enter_context(build_pool(config.verifier, layout.is_leader))
    policy = Policy(config, layout)
    tokenization = Tokenization(config.model.path, policy.bridge.vocab_size, policy.bridge.context_length)
    engine = build_engine(config, policy, resources)
    rollouts = RolloutCollector(config, layout, engine, tokenization, verifiers)
    evaluator = Evaluator(config, layout, engine, tokenization, verifiers) if config.data.heldout else None
    threshold = config.rollout.mismatch_alarm if engine.draws_from_policy else 0.0
    alarm = MismatchAlarm(threshold, config.rollout.mismatch_patience, layout.is_main)
    checkpoints = Checkpoints(directory / "checkpoints", config.checkpoint)
    stop = StopSignal()

    first = tokens_seen = 0
    if (state := checkpoints.load_newest(policy)) is not None:
        first, tokens_seen = state["step"], state["tokens_seen"]
        with as_user_error():
            schedule.load_state_dict(state["schedule"])
            objective.load_state_dict(state["objective"])
        engine.update_weights(first)
    report = resources.enter_context(Reporter(config, first, active=layout.is_main))
    checkpoints.on_complete = report.saved
    timer = StepTimer()
    latest: dict[str, float] = {}

    def evaluate(step: int) -> None:
        if evaluator is not None:
            report.phase("evaluating")
            with timer.part("evaluate"):
                if scores := evaluator.evaluate():
                    report.evaluation({"step": step, **scores})
                    latest.update({f"evaluation/{name}": value for name, value in scores.items()})

    def save(step: int, last: bool = True) -> None:
        report.phase("saving")
        with timer.part("checkpoint"):
            state = {"schedule": schedule.state_dict(), "objective": objective.state_dict(), "tokens_seen": tokens_seen}
            checkpoints.save(step, policy, state, latest)
            if last:
                checkpoints.finish()

    for step in range(first, config.steps):
        if step == 0 or (config.evaluation.every and step % config.evaluation.every == 0):
            evaluate(step)

        report.phase("rolling out")
        try:
            batch, rolled = rollouts.collect(step, report.phase)
        except (EngineLostError, RolloutError):
            if step > first:  # else nothing is new
                save(step)
            raise
        timer.add("generate", rolled.generate_seconds)
        timer.add("verify", rolled.verify_seconds)
        rewards = (batch.rewards + batch.penalty).view(-1, batch.group_size)
        advantage = group_advantages(rewards, algorithm.advantage).flatten()

        report.phase("scoring")
        with timer.part("score"):
            scores = policy.score(batch, advantage)
        weight = token_weights(batch, algorithm, config.rollout.max_tokens, layout)
        measured = measure_rollout(batch, weight, scores, layout.is_reporting_rank, layout.is_leader)
        if problem := alarm.observe(step, measured.record):
            save(step)
            raise UserError(problem)
        rate = learning_rate(config.optimizer, step, config.steps)
        schedule.observe(
            step,
            measured.entropy,
            tokens=tokens_seen,
            response=measured.response,
            standard_error=measured.standard_error,
            rate=rate / config.optimizer.learning_rate,
        )
        objective.observe(step, measured.entropy)
        tokens_seen += int(measured.record["tokens"])
        thresholds = schedule.thresholds(step)

        report.phase("updating")
        policy.set_learning_rate(rate)
        updates: list[UpdateReport] = []
        steering: list[float] = []
        planned = algorithm.epochs * algorithm.minibatches
        drop = algorithm.drop_zero_advantage and objective.ignores_zero_advantage
        for _ in range(algorithm.epochs):
            for sequences in batch.minibatches(algorithm.minibatches, advantage != 0 if drop else None):
                done = policy.update(
                    batch, sequences, advantage, weight, scores, thresholds, measured.response, objective
                )
                timer.add("forward_backward", done.forward_backward_seconds)
                timer.add("optimizer", done.optimizer_seconds)
                updates.append(done)
                steering.append(thresholds.steering)
                if schedule.wants_updates:
                    schedule.observe_update(
                        step, len(updates) - 1, planned, entropy_shift(done, layout.is_reporting_rank)
                    )
                    thresholds = schedule.thresholds(step)
        engine.update_weights(step + 1)

        stopping, finished = collectives.any_rank(stop.received is not None), step + 1 == config.steps
        record = {"step": step, **measured.record, **rolled.metrics, "lr": rate}
        record |= update_metrics(updates, algorithm.epochs, layout.is_reporting_rank)
        predicted = measured.response.predicted(statistics.mean(steering))
        record["entropy_change/predicted"] = predicted / algorithm.minibatches
        record |= thresholds.metrics() | schedule.metrics() | objective.metrics()
        if finished:
            evaluate(config.steps)
        # The line first: a resume cuts a line too many, but could not make up for one that is missing.
        report.step(record | timer.metrics())
        latest.update(record)
        checkpoints.poll()
        if stopping or finished or (config.checkpoint.every and (step + 1) % config.checkpoint.every == 0):
            save(step + 1, last=stopping or finished)
        if stopping and not finished:
            report.message(f"stopped by {stop.received or 'another rank'} after step {step}; start again to go on")
            return EXIT_STOPPED

    if config.checkpoint.export_huggingface:
        report.phase("exporting")
        export_folder(policy.bridge, policy.model_chunks, directory / "huggingface", write=layout.is_main)
    report.finish()
    return EXIT_DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status of design: 0 done, 2 a user error, 75 stopped and resumable."""
    arguments = sys.argv[1:] if arguments is None else arguments
    rank = int(os.environ.get("RANK", "0"))
    warnings.simplefilter("ignore", FutureWarning)
    try:
        if not arguments or arguments[0] in ("-h", "--help"):
            print(__doc__)
            return EXIT_DONE if arguments else EXIT_USER_ERROR
        config = load_config(arguments[0], arguments[1:])
        torch.set_num_threads(config.threads or torch.get_num_threads())
        with user_error_on_full_disk(Path(config.run_directory)), ExitStack() as resources:
            if rank == 0:
                for line in warnings_of(config):
                    print(f"warning: {line}", file=sys.stderr)
                directory = resources.enter_context(locked_run_directory(Path(config.run_directory)))
                if (directory / "checkpoints" / "latest").is_file():
                    check_same_run(config, directory / "config.yaml")
                save_config(config, directory / "config.yaml")
            layout = resources.enter_context(parallel.parallel_groups(config.parallel, config.seed))
            return train(config, layout, resources)
    except (UserError, EngineLostError) as error:
        print(f"error: {error}" if rank == 0 else f"error (rank {rank}): {error}", file=sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
