"""The mechanism of entropy control in isolation: experiments on tabular softmax policies.

A policy is a table of logits with one row per state, and a completion is one action in a state. Every token thus has
logits of its own, and the theory's assumptions hold. All seeds of an experiment run at once, as additional rows.

(a) Gradient from the tokens of one region only: E1 and E4 lower entropy, E2 and E3 raise it.
(b) Random rewards and several updates per rollout: what clip thresholds alone do to entropy.
(c) Predicted against measured entropy change of every step.
(d) The controller follows a target curve, from measurements with sampling noise.

    python examples/entropy_study/tabular.py [--seeds 10]
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlvr.control import (
    AffineThreshold,
    ClipSchedule,
    ClipThresholds,
    Constant,
    EntropyCurve,
    SteeringResponse,
    TargetEntropy,
)
from megatron_rlvr.control.regions import (
    REGIONS,
    classify,
    entropy_change,
    gradient_norm,
    steering_sums,
    steering_weights,
)
from megatron_rlvr.objectives import TokenInputs, build_objective, group_advantages

STATIC = AffineThreshold(0.2)
BETAS = (0.9, 0.95)
RANDOM_REWARD_SETTINGS = {
    "upper-dynamic": ClipThresholds(STATIC, AffineThreshold(0.5, -0.25)),
    "clip-higher": ClipThresholds(STATIC, AffineThreshold(0.28)),
    "static": ClipThresholds(STATIC, STATIC),
    "lower-dynamic": ClipThresholds(AffineThreshold(0.3, -0.13), STATIC),
}
CURVES = {
    "rise-hold-fall": EntropyCurve("piecewise", points=[[0.0, 1.0], [0.4, 1.3], [0.6, 1.3], [1.0, 0.7]]),
    "constant": EntropyCurve("constant"),
    "linear-fall": EntropyCurve("linear", end=0.6),
}


@dataclass
class Statistics:
    """Statistics of a rollout's tokens, flat tensors: log-prob and entropy in nats, and the second moments."""

    logprob: Tensor
    entropy: Tensor
    sum_squared_prob: Tensor
    sum_squared_prob_logprob: Tensor


def initial_logits(seeds: int, states: int, actions: int, scale: float, generator: torch.Generator) -> Tensor:
    """Logits [seeds, states, actions] of random policies. A larger ``scale`` means lower entropy."""
    return scale * torch.randn(seeds, states, actions, generator=generator, dtype=torch.float64)


def entropy_of(logits: Tensor) -> Tensor:
    """Mean entropy over the states of each seed, [seeds], in nats."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1).mean(-1)


def statistics(logits: Tensor, actions: Tensor) -> Statistics:
    """Statistics of ``actions`` [seeds, states, samples] under ``logits`` [seeds, states, actions]."""
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    moments = (-(probs * logprobs).sum(-1), (probs**2).sum(-1), (probs**2 * logprobs).sum(-1))
    entropy, squared, squared_log = (m[..., None].expand(actions.shape).reshape(-1) for m in moments)
    return Statistics(logprobs.gather(-1, actions).reshape(-1), entropy, squared, squared_log)


def sample(logits: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """``samples`` actions of every state: [seeds, states, samples]."""
    flat = logits.softmax(-1).reshape(-1, logits.shape[-1])
    return torch.multinomial(flat, samples, replacement=True, generator=generator).view(*logits.shape[:2], samples)


def advantages_of(rewards: Tensor) -> Tensor:
    """Flat group advantages of rewards [seeds, states, samples]. The samples of a state are a group."""
    return group_advantages(rewards.flatten(0, 1)).reshape(-1)


def token_inputs(
    now: Statistics, old: Statistics, advantage: Tensor, thresholds: ClipThresholds, weight: Tensor | None
) -> TokenInputs:
    """Inputs of the objective, in float32 as the operators require. Every token is a sequence of its own."""
    return TokenInputs(
        logprob=now.logprob.float(),
        entropy=now.entropy.detach().float(),
        old_logprob=old.logprob.float(),
        advantage=advantage.float(),
        sequence_index=torch.arange(len(advantage)),
        sequence_count=len(advantage),
        thresholds=thresholds,
        weight=None if weight is None else weight.float(),
    )


def update(
    logits: Tensor,
    actions: Tensor,
    old: Statistics,
    advantage: Tensor,
    thresholds: ClipThresholds,
    rate: float,
    weight: Tensor | None = None,
) -> Tensor:
    """One gradient ascent step on the clipped objective, averaged over a state's samples; returns new logits."""
    table = logits.detach().requires_grad_()
    inputs = token_inputs(statistics(table, actions), old, advantage, thresholds, weight)
    objective = build_objective("clip")(inputs).objective.sum() / actions.shape[-1]
    (gradient,) = torch.autograd.grad(objective, table)
    return (table + rate * gradient).detach()


def change_of(old: Statistics, advantage: Tensor) -> Tensor:
    """The exact first-order entropy change due to every token."""
    return entropy_change(old.logprob, old.entropy, advantage, old.sum_squared_prob, old.sum_squared_prob_logprob)


def region_experiment(seeds: int = 10, states: int = 64, actions: int = 20, rate: float = 0.2) -> Tensor:
    """(a) Entropy change [seeds, 4] of one update whose gradient comes from the tokens of one region, E1 to E4."""
    generator = torch.Generator().manual_seed(0)
    logits = initial_logits(seeds, states, actions, 1.5, generator)
    taken = sample(logits, 16, generator)
    advantage = advantages_of(torch.rand(taken.shape, generator=generator, dtype=torch.float64))
    old = statistics(logits, taken)
    region = classify(old.logprob, old.entropy, advantage)
    before, changes = entropy_of(logits), []
    for number in (1, 2, 3, 4):
        moved = update(logits, taken, old, advantage, ClipThresholds(), rate, weight=(region == number).double())
        changes.append(entropy_of(moved) - before)
    return torch.stack(changes, dim=1)


def random_reward_experiment(
    seeds: int = 10, states: int = 96, actions: int = 20, steps: int = 80, updates: int = 8, rate: float = 0.4
) -> dict[str, Tensor]:
    """(b) Final entropy [seeds] of each clip setting under random rewards with several updates per rollout."""
    final = {}
    for name, thresholds in RANDOM_REWARD_SETTINGS.items():
        generator = torch.Generator().manual_seed(1)  # the same policies and rewards for every setting
        logits = initial_logits(seeds, states, actions, 1.0, generator)
        for _ in range(steps):
            taken = sample(logits, 16, generator)
            advantage = advantages_of(torch.rand(taken.shape, generator=generator, dtype=torch.float64))
            old = statistics(logits, taken)
            for _ in range(updates):
                logits = update(logits, taken, old, advantage, thresholds, rate)
        final[name] = entropy_of(logits)
    return final


def prediction_experiment(
    seeds: int = 10, states: int = 64, actions: int = 20, steps: int = 60, rate: float = 0.5
) -> Tensor:
    """(c) Correlation [seeds] over steps of predicted and measured entropy change, with one update per rollout."""
    generator = torch.Generator().manual_seed(2)
    logits = initial_logits(seeds, states, actions, 1.5, generator)
    value = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    predicted, measured = [], []
    for _ in range(steps):
        taken = sample(logits, 16, generator)
        advantage = advantages_of(value.gather(-1, taken))
        old = statistics(logits, taken)
        before = entropy_of(logits)
        logits = update(logits, taken, old, advantage, ClipThresholds(), rate)
        change = change_of(old, advantage).view(taken.shape)
        predicted.append(rate * change.mean(-1).mean(-1))
        measured.append(entropy_of(logits) - before)
    pairs = zip(torch.stack(predicted, 1), torch.stack(measured, 1), strict=True)
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])


@dataclass
class Tracking:
    """A run of experiment (d). Per step: measured and true entropy, target, steering u, and mean reward."""

    measured: list[float]
    true: list[float]
    target: list[float]
    steering: list[float]
    reward: list[float]

    def error(self, of: str = "measured", skip: float = 0.1) -> float:
        """Root mean square of entropy / target - 1 after the first ``skip`` (a share) of the steps."""
        start = math.ceil(skip * len(self.target))
        pairs = zip(getattr(self, of)[start:], self.target[start:], strict=True)
        squares = [(entropy / target - 1.0) ** 2 for entropy, target in pairs]
        return math.sqrt(sum(squares) / len(squares))


def tracking_experiment(
    schedule: ClipSchedule,
    curve: EntropyCurve,
    seed: int,
    steps: int = 60,
    actions: int = 16,
    prompts: int = 96,
    samples: int = 8,
    length: int = 6,
    updates: int = 16,
    rate: float = 0.01,
) -> Tracking:
    """(d) Train a policy whose states share parameters while ``schedule`` controls its entropy.

    The logits of a state are a linear map of its random features, trained with Adam. A completion consists of
    ``length`` actions and is rewarded as a whole, if more than half of its actions are good; credit assignment is
    therefore as coarse as for text. Every step draws new prompts, so the measured entropy has sampling noise.
    """
    generator = torch.Generator().manual_seed(100 + seed)
    dimension = 24

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    known, unknown = normal(dimension, actions), normal(dimension, actions)
    hidden = (known + unknown) / math.sqrt(2.0 * dimension)
    weights = (4.0 * known / math.sqrt(dimension)).requires_grad_()  # confident, and right about half of the time
    evaluation_states = normal(2048, dimension)  # states on which the true entropy is evaluated
    optimizer = torch.optim.Adam([weights], lr=rate, betas=BETAS)
    objective = build_objective("clip")
    run = Tracking([], [], [], [], [])
    for step in range(steps):
        features = normal(prompts * length, dimension)
        with torch.no_grad():
            table = (features @ weights)[None]
            run.true.append(entropy_of((evaluation_states @ weights)[None]).item())
        taken = sample(table, samples, generator)
        good = (features @ hidden)[None].gather(-1, taken) > 1.0
        rewards = (good.view(prompts, length, samples).double().mean(1) > 0.5).double()
        each = group_advantages(rewards)[:, None].expand(prompts, length, samples)
        advantage, old = each.reshape(-1), statistics(table, taken)
        change = change_of(old, advantage)
        ascent = gradient_norm(old.logprob, advantage, old.sum_squared_prob)
        sums = steering_sums(change, ascent, torch.full_like(change, 1.0 / len(change)))
        response = SteeringResponse.from_sums(sums.tolist())
        entropy = old.entropy.view(prompts, length, samples)[..., 0].mean(1)
        error = entropy.std().item() / math.sqrt(prompts)
        schedule.observe(
            step, entropy.mean().item(), response=response, standard_error=error, momentum=BETAS[0], updates=updates
        )
        thresholds = schedule.thresholds(step)
        run.measured.append(entropy.mean().item())
        run.target.append(curve.value(step / steps, run.measured[0]))
        run.steering.append(thresholds.steering)
        run.reward.append(rewards.mean().item())
        for index in range(updates):
            now = statistics((features @ weights)[None], taken)
            weight = steering_weights(change, thresholds.steering, response)
            inputs = token_inputs(now, old, advantage, thresholds, weight)
            optimizer.zero_grad()
            (-objective(inputs).objective.mean()).backward()
            optimizer.step()
            shift = math.log(now.entropy.mean().item() / old.entropy.mean().item())
            schedule.observe_update(step, index, updates, shift)
            thresholds = schedule.thresholds(step)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    seeds = parser.parse_args().seeds
    print(f"(a) entropy change of one update from tokens of one region, {seeds} seeds: mean (min .. max)")
    for name, column in zip(REGIONS, region_experiment(seeds).T, strict=True):
        print(f"    {name}  {column.mean():+.4f}  ({column.min():+.4f} .. {column.max():+.4f})")
    print("(b) final entropy under random rewards: mean (min .. max)")
    for name, column in random_reward_experiment(seeds).items():
        print(f"    {name:14s} {column.mean():.3f}  ({column.min():.3f} .. {column.max():.3f})")
    correlation = prediction_experiment(seeds)
    numbers = f"{correlation.mean():.4f}, min {correlation.min():.4f}"
    print(f"(c) correlation of predicted and measured entropy change: {numbers}")
    print("(d) root-mean-square tracking error after the first tenth of the steps: mean (max), and static clipping's")
    for name, curve in CURVES.items():
        runs = [tracking_experiment(TargetEntropy(60, curve=curve), curve, seed) for seed in range(seeds)]
        free = [tracking_experiment(Constant(), curve, seed) for seed in range(seeds)]
        errors, uncontrolled = [run.error() for run in runs], [run.error() for run in free]
        reward, reward_free = (sum(run.reward[-1] for run in each) / seeds for each in (runs, free))
        print(
            f"    {name:14s} {sum(errors) / seeds:.3f} ({max(errors):.3f}), static {sum(uncontrolled) / seeds:.3f};"
            f" final reward {reward:.2f}, static {reward_free:.2f}"
        )


if __name__ == "__main__":
    main()
