"""Seconds a training step beside TRL's GRPOTrainer: python tools/benchmark_step.py --trl-python PYTHON.

Both train the same small Qwen2 model (random weights, made on the fly) on the same prompts: the same number of samples,
tokens and optimizer updates a step, in fp32 on the CPU, each in processes of its own that take turns, so that both meet
the same state of the machine. TRL runs under PYTHON, an interpreter with the `bench` extra installed; without
--trl-python only this project is measured.

Our trainer bounds the time that OpenMP threads spin and keeps glibc from unmapping what tensors free; TRL runs as torch
comes. On a machine that is busy with other work, set OMP_WAIT_POLICY=passive for both: threads that spin while they
wait for a preempted one make a step many times slower there. Exit status 2, with one line on
stderr, for user errors.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rlvr.errors import UserError
from megatron_rlvr.telemetry.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
CHARACTERS = "".join(map(chr, range(33, 127)))  # printable, without the blank
UNUSED = tuple(f"00{i}" for i in range(13))  # never encoded, for a vocabulary of 108
PROMPT_TOKENS = 8
WARM_UP_STEPS = 2  # the first steps of a process allocate and tune; both halves leave them out
OPTIMIZER = "the optimizer"
PARTS = {
    # label: (parts of TRL's step, parts of ours)
    "generation": (("generation",), ("time/generate",)),
    "verification": (("verification",), ("time/verify",)),
    "scoring of the old policy": (("old_logprob",), ("time/score",)),
    "forward and backward of the updates": (("forward", "backward"), ("time/forward_backward",)),
    OPTIMIZER: (("optimizer",), ("time/optimizer",)),
}

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
    """Write a Qwen2 model with random weights and a tokenizer as a Hugging Face folder; its parameters."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    # Letters rather than words: transformers loads the tokenizer of any qwen2 model as Qwen2Tokenizer, whose byte-level
    # pre-tokenizer would split words that its merges do not join. Without merges every character is a token.
    vocabulary = {letter: i for i, letter in enumerate([*CHARACTERS, *UNUSED, "<eos>"])}
    Qwen2Tokenizer(
        vocab=vocabulary, merges=[], unk_token="<eos>", eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(vocabulary),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=len(vocabulary) - 1,
            pad_token_id=len(vocabulary) - 1,
        )
    )
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def make_data(file: Path, count: int, seed: int) -> None:
    """Write prompts of PROMPT_TOKENS tokens each, in the JSONL format of real data sets."""
    chance = random.Random(seed)
    with file.open("w") as lines:
        for _ in range(count):
            prompt = "".join(chance.choices("0123456789", k=PROMPT_TOKENS - 1)) + "="
            lines.write(json.dumps({"prompt": prompt, "answer": ""}) + "\n")


@dataclass
class Step:
    """One measured step: its seconds, the tokens it generated, and the seconds of its parts by their label in PARTS."""

    seconds: float
    tokens: int
    parts: dict[str, float]

    @property
    def outside(self) -> float:
        """The fraction of the step that is neither generation, verification nor a pass through the model."""
        return 1 - sum(seconds for label, seconds in self.parts.items() if label != OPTIMIZER) / self.seconds


def run_trl(job: Job, python: str, folder: Path) -> list[Step]:
    """Train with TRL in a process of its own; its steps."""
    job_file = folder / "job.json"
    job_file.write_text(json.dumps(asdict(job)))
    _run([python, str(ROOT / "tools" / "benchmark_step_trl.py"), str(job_file)], job, folder, "TRL")
    steps = json.loads(Path(job.result).read_text())["steps"]
    return [
        Step(
            s["step"], int(s["tokens"]), {label: sum(s[name] for name in names) for label, (names, _) in PARTS.items()}
        )
        for s in steps
    ]


def run_ours(job: Job, folder: Path) -> list[Step]:
    """Train with megatron_rlvr in a process of its own; its steps.

    Raises UserError when a step generated another number of tokens than the job asks for.
    """
    configuration = {
        "name": "benchmark",
        "seed": job.seed,
        # The last step also saves; it is left out.
        "steps": job.steps + 1,
        "threads": job.threads,
        "run_directory": str(folder / "run"),
        "model": {"path": job.model, "dtype": "float32"},
        "data": {"train": job.data},
        "verifier": {"name": "benchmark_reward:reward"},
        "rollout": {
            "prompts_per_step": job.prompts,
            "samples_per_prompt": job.samples,
            "max_tokens": job.response_tokens,
            "ignore_eos": True,
            "local_batch": job.prompts * job.samples,
        },
        # TRL updates on every sequence, so we do, too.
        "algorithm": {"minibatches": job.updates, "drop_zero_advantage": False},
        "optimizer": {"learning_rate": job.learning_rate, "beta2": 0.999, "clip_grad": 1.0},
        "checkpoint": {"every": 0, "export_huggingface": False},
        "telemetry": {"plots": False},
    }
    file = folder / "benchmark.yaml"
    file.write_text(json.dumps(configuration, indent=2))  # JSON is YAML
    _run([sys.executable, "-m", "megatron_rlvr.train", str(file)], job, folder, "megatron_rlvr")
    steps = [
        Step(r["time/step"], int(r["tokens"]), {label: sum(r[n] for n in names) for label, (_, names) in PARTS.items()})
        for r in read_metrics(folder / "run")[: job.steps]
    ]
    wanted = job.prompts * job.samples * job.response_tokens
    if any(step.tokens != wanted for step in steps):
        raise UserError(f"a step generated {[step.tokens for step in steps]} tokens instead of {wanted}")
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


def report(measured: dict[str, list[Step]], console: Console) -> None:
    """Print the medians over all measured steps, the fastest and slowest, and TRL's time over ours."""
    names = list(measured)
    table = Table(title="Median of the measured steps \\[fastest, slowest]", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    if len(names) > 1:
        table.add_column(" / ".join(names), justify="right")

    def row(label: str, of: Callable[[Step], float], form: str) -> None:
        values = {name: [of(step) for step in steps] for name, steps in measured.items()}
        medians = {name: statistics.median(v) for name, v in values.items()}
        cells = [f"{medians[n]:{form}} \\[{min(values[n]):{form}}, {max(values[n]):{form}}]" for n in names]
        if len(names) > 1:
            first, second = (medians[name] for name in names)
            cells.append(f"{first / second:.2f}" if second else "-")
        table.add_row(label, *cells)

    row("seconds a step", lambda step: step.seconds, ".3f")
    row("generated tokens a second", lambda step: step.tokens / step.parts["generation"], ",.0f")
    for label in PARTS:
        row(f"seconds of {label}", lambda step, label=label: step.parts[label], ".3f")  # type: ignore[misc]
    row("fraction outside generation, verification and passes", lambda step: step.outside, ".1%")
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Seconds a training step beside TRL's GRPOTrainer.")
    parser.add_argument("--trl-python", help="interpreter with the `bench` extra; without it only this project runs")
    parser.add_argument("--rounds", type=int, default=3, help="times that each half runs, taking turns")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16, help="completions of a prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of a completion")
    parser.add_argument("--updates", type=int, default=8, help="optimizer steps of a rollout")
    parser.add_argument("--json", type=Path, help="write every measured step to this file")
    options = parser.parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=132)  # a log keeps the table's lines whole
    try:
        if options.prompts % options.updates:
            raise UserError(
                f"--updates {options.updates} does not divide --prompts {options.prompts}: choose a divisor"
            )
        with tempfile.TemporaryDirectory(prefix="benchmark_step_") as name:
            measured = measure(options, Path(name), console)
    except UserError as error:
        print(f"benchmark_step: {error}", file=sys.stderr)
        return 2
    report(measured, console)
    if options.json:
        options.json.write_text(json.dumps({k: [asdict(step) for step in steps] for k, steps in measured.items()}))
    return 0


def measure(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, list[Step]]:
    """Run the halves in turns in folder; their measured steps."""
    model, data = folder / "model", folder / "train.jsonl"
    parameters = make_model(model, seed=0)
    make_data(data, count=16 * options.prompts, seed=0)
    (folder / "benchmark_reward.py").write_text(REWARD)
    console.print(
        f"{parameters / 1e6:.2f} M parameters, {options.prompts} prompts x {options.samples} samples x {options.tokens}"
        f" tokens, {options.updates} updates a step, {options.threads} threads, {os.cpu_count()} cores, "
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}",
        soft_wrap=True,
    )
    measured: dict[str, list[Step]] = {}
    for turn in range(options.rounds):
        for half in ("TRL", "megatron_rlvr") if options.trl_python else ("megatron_rlvr",):
            place = folder / f"{half}-{turn}"
            place.mkdir()
            job = Job(
                model=str(model),
                data=str(data),
                result=str(place / "result.json"),
                prompts=options.prompts,
                samples=options.samples,
                response_tokens=options.tokens,
                updates=options.updates,
                threads=options.threads,
                steps=options.steps + WARM_UP_STEPS,
                seed=turn,
            )
            # What else ran while this half did would explain an odd figure.
            load = os.getloadavg()[0]
            steps = run_trl(job, options.trl_python, place) if half == "TRL" else run_ours(job, place)
            steps = steps[WARM_UP_STEPS:]
            measured.setdefault(half, []).extend(steps)
            middle = statistics.median(step.seconds for step in steps)
            console.print(f"round {turn + 1}: {half} {middle:.2f} s a step (load average before: {load:.1f})")
    return measured


if __name__ == "__main__":
    sys.exit(main())
