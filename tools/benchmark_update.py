"""Measure memory and seconds of one GPU's scoring and update, and compare them with what `tools/plan.py` computes.

    python tools/benchmark_update.py              Qwen2.5-0.5B's shape, 16 sequences of 2048 tokens; on the CPU 4 of 256
    python tools/benchmark_update.py --architecture config.json --fused --recompute

The tool makes a random model of that shape in a temporary folder, and uses megatron-core's local layers. The first
scoring pass and the first update are not counted. On the CPU it measures seconds only.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_rlvr.checked_input import read_json
from megatron_rlvr.config import Config, resolve
from megatron_rlvr.control import AffineThreshold, ClipThresholds
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.megatron import device, parallel
from megatron_rlvr.megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_rlvr.objectives import UpdateObjective, build_objective
from megatron_rlvr.rollout.config import RolloutConfig

QWEN25_HALF_B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
}
GIB = 2**30


def benchmark_config(folder: Path, arguments: argparse.Namespace, on_gpu: bool) -> Config:
    config = Config(
        model=ModelConfig(path=str(folder), layer_spec="local"),
        rollout=RolloutConfig(
            max_tokens=arguments.response, prompts_per_step=1, samples_per_prompt=arguments.sequences
        ),
        optimizer=OptimizerConfig(learning_rate=1e-6),
        parallel=ParallelConfig(
            microbatch_sequences=arguments.microbatch, recompute="full" if arguments.recompute else "none"
        ),
    )
    config.data.max_prompt_tokens = arguments.prompt
    config.algorithm.fused_linear, config.algorithm.minibatches, config.algorithm.epochs = arguments.fused, 1, 1
    return resolve(config, on_gpu=on_gpu)


def planned(folder: Path, arguments: argparse.Namespace) -> dict[str, int]:
    """Bytes that the plan computes. Runs in a process of its own, because it starts a fake process group."""
    from megatron_rlvr.megatron.stage_shapes import model_stages
    from megatron_rlvr.planning.memory import phase_memory, static_memory

    config = benchmark_config(folder, arguments, on_gpu=True)
    shape, dtype, (stage,) = model_stages(config.model, config.parallel, 1)
    held = static_memory(stage, config.parallel, dtype, 1).total
    return {"held": held, "peak": held + phase_memory(shape, stage, config, dtype.itemsize, 1).update}


def make_model(folder: Path, architecture: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = dict(architecture)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    model.to(torch.bfloat16).save_pretrained(folder)


def seconds(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes, until the GPU has finished it."""
    if device.on_gpu():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(folder: Path, arguments: argparse.Namespace, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, vocabulary, (arguments.prompt,), generator=generator).tolist()
    shape = (arguments.sequences, arguments.response)
    responses = torch.randint(0, vocabulary, shape, generator=generator).tolist()
    completions = [Completion(r, [-1.0] * len(r), "length", 0) for r in responses]
    count = arguments.sequences
    batch = RolloutBatch.from_completions([prompt], completions, [0.0] * count, padding=0)
    advantage, weight = torch.randn(count, generator=generator), torch.full((count,), 1 / batch.token_count)
    objective = UpdateObjective(build_objective("clip"), ClipThresholds(AffineThreshold(0.2), AffineThreshold(0.2)))
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        from megatron_rlvr.training.policy import Policy

        gc.collect()
        before = torch.cuda.memory_allocated() if device.on_gpu() else 0
        policy = Policy(benchmark_config(folder, arguments, device.on_gpu()), layout)
        scoring = [seconds(lambda: policy.score(batch, advantage)) for _ in range(2)][1]
        scores = policy.score(batch, advantage)

        def update() -> None:
            policy.update(batch, torch.arange(count), advantage, weight, scores, objective)

        update()
        if device.on_gpu():
            held = torch.cuda.memory_allocated() - before
            torch.cuda.reset_peak_memory_stats()
        updating = statistics.median(seconds(update) for _ in range(arguments.updates))
        print(f"score {scoring:.3f} s, update {updating:.3f} s of {batch.token_count} response tokens")
        if device.on_gpu():
            print_memory(held, torch.cuda.max_memory_allocated() - before, folder, arguments)


def print_memory(held: int, peak: int, folder: Path, arguments: argparse.Namespace) -> None:
    command = [sys.executable, __file__, *sys.argv[1:], "--planned", str(folder)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    plan = json.loads(output.splitlines()[-1])
    for name, measured in (("held", held), ("peak", peak)):
        print(f"{name} {measured / GIB:.3f} GiB, planned {plan[name] / GIB:.3f} ({plan[name] / measured - 1:+.1%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=Path, help="a model's config.json")
    on_gpu = device.on_gpu()
    parser.add_argument("--sequences", type=int, default=16 if on_gpu else 4)
    parser.add_argument("--microbatch", type=int, default=4, help="sequences per microbatch")
    parser.add_argument("--prompt", type=int, default=512 if on_gpu else 64)
    parser.add_argument("--response", type=int, default=1536 if on_gpu else 192)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--fused", action="store_true", help="algorithm.fused_linear")
    parser.add_argument("--recompute", action="store_true", help="parallel.recompute=full")
    parser.add_argument("--planned", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.planned:
        print(json.dumps(planned(arguments.planned, arguments)))
        return
    architecture: dict[str, Any] = (
        QWEN25_HALF_B
        if arguments.architecture is None
        else read_json(arguments.architecture, remedy="give the config.json of a model")
    )
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), architecture)
        measure(Path(folder), arguments, architecture["vocab_size"])


if __name__ == "__main__":
    main()
