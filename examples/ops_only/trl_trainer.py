"""TRL's GRPOTrainer with a drawn entropy curve: python examples/ops_only/trl_trainer.py [SEED]. Needs TRL 1.16.0.

`EntropyControlledGRPOTrainer` is a GRPOTrainer with one more argument, the schedule. Log-probs and entropies come from
`ops.token_statistics`; the bounds of each token and its steering weight from the schedule. Everything else, including
the aggregation of the loss, KL and logging, remains TRL's. `main` trains a small random model on a toy task.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from megatron_rlvr import ops
from megatron_rlvr.control import ClipSchedule, EntropyCurve, StepTokens, TargetEntropy

ROLLOUTS, PROMPTS, SAMPLES, DIGITS, UPDATES = 40, 20, 8, 4, 8
CURVE = EntropyCurve("piecewise", points=[(0.0, 1.0), (0.3, 1.1), (1.0, 0.6)])


class EntropyControlledGRPOTrainer(GRPOTrainer):
    """A GRPOTrainer whose clip thresholds and region steering follow ``schedule``, one step of it per rollout.

    The schedule's ``total_steps`` is max_steps divided by the optimizer steps per rollout. Its state is part of the
    checkpoints. Raises ValueError for a loss that has no two-sided bounds per token.
    """

    epsilon_low: float
    epsilon_high: float

    def __init__(self, *arguments: Any, schedule: ClipSchedule, **options: Any):
        super().__init__(*arguments, **options)
        if self.loss_type not in ("grpo", "bnpo", "dr_grpo", "dapo") or self.importance_sampling_level != "token":
            raise ValueError(
                "schedule: needs loss_type grpo, bnpo, dr_grpo or dapo and importance_sampling_level token, found "
                f"{self.loss_type} and {self.importance_sampling_level}"
            )
        microbatches = self.args.steps_per_generation * self.num_iterations
        self.updates = max(1, microbatches // self.args.gradient_accumulation_steps)
        self.schedule, self.rollout, self.update = schedule, -1, 0
        self.static = self.epsilon_low, self.epsilon_high
        self.history: list[dict[str, float]] = []

    def statistics(self, model: Any, input_ids: Tensor, attention_mask: Tensor, length: int, **options: Any) -> Any:
        """The statistics of the last ``length`` tokens of each sequence, flat [B * length]."""
        with self.accelerator.autocast():
            logits = model(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=length + 1).logits
        targets = input_ids[:, -length:].flatten()
        return ops.token_statistics(logits[:, :-1].flatten(0, 1), targets, temperature=self.temperature, **options)

    def _get_per_token_logps_and_entropies(  # of TRL
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **options: Any
    ) -> tuple[Tensor, Tensor, None]:
        if options.get("pixel_values") is not None or options.get("compute_aux_loss"):
            raise ValueError("schedule: images and router losses are not passed on by this example")
        size = options.get("batch_size") or len(input_ids)
        parts = [
            self.statistics(model, ids, mask, logits_to_keep)
            for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True)
        ]
        logprob, entropy = (torch.cat([getattr(part, name) for part in parts]) for name in ("logprob", "entropy"))
        self.entropy = entropy.detach().view(-1, logits_to_keep)
        return logprob.view(-1, logits_to_keep), entropy.view(-1, logits_to_keep), None

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:  # of TRL: once per rollout
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return batch
        mask, completion = batch["completion_mask"], batch["completion_ids"]
        ids = torch.cat([batch["prompt_ids"], completion], dim=1)
        attention = torch.cat([batch["prompt_mask"], mask], dim=1)
        size = self.args.per_device_train_batch_size
        parts = [
            self.statistics(self.model, *pair, completion.shape[1], second_moments=True)
            for pair in zip(ids.split(size), attention.split(size), strict=True)
        ]
        names = ("logprob", "entropy", "sum_squared_prob", "sum_squared_prob_logprob")
        old = ops.TokenStatistics(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
        weight = (mask * batch.get("tool_mask", 1)).float()
        if self.loss_type == "grpo":  # a mean over the tokens of a sequence, then over sequences
            weight = weight / weight.sum(1, keepdim=True).clamp(min=1.0)
        advantage = batch["advantages"].repeat_interleave(completion.shape[1])
        several = self.accelerator.num_processes > 1
        self.tokens = StepTokens.measure(
            old, advantage, weight.flatten(), all_reduce=torch.distributed.all_reduce if several else None
        )
        self.rollout, self.update = self.rollout + 1, 0
        rate = min(1.0, self._get_learning_rate() / self.args.learning_rate)
        self.schedule.observe(
            self.rollout,
            self.tokens.mean_entropy,
            response=self.tokens.response,
            rate=rate,
            momentum=self.args.adam_beta1,
            updates=self.updates,
        )
        batch["old_per_token_logps"] = old.logprob.view(completion.shape)
        batch["token_index"] = torch.arange(mask.numel(), device=mask.device).view(mask.shape)  # TRL shuffles sequences
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:  # of TRL: once per microbatch
        if "token_index" not in inputs:  # evaluation
            self.epsilon_low, self.epsilon_high = self.static
            return super()._compute_loss(model, inputs)
        thresholds = self.schedule.thresholds(self.rollout)
        low, high = thresholds.ratio_bounds(inputs["old_per_token_logps"].exp())
        self.epsilon_low, self.epsilon_high = 1.0 - low, high - 1.0  # TRL clamps the ratio to 1 - low and 1 + high
        weights = self.tokens.steering_weights(thresholds, inputs["token_index"])
        loss = super()._compute_loss(model, {**inputs, "advantages": inputs["advantages"][:, None] * weights})
        if self.accelerator.sync_gradients:  # the last microbatch of an update
            shift = self.tokens.entropy_shift(self.entropy, inputs["token_index"])
            self.schedule.observe_update(self.rollout, self.update, self.updates, shift)
            self.update += 1
            if self.update == self.updates:
                row = {"step": self.rollout, "entropy": self.tokens.mean_entropy, **self.schedule.metrics()}
                self.history.append(row)
                for name, value in {**thresholds.metrics(), **self.schedule.metrics()}.items():
                    self._metrics["train"][name].append(value)  # TRL logs it
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            state = {"rollout": self.rollout, "schedule": self.schedule.state_dict()}
            (folder / "schedule.json").write_text(json.dumps(state))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = json.loads((Path(checkpoint) / "schedule.json").read_text())
            self.rollout = state["rollout"]
            self.schedule.load_state_dict(state["schedule"])


def digits_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({**{str(n): n for n in range(10)}, "<pad>": 10, "<end>": 11}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """1 if the sum of a completion's digits ends with the digit of the prompt."""
    texts = [[int(c) for c in text if c.isdigit()] for text in completions]
    return [float(sum(digits) % 10 == int(prompt)) for prompt, digits in zip(prompts, texts, strict=True)]


def build(seed: int, folder: str, schedule: ClipSchedule | None) -> GRPOTrainer:
    """The trainer of the toy task; without a schedule TRL's own."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 12, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = Qwen2ForCausalLM(
        Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=4, initializer_range=0.12, pad_token_id=10)
    )
    minibatch = PROMPTS * SAMPLES // UPDATES
    config = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=minibatch,
        steps_per_generation=UPDATES,
        gradient_accumulation_steps=1,
        num_generations=SAMPLES,
        max_completion_length=DIGITS,
        temperature=1.0,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_steps=ROLLOUTS * UPDATES,
        logging_steps=UPDATES,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    options = {
        "model": model,
        "args": config,
        "reward_funcs": reward,
        "train_dataset": Dataset.from_list([{"prompt": str(n % 10)} for n in range(PROMPTS)]),
        "processing_class": digits_tokenizer(),
    }
    if schedule is None:
        return GRPOTrainer(**options)
    return EntropyControlledGRPOTrainer(**options, schedule=schedule)


def main(seed: int, folder: str) -> list[dict[str, float]]:
    """Train; one row per rollout: entropy and target in nats per token, and the controller's other metrics."""
    trainer = build(seed, folder, TargetEntropy(ROLLOUTS, curve=CURVE))
    trainer.train()
    return trainer.history


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for row in main(int(sys.argv[1]) if len(sys.argv) > 1 else 0, folder):
            print("step {step:3.0f}  entropy {entropy:.3f}  target {control/target:.3f}".format(**row))
