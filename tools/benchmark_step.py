"""Compare seconds per training step with TRL's GRPOTrainer: python tools/benchmark_step.py [--trl-python PYTHON].

Both trainers train the same small Qwen2 model with random weights on the same prompts, with the same number of samples,
tokens and optimizer updates per step, in fp32 on the CPU. They run in turns, each run in a process of its own, so that
both see the same load of the machine. TRL runs under PYTHON, an interpreter with the `trl` extra installed; the default
is that of `make trl`. Without either only this project is measured, and the report says so.

This project limits how long OpenMP threads spin and keeps glibc from returning freed memory to the kernel; TRL runs
with torch's defaults. On a machine that is busy with other work, set OMP_WAIT_POLICY=passive for both: threads that
spin while they wait for a preempted one make a step many times slower. User errors are one line on stderr and exit
status 2.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, user_errors_reported
from megatron_rlvr.log_tail import last_error
from megatron_rlvr.telemetry.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
CHARACTERS = "".join(map(chr, range(33, 127)))  # printable ASCII without the space
UNUSED = tuple(f"00{i}" for i in range(13))  # never encoded; they bring the vocabulary to 108
PROMPT_TOKENS = 8
WARM_UP_STEPS = 2  # not measured: the first steps of a process allocate memory and tune kernels
OPTIMIZER = "the optimizer"
PARTS = {
    # label: (parts of a TRL step, time metrics of this project)
    "generation": (("generation",), ("time/generate",)),
    "verification": (("verification",), ("time/verify",)),
    "scoring of the old policy": (("old_logprob",), ("time/score",)),
    "forward and backward of the updates": (("forward", "backward"), ("time/forward_backward",)),
    OPTIMIZER: (("optimizer",), ("time/optimizer",)),
}

REWARD = '''"""The reward of both trainers: cheap, and different between samples."""


def reward(completion, answer):
    return completion.count("7") / 16
'''


@dataclass
class Job:
    """What both trainers do. Paths are strings because the job is passed as JSON."""

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
    """Write a Hugging Face folder with a Qwen2 model of random weights; returns the number of parameters."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    # transformers loads the tokenizer of any qwen2 model as Qwen2Tokenizer, whose byte-level pre-tokenizer splits words
    # that its merges do not join. Without merges every character is one token.
    vocabulary = {token: i for i, token in enumerate([*CHARACTERS, *UNUSED, "<eos>"])}
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
    """Write a JSONL data set of prompts with PROMPT_TOKENS tokens each."""
    generator = random.Random(seed)
    with file.open("w") as lines:
        for _ in range(count):
            prompt = "".join(generator.choices("0123456789", k=PROMPT_TOKENS - 1)) + "="
            lines.write(json.dumps({"prompt": prompt, "answer": ""}) + "\n")


@dataclass
class Step:
    """One measured step: seconds, generated tokens, and the seconds of its parts by label of PARTS."""

    seconds: float
    tokens: int
    parts: dict[str, float]

    @property
    def outside(self) -> float:
        """The fraction of the step outside generation, verification and passes through the model."""
        return 1 - sum(seconds for label, seconds in self.parts.items() if label != OPTIMIZER) / self.seconds


def run_trl(job: Job, python: str, folder: Path) -> list[Step]:
    """Train with TRL in a new process; returns its steps."""
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


def run_megatron_rlvr(job: Job, folder: Path) -> list[Step]:
    """Train with megatron_rlvr in a new process; returns its steps.

    Raises UserError when the number of tokens that a step generated is not that of the job.
    """
    configuration = {
        "name": "benchmark",
        "seed": job.seed,
        # One more than is measured, because the last step also writes a checkpoint.
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
        # TRL also updates on sequences without advantage.
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
    expected = job.prompts * job.samples * job.response_tokens
    if any(step.tokens != expected for step in steps):
        raise UserError(f"the steps generated {[step.tokens for step in steps]} tokens instead of {expected} each")
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
            raise UserError(f"no interpreter {command[0]}: give the path of a Python interpreter") from None
        except subprocess.TimeoutExpired:
            raise UserError(f"{name} ran for more than 900 s: use fewer --steps; its output is in {log}") from None
    if done.returncode:
        raise UserError(f"{name} ended with status {done.returncode}: {last_error(log)}")


def report(measured: dict[str, list[Step]], console: Console) -> None:
    """Print the median, fastest and slowest of all measured steps, and the ratio of TRL's median to this project's."""
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

    row("seconds per step", lambda step: step.seconds, ".3f")
    row("generated tokens per second", lambda step: step.tokens / step.parts["generation"], ",.0f")
    for label in PARTS:
        row(f"seconds of {label}", lambda step, label=label: step.parts[label], ".3f")  # type: ignore[misc]
    row("fraction outside generation, verification and passes", lambda step: step.outside, ".1%")
    console.print(table)


@user_errors_reported
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compare seconds per training step with TRL's GRPOTrainer.")
    parser.add_argument(
        "--trl-python",
        default=str(TRL_PYTHON) if TRL_PYTHON.exists() else None,
        help="interpreter with the `trl` extra (default: that of `make trl`); without it only this project is measured",
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each trainer, in turns")
    parser.add_argument("--steps", type=int, default=6, help="measured steps per run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16, help="completions per prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens per completion")
    parser.add_argument("--updates", type=int, default=8, help="optimizer steps per rollout")
    parser.add_argument("--json", type=Path, help="write every measured step to this file")
    options = parser.parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=132)  # keeps the lines of the table on one line each in a log
    if options.prompts % options.updates:
        raise UserError(f"--updates {options.updates} does not divide --prompts {options.prompts}: choose a divisor")
    with tempfile.TemporaryDirectory(prefix="benchmark_step_") as name:
        if not options.trl_python:
            console.print("Without TRL: `make trl` installs it, or name an interpreter that has it with --trl-python.")
        measured = measure(options, Path(name), console)
    report(measured, console)
    if options.json:
        options.json.write_text(json.dumps({k: [asdict(step) for step in steps] for k, steps in measured.items()}))
    return EXIT_DONE


def measure(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, list[Step]]:
    """Run both trainers in turns in `folder`; returns the measured steps by trainer."""
    model, data = folder / "model", folder / "train.jsonl"
    parameters = make_model(model, seed=0)
    make_data(data, count=16 * options.prompts, seed=0)
    (folder / "benchmark_reward.py").write_text(REWARD)
    console.print(
        f"{parameters / 1e6:.2f} M parameters, {options.prompts} prompts x {options.samples} samples x {options.tokens}"
        f" tokens, {options.updates} updates per step, {options.threads} threads, {os.cpu_count()} cores, "
        f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}",
        soft_wrap=True,
    )
    measured: dict[str, list[Step]] = {}
    for turn in range(options.rounds):
        for trainer in ("TRL", "megatron_rlvr") if options.trl_python else ("megatron_rlvr",):
            folder_of_run = folder / f"{trainer}-{turn}"
            folder_of_run.mkdir()
            job = Job(
                model=str(model),
                data=str(data),
                result=str(folder_of_run / "result.json"),
                prompts=options.prompts,
                samples=options.samples,
                response_tokens=options.tokens,
                updates=options.updates,
                threads=options.threads,
                steps=options.steps + WARM_UP_STEPS,
                seed=turn,
            )
            # The load of other processes may explain an outlier.
            load = os.getloadavg()[0]
            steps = (
                run_trl(job, options.trl_python, folder_of_run)
                if trainer == "TRL"
                else run_megatron_rlvr(job, folder_of_run)
            )
            steps = steps[WARM_UP_STEPS:]
            measured.setdefault(trainer, []).extend(steps)
            median = statistics.median(step.seconds for step in steps)
            console.print(f"round {turn + 1}: {trainer} {median:.2f} s per step (load average before: {load:.1f})")
    return measured


if __name__ == "__main__":
    sys.exit(main())
