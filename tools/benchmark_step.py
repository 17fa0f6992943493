"""Seconds a training step beside TRL's GRPOTrainer: python tools/benchmark_step.py --trl-python PYTHON.

Both train the same small Qwen2 model (random weights, made on the fly) on the same prompts: the same number of samples,
tokens and optimizer updates a step, in fp32 on the CPU, each in processes of its own that take turns, so that both meet
the same state of the machine. TRL runs under PYTHON, an interpreter with the `bench` extra installed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rlvr.errors import UserError
from megatron_rlvr.telemetry.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = 100
SIGNS = ("+", "-", "*", "=", ";", ":", ">", "<eos>")
PROMPT_TOKENS = 8
WARM_UP_STEPS = 2  # the first steps of a process allocate and tune; both halves leave them out

REWARD = '''"""Verifies for both halves: cheap, and different from sample to sample."""


def reward(completion, answer):
    return completion.count("7") / 16
'''


@dataclass
class Job:
    """What both halves do; paths as text, for it travels as JSON."""

    model: str
    data: str
    result: str
    prompts: int
    samples: int
    response_tokens: int
    updates: int
    threads: int
    steps: int
    seed: int
    learning_rate: float = 1e-5


def make_model(folder: Path, seed: int) -> int:
    """Write a Qwen2 model with random weights and its word-level tokenizer as a Hugging Face folder; its parameters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = [*map(str, range(NUMBERS)), *SIGNS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", padding_side="left"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(words),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
        )
    )
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make_data(file: Path, count: int, seed: int) -> None:
    """Write prompts of PROMPT_TOKENS tokens each, in the JSONL format of real data sets."""
    chance = random.Random(seed)
    with file.open("w") as lines:
        for _ in range(count):
            numbers = [str(chance.randrange(NUMBERS)) for _ in range(PROMPT_TOKENS - 2)]
            prompt = " ".join([*numbers[:-1], ":", numbers[-1], ">"])
            lines.write(json.dumps({"prompt": prompt, "answer": ""}) + "\n")


def run_trl(job: Job, python: str, folder: Path) -> list[dict[str, float]]:
    """Steps of TRL in seconds: step, generation, verification, old_logprob, forward, backward, optimizer; and tokens."""
    job_file = folder / "job.json"
    job_file.write_text(json.dumps(asdict(job)))
    _run([python, str(ROOT / "tools" / "benchmark_step_trl.py"), str(job_file)], job, folder, "TRL")
    steps: list[dict[str, float]] = json.loads(Path(job.result).read_text())["steps"]
    return steps


def _run(command: list[str], job: Job, folder: Path, name: str) -> None:
    environment = os.environ | {
        "OMP_NUM_THREADS": str(job.threads),
        "PYTHONPATH": os.pathsep.join([str(folder.parent), str(ROOT)]),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "CUDA_VISIBLE_DEVICES": "",
    }
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        try:
            done = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=900)
        except FileNotFoundError:
            raise UserError(f"no interpreter {command[0]}: give the path of a python") from None
        except subprocess.TimeoutExpired:
            raise UserError(f"{name} ran for more than 900 s: take fewer --steps; its output is in {log}") from None
    if done.returncode:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise UserError(f"{name} ended with status {done.returncode}: {' '.join(last)}")
