"""Gemma 3 270M all the way: loaded, generated, trained, exported, converted (``make real-model-check``).

It needs the model's folder, which the tests never download, and some minutes, so it is skipped unless REAL_MODEL names
the folder. Run with ``-s``, it prints what it measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.telemetry.metrics import Record, read_metrics
from tests.processes import ROOT, environment

MODEL = os.environ.get("REAL_MODEL", "")
pytestmark = pytest.mark.skipif(not MODEL, reason="REAL_MODEL names no folder: run `make real-model-check`")
TOLERANCE = 1e-4
TIMEOUT = 14_400.0
"""Seconds, on a machine that others use; an idle one with two cores needs some minutes."""
SMALL = [
    *("rollout.prompts_per_step=4", "rollout.samples_per_prompt=4", "rollout.record=true", "threads=2"),
    *("algorithm.minibatches=2", "data.heldout=null", "checkpoint.every=0", "telemetry.plots=false"),
]


def run(directory: Path, *overrides: str) -> list[Record]:
    """Train in `directory` with the example's configuration; return the metrics of its steps."""
    config = str(ROOT / "examples/real_model/real_model.yaml")
    python("-m", "megatron_rlvr.train", config, *SMALL, *overrides, f"run_directory={directory}")
    return read_metrics(directory)


def python(*arguments: str) -> None:
    """Run a Python program that must succeed."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT / 4)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


@torch.no_grad()
def difference_from_transformers(folder: Path, rollouts: Path) -> float:
    """Return the largest difference of the log-probs of recorded completions from those that transformers computes."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    largest = 0.0
    for file in sorted(rollouts.glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        prompt = tokenizer(rows[0]["prompt"]).input_ids
        ids = torch.tensor([prompt + row["token_ids"] for row in rows])
        logprob = model(ids).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
        found = logprob.gather(2, ids[:, len(prompt) :, None])[..., 0]
        largest = max(largest, float((found - torch.tensor([row["logprobs"] for row in rows])).abs().max()))
    return largest


def weights(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a Hugging Face folder."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.timeout(TIMEOUT)
def test_from_the_folder_to_the_folder(sglang: SGLangConfig, tmp_path: Path) -> None:
    model = Path(MODEL)
    # Two steps with the real SGLang: the second one's completions come from weights that it received.
    trained = tmp_path / "trained"
    options = ["rollout.engine=sglang", f"rollout.sglang.python={sglang.python}", "checkpoint.export_huggingface=true"]
    options += ["rollout.sglang.start_timeout_seconds=1200", "rollout.sglang.server={max_total_tokens: 4096}"]
    steps = run(trained, f"model.path={model}", "steps=2", *options)
    for step in steps:
        print(
            f"step {step['step']}: SGLang's log-probs differ from the trainer's by at most {step['mismatch/max']:.1e}"
        )
    assert all(step["mismatch/max"] < TOLERANCE and step["grad_norm"] > 0 for step in steps)
    assert steps[1]["kl_rollout"] < TOLERANCE
    difference = difference_from_transformers(model, trained / "rollouts" / "step_000000")
    print(f"SGLang's log-probs differ from transformers' by at most {difference:.1e}")
    assert difference < TOLERANCE

    # The exported folder is what transformers and the local engine load.
    exported = trained / "huggingface"
    again = tmp_path / "again"
    (step,) = run(again, f"model.path={exported}", "steps=1")
    difference = difference_from_transformers(exported, again / "rollouts" / "step_000000")
    print(f"exported: the local engine's log-probs differ from transformers' by at most {difference:.1e}")
    assert difference < TOLERANCE and step["mismatch/max"] < TOLERANCE
    before, after = weights(model), weights(exported)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if "proj" in name or "embed" in name)

    # To Megatron's format and back.
    python("tools/convert_checkpoint.py", "to-megatron", str(model), str(tmp_path / "megatron"))
    arguments = ["to-huggingface", str(tmp_path / "megatron"), str(tmp_path / "back"), "--model", str(model)]
    python("tools/convert_checkpoint.py", *arguments)
    back = weights(tmp_path / "back")
    assert back.keys() == before.keys()
    assert all(back[name].dtype == before[name].dtype and torch.equal(back[name], before[name]) for name in before)
    print(f"{len(before)} tensors converted to Megatron's format and back: bit-equal")
