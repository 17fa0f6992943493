"""What the tests train on: a random small Qwen2 folder with its own tokenizer, and Countdown problems."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parent.parent
# Read when torch loads, here and in what tests start: more threads than cores wait for each other, and must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


class ByFixture(LoadScopeScheduling):
    """Tests that share servers, a cluster or a build stay with one process: those of a file, or of a whole folder."""

    def _split_scope(self, nodeid: str) -> str:
        file = Path(nodeid.split("::", 1)[0])
        shares = file.parent.parent.name == "integration" or file.parent.name == "csrc"
        return str(file.parent if shares else file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFixture:
    """Used by pytest-xdist, whatever --dist says."""
    return ByFixture(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In several processes, the two longest scopes, a cluster and servers, begin, so that nobody waits for them."""
    if hasattr(config, "workerinput"):
        longest = ("tests/integration/slurm", "tests/integration/sglang")
        items.sort(key=lambda item: not item.nodeid.startswith(longest))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: Qwen2, 4 layers, hidden 32, random weights that are far from zero."""
    return make_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 64 prompts in the small model's language."""
    return write_problems(tmp_path_factory.mktemp("data") / "train.jsonl")


def write_problems(path: Path) -> Path:
    """Write a JSONL file of 64 prompts in the small model's language."""
    rng = random.Random(7)
    rows = []
    for _ in range(64):
        numbers = [rng.randint(1, 9) for _ in range(rng.choice((3, 4)))]
        target = rng.randint(1, 99)
        prompt = f"{' '.join(map(str, numbers))} : {target} >"
        rows.append({"prompt": prompt, "answer": {"numbers": numbers, "target": target}, "kind": target})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run_yaml(tmp_path: Path, small_model: Path, problems: Path) -> Path:
    """A configuration of a few quick steps on the small model; its reward says nothing but differs within groups."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
name: small
steps: 6
seed: 3
run_directory: {tmp_path / "run"}
threads: 1
model: {{path: {small_model}}}
data: {{train: {problems}, heldout: {problems}}}
verifier: {{name: "tests.rewards:letter_sum", workers: 0}}
rollout: {{prompts_per_step: 8, samples_per_prompt: 4, max_tokens: 10}}
algorithm: {{epochs: 2, minibatches: 2, schedule: {{name: increase-then-decrease}}}}
optimizer: {{learning_rate: 3.0e-3}}
evaluation: {{prompts: 8, samples: 4}}
checkpoint: {{every: 1, keep: 2}}
telemetry: {{tensorboard: false, plots: false}}
"""
    )
    return path


def make_small_model(folder: Path, seed: int = 0, tied: bool = True, hidden: int = 32, mixture: bool = False) -> Path:
    """Save a random Qwen2, or Qwen3-MoE, and the quickstart's tokenizer as a Hugging Face folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    from make_base_model import TOKEN, VOCABULARY_SIZE, make_tokenizer

    make_tokenizer().save_pretrained(folder)
    torch.manual_seed(seed)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": hidden, "norm_topk_prob": True}
    config = AutoConfig.for_model(
        model_type="qwen3_moe" if mixture else "qwen2",
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        eos_token_id=TOKEN["<eos>"],
        pad_token_id=TOKEN["<pad>"],
        **(experts if mixture else {}),
    )
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)  # biases and norms included: every weight matters
    model.save_pretrained(folder)
    return folder


def environment() -> dict[str, str]:
    """For a trainer process: the tree under test first on the path, one thread."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def run_trainer(*arguments: object, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`python -m megatron_rlvr.train`, under torchrun for several processes; the test fails unless status is 0."""
    return launch(["-m", "megatron_rlvr.train", *map(str, arguments)], processes, check)


def run_trainers(runs: Sequence[Sequence[object]], processes: int = 1) -> None:
    """Several trainings one after the other in the same processes, which import torch and megatron-core once."""
    lines = [json.dumps([str(a) for a in run]) for run in runs]
    launch([str(ROOT / "tests" / "train_each.py"), *lines], processes, check=True)


def launch(program: list[str], processes: int, check: bool) -> subprocess.CompletedProcess[str]:
    """Run a Python program, under torchrun for several processes; with `check` the test fails unless status is 0."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, *program], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    if check and done.returncode:
        pytest.fail(f"status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done
