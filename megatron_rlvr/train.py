"""Train a policy: ``python -m megatron_rlvr.train CONFIG [key=value ...]``, alone or under torchrun.

`train` is the algorithm: collect verified rollouts, form advantages, score the tokens under the policy, let the
schedule observe their exact entropy and set the step's clip thresholds, update in minibatches, publish the weights.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_rlvr.command_line import run_command
from megatron_rlvr.components import build_components
from megatron_rlvr.config import Config
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, EXIT_STOPPED
from megatron_rlvr.lifecycle import StopSignal
from megatron_rlvr.megatron import waiting
from megatron_rlvr.megatron.parallel import Layout
from megatron_rlvr.rollout.engines.base import EngineLostError, RolloutError
from megatron_rlvr.rollout.evaluation import evaluate
from megatron_rlvr.rollout.mismatch import MismatchAlarm
from megatron_rlvr.rollout.samples import collected
from megatron_rlvr.rollout.worst_tokens import worst_tokens
from megatron_rlvr.telemetry.reporter import Reporter
from megatron_rlvr.training.checkpoint_loading import start_from
from megatron_rlvr.training.entropy_control import EntropyControl
from megatron_rlvr.training.final_export import export_policy
from megatron_rlvr.training.learning_rate import learning_rate
from megatron_rlvr.training.on_policy import OnPolicyWatch
from megatron_rlvr.training.reference import build_reference
from megatron_rlvr.training.rollout_metrics import measure_rollout
from megatron_rlvr.training.routing_metrics import routing_metrics
from megatron_rlvr.training.scoring import score_rollout
from megatron_rlvr.training.token_weights import token_weights
from megatron_rlvr.training.update_guard import UpdateGuard
from megatron_rlvr.training.update_metrics import update_metrics


def train(config: Config, layout: Layout, resources: ExitStack) -> int:
    """Run the remaining steps of `config` after its newest checkpoint; returns the exit status. Collective."""
    algorithm = config.algorithm
    components = build_components(config, layout, resources)
    policy, engine, checkpoints = components.policy, components.engine, components.checkpoints
    collector, evaluator = components.collector(), components.evaluator()
    control = EntropyControl(algorithm, config.optimizer, config.schedule(), layout)
    alarm = MismatchAlarm.build(config, engine.draws_from_policy, layout.is_main)
    guard = UpdateGuard(config.optimizer.nonfinite_patience, layout.is_main)
    on_policy = OnPolicyWatch(algorithm.minibatches * algorithm.epochs, layout.is_main)
    stop = StopSignal()

    first = 0
    if (state := checkpoints.load_newest(policy)) is not None:
        first = state["step"]
        control.load_state_dict(state, config.resume.allow)
        guard.load_state_dict(state)
        alarm.load_state_dict(state)
    if state is not None or start_from(config.checkpoint, policy):
        engine.update_weights(first)
    reference = build_reference(config, policy, resumes=state is not None)
    report = resources.enter_context(Reporter(config, first, active=layout.is_main))
    checkpoints.on_complete = report.saved

    def save(step: int, wait: bool = True, state: dict[str, Any] | None = None) -> None:
        with report.timed_phase("saving", "checkpoint"):
            state = state or control.state_dict() | guard.state_dict() | alarm.state_dict()
            checkpoints.save(step, policy, state, report.newest, guard.in_a_row == 0)
            if wait:
                checkpoints.finish()

    for step in range(first, config.steps):
        if step == 0 or (config.evaluation.every and step % config.evaluation.every == 0):
            evaluate(evaluator, report, step)
        report.phase("rolling out")
        try:
            batch, rollout = collector.collect(step, report.phase)
        except (EngineLostError, RolloutError):
            if step > first:  # otherwise the newest checkpoint already holds this state
                save(step)
            raise
        report.add_seconds(generate=rollout.generate_seconds, verify=rollout.verify_seconds)

        with report.timed_phase("scoring", "score"):
            scores, advantage = score_rollout(policy, reference, batch, algorithm)
            routing = routing_metrics(policy, batch, advantage, layout, compare=config.rollout.compares_routing(step))
        weight = token_weights(batch, algorithm, config.rollout.max_tokens, layout)
        importance = control.importance(batch, advantage, scores)
        measured = measure_rollout(batch, weight, scores, layout, importance, control.objective.reference_kl, advantage)
        if rollout.samples is not None:
            report.samples(step, collected(rollout.samples, layout, batch, scores.entropy))
        problem = alarm.observe(step, measured.metrics)
        report.worst_tokens(step, worst_tokens(alarm.detail, batch, scores, components.tokenization, layout))
        if problem:
            save(step)
            raise UserError(problem)
        rate = learning_rate(config.optimizer, step, config.steps)
        before = control.state_dict() | guard.state_dict() | alarm.state_dict()
        objective, old = control.begin_step(step, measured, rate), control.clipped_around(batch, scores)
        advantage = control.weighted(advantage)

        report.phase("updating")
        policy.set_learning_rate(rate)
        updates = []
        minibatches = batch.minibatches(algorithm.minibatches, only=control.trained(advantage))
        for sequences in minibatches * algorithm.epochs:
            update = policy.update(batch, sequences, advantage, weight, old, objective)
            if problem := guard.observe(step, update):
                save(step, state=before)
                raise UserError(problem)
            objective = control.after_update(update)
            report.add_seconds(forward_backward=update.forward_backward_seconds, optimizer=update.optimizer_seconds)
            updates.append(update)
        metrics = {"step": step, "lr": rate, **measured.metrics, **routing, **rollout.metrics, **control.metrics()}
        finite = policy.weights_are_finite()
        metrics |= alarm.metrics() | update_metrics(updates, algorithm.epochs, finite, layout.is_reporting_rank)
        alarm.observe_updates(metrics)
        on_policy.observe(step, metrics)
        metrics |= engine.update_weights(step + 1)

        stopping = waiting.any_rank(stop.received is not None, f"the end of step {step}")
        finished = step + 1 == config.steps
        if finished:
            evaluate(evaluator, report, config.steps)
        # Metrics are written before the checkpoint: a resume can remove an extra line, but not restore a missing one.
        report.step(metrics)
        checkpoints.check_keep_best(report.newest)
        checkpoints.poll()
        if stopping or finished or (config.checkpoint.every and (step + 1) % config.checkpoint.every == 0):
            save(step + 1, wait=stopping or finished)
        if stopping and not finished:
            report.message(f"stopped by {stop.received or 'another rank'} after step {step}; start again to continue")
            return EXIT_STOPPED

    report.phase("exporting")
    export_policy(policy, Path(config.run_directory), config.checkpoint)
    report.finish()
    return EXIT_DONE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command(train, arguments)


if __name__ == "__main__":
    sys.exit(main())
