"""The TRL part of benchmark_step.py, which runs this file with an interpreter that has TRL and a job file as argument.

It trains with TRL's GRPOTrainer as a user would configure it for this job, and writes the seconds of each step and of
its parts to the result file of the job. It does not import this project.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark_reward import reward  # written by benchmark_step.py; both trainers use this reward
from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer


def main(job_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(job["threads"])
    examples = [json.loads(line) for line in Path(job["data"]).read_text().splitlines()]
    minibatch = job["prompts"] * job["samples"] // job["updates"]
    config = GRPOConfig(
        output_dir=str(Path(job["result"]).parent / "trl"),
        use_cpu=True,
        bf16=False,
        # On by default, to save memory. For this small model recomputation would only cost time.
        gradient_checkpointing=False,
        per_device_train_batch_size=minibatch,
        steps_per_generation=job["updates"],
        gradient_accumulation_steps=1,
        num_generations=job["samples"],
        max_completion_length=job["response_tokens"],
        generation_kwargs={"min_new_tokens": job["response_tokens"]},  # no end of sequence before the last token
        temperature=1.0,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        # One more than is measured, because a step is timed until the next one begins.
        max_steps=job["updates"] * (job["steps"] + 1),
        logging_steps=job["updates"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=job["seed"],
    )
    trainer = GRPOTrainer(
        model=job["model"],
        args=config,
        reward_funcs=lambda completions, **_: [reward(text, None) for text in completions],
        train_dataset=Dataset.from_list([{"prompt": example["prompt"]} for example in examples]),
        processing_class=AutoTokenizer.from_pretrained(job["model"], trust_remote_code=False),
    )
    steps = timed(trainer, job)
    trainer.train()
    Path(job["result"]).write_text(json.dumps({"steps": steps[: job["steps"]]}))


def timed(trainer: Any, job: dict[str, Any]) -> list[dict[str, float]]:
    """Time the parts of every step. The list gets one entry per step: seconds by part, and generated tokens."""
    steps: list[dict[str, float]] = []
    current: dict[str, float] = defaultdict(float)
    start = 0.0

    def clock(owner: Any, method: str, part: str) -> None:
        inner = getattr(owner, method)

        def outer(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = inner(*arguments, **options)
            current[part] += time.perf_counter() - begin
            return result

        setattr(owner, method, outer)

    def count(inner: Callable[..., Any]) -> Callable[..., Any]:
        def outer(*arguments: Any, **options: Any) -> Any:
            completions, logprobs = inner(*arguments, **options)
            lengths = {len(ids) for ids in completions}
            expected = job["prompts"] * job["samples"]
            if lengths != {job["response_tokens"]} or len(completions) != expected:
                sys.exit(
                    f"TRL generated {len(completions)} completions of lengths {sorted(lengths)}, "
                    f"expected {expected} of length {job['response_tokens']}"
                )
            current["tokens"] += sum(map(len, completions))
            return completions, logprobs

        return outer

    def new_step(inner: Callable[..., Any]) -> Callable[..., Any]:
        def outer(*arguments: Any, **options: Any) -> Any:
            nonlocal start
            now = time.perf_counter()
            if current:
                # Scoring forward passes inside the update are part of the update and counted there.
                scoring = current.pop("scoring")
                steps.append({"step": now - start, "old_logprob": scoring - current.pop("update_scoring"), **current})
                current.clear()
            start = now
            return inner(*arguments, **options)

        return outer

    def update_scoring(inner: Callable[..., Any]) -> Callable[..., Any]:
        def outer(*arguments: Any, **options: Any) -> Any:
            before = current["scoring"]
            result = inner(*arguments, **options)
            current["update_scoring"] += current["scoring"] - before
            return result

        return outer

    clock(trainer, "_generate_single_turn", "generation")
    clock(trainer, "_calculate_rewards", "verification")
    clock(trainer, "_get_per_token_logps_and_entropies", "scoring")
    trainer.compute_loss = update_scoring(trainer.compute_loss)
    clock(trainer, "compute_loss", "forward")
    clock(trainer.accelerator, "backward", "backward")
    trainer._generate_single_turn = count(trainer._generate_single_turn)
    trainer._generate_and_score_completions = new_step(trainer._generate_and_score_completions)
    create = trainer.create_optimizer

    def create_and_clock(*arguments: Any, **options: Any) -> Any:
        optimizer = create(*arguments, **options)
        clock(optimizer, "step", "optimizer")
        return optimizer

    trainer.create_optimizer = create_and_clock
    return steps


if __name__ == "__main__":
    main(sys.argv[1])
