"""GRPO that follows a drawn entropy curve, in plain PyTorch: python examples/ops_only/grpo.py [SEED]

A small recurrent policy writes six digits whose sum should end with the digit of the prompt. Entropy first rises by a
fifth, then falls to half of its start, while the reward grows. It takes 15 seconds of one core, and needs torch alone.
"""

import sys

import torch
from torch import Tensor, nn

from megatron_rlvr import ops
from megatron_rlvr.control import EntropyCurve, StepTokens, TargetEntropy

STEPS, PROMPTS, SAMPLES, DIGITS, EPOCHS, MINIBATCHES = 100, 80, 8, 6, 2, 4
CURVE = EntropyCurve("piecewise", points=[(0.0, 1.0), (0.3, 1.2), (1.0, 0.5)])


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(10, 64), nn.GRU(64, 128, batch_first=True)
        self.head = nn.Linear(128, 10, bias=False)
        nn.init.normal_(self.head.weight, std=0.6)  # preferences to begin with, so that entropy can also rise

    def forward(self, digits: Tensor) -> Tensor:  # [N, L] -> logits [N, L, 10]
        return self.head(self.layer(self.embedding(digits))[0])

    @torch.no_grad()
    def sample(self, prompts: Tensor) -> Tensor:  # [N] -> [N, DIGITS]
        digits = prompts[:, None]
        for _ in range(DIGITS):
            digits = torch.cat([digits, torch.multinomial(self(digits)[:, -1].softmax(-1), 1)], dim=1)
        return digits[:, 1:]


def train(seed: int, schedule: TargetEntropy) -> list[dict[str, float]]:
    """One row per step: entropy and target in nats per token, reward, steering."""
    torch.manual_seed(seed)
    policy, rows = Policy(), []
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    prompts = (torch.arange(PROMPTS) % 10).repeat_interleave(SAMPLES)
    for step in range(STEPS):
        answers = policy.sample(prompts)
        rewards = (answers.sum(1) % 10 == prompts).float().view(PROMPTS, SAMPLES)
        advantages = (rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)
        advantage = advantages.flatten().repeat_interleave(DIGITS)  # of each token
        inputs = torch.cat([prompts[:, None], answers[:, :-1]], dim=1)
        with torch.no_grad():
            old = ops.token_statistics(policy(inputs).flatten(0, 1), answers.flatten(), second_moments=True)
        tokens = StepTokens.measure(old, advantage)
        minibatches = [part for _ in range(EPOCHS) for part in torch.randperm(len(prompts)).chunk(MINIBATCHES)]
        schedule.observe(step, tokens.mean_entropy, response=tokens.response, momentum=0.9, updates=len(minibatches))
        for update, chosen in enumerate(minibatches):
            thresholds = schedule.thresholds(step)
            new = ops.token_statistics(policy(inputs[chosen]).flatten(0, 1), answers[chosen].flatten())
            at = (chosen[:, None] * DIGITS + torch.arange(DIGITS)).flatten()  # the tokens of the minibatch
            steering_weight = tokens.steering_weights(thresholds, at)
            clipped = ops.clipped_objective(
                new.logprob, old.logprob[at], advantage[at], thresholds, steering_weight=steering_weight
            )
            optimizer.zero_grad()
            (-clipped.objective.mean()).backward()
            optimizer.step()
            schedule.observe_update(step, update, len(minibatches), tokens.entropy_shift(new.entropy, at))
        row = {"step": step, "entropy": tokens.mean_entropy, "reward": rewards.mean().item(), **schedule.metrics()}
        print("step {step:3.0f}  entropy {entropy:.3f}  target {control/target:.3f}  reward {reward:.2f}".format(**row))
        rows.append(row)
    return rows


if __name__ == "__main__":
    train(int(sys.argv[1]) if len(sys.argv) > 1 else 0, TargetEntropy(STEPS, curve=CURVE))
