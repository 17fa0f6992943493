"""What routing replay does to the mismatch of a bf16 rollout and float32 training: ``python FILE FOLDER``.

A random Qwen3-MoE is served in bf16, by the real SGLang on a CPU and by the local engine, and trained in float32. The
same completions are scored with and without their routes. Two models differ in their routers alone:

- *random*: independent weights. The scores of experts are far apart, so rounding seldom changes a choice.
- *close*: a large common part, which changes no choice, and small differences. Rounding to bf16 changes many choices,
  as in large models, whose many experts have close scores.

The exit status is 1 if the mean absolute difference of the log-probs falls less than tenfold for the model with close
scores. Not part of the test suite, because a server takes a minute to start.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_rlvr.config import Config, resolve
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ModelConfig, ParallelConfig
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.rollout.engines.local import LocalEngine
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.sampling import SamplingSettings
from tests.generation import generate

VOCABULARY = 128
ROUTERS = {"random": (0.0, 1.0), "close": (0.5, 0.05)}
"""Scale of the common part of the router's rows, and of their differences, by model."""
PROMPTS, SAMPLES = 8, 8
TOKENS = 40


def make_model(folder: Path, common: float, spread: float) -> Path:
    """Save a random Qwen3-MoE with these scales of the router's weights as a Hugging Face folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type="qwen3_moe",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=2,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
    )
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
            if name.endswith("mlp.gate.weight"):
                shared = torch.randn(1, parameter.size(1))
                parameter.copy_(common * shared + spread * torch.randn_like(parameter) / parameter.size(1) ** 0.5)
    model.save_pretrained(folder)
    return folder


@contextmanager
def local_engine(model: Path, layout: parallel.Layout) -> Iterator[LocalEngine]:
    """The local engine with the model in bf16."""
    yield LocalEngine(build_policy(model, layout, "bfloat16").model_chunks, batch=PROMPTS * SAMPLES)


@contextmanager
def sglang_engine(policy: Any, folder: Path, python: str) -> Iterator[Any]:
    """A real server in bf16 with the weights of the policy."""
    from megatron_rlvr.rollout.engines.sglang.engine import SGLangEngine

    server = {"dtype": "bfloat16", "max_total_tokens": 16384}
    config = Config(rollout=RolloutConfig(routing_replay=True, sglang=SGLangConfig(python=python, server=server)))
    with ExitStack() as resources:
        yield SGLangEngine(resolve(config, on_gpu=False).rollout, folder, policy, resources)


def build_policy(model: Path, layout: parallel.Layout, dtype: str) -> Any:
    from megatron_rlvr.training.policy import Policy

    settings = ModelConfig(path=str(model), dtype=dtype, layer_spec="local")  # type: ignore[arg-type]
    return Policy(Config(model=settings, rollout=RolloutConfig(routing_replay=True)), layout)


def compare(policy: Any, engine: Any, seed: int) -> tuple[float, float, float]:
    """Generate, and score with and without routes.

    Returns:
        the fraction of routes that differ, and the mean absolute difference of log-probs with and without replay.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, VOCABULARY, (PROMPTS, 12), generator=generator).tolist()
    sampling = SamplingSettings(samples=SAMPLES, max_tokens=TOKENS, routers=policy.routers)
    completions = generate(engine, prompts, sampling, first_seed=1000 * seed)
    batch = RolloutBatch.from_completions(prompts, completions, [0.0] * len(completions), padding=0)
    advantage = torch.ones(len(completions))
    policy.take_route_counts()
    replayed = policy.score(batch, advantage).logprob
    differing, routes = policy.take_route_counts().tolist()
    without = policy.score(dataclasses.replace(batch, routes=None), advantage).logprob
    means = [float((scored - batch.rollout_logprob).abs().mean()) for scored in (replayed, without)]
    return differing / routes, means[0], means[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where models and logs are written")
    python = os.environ.get("SGLANG_PYTHON", ".venv-sglang/bin/python")
    parser.add_argument("--python", default=python, help="Python of SGLang's environment")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    fell = []
    print("| routers | engine | seed | differing routes | with replay | without | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        for name, scales in ROUTERS.items():
            model = make_model(options.folder / name, *scales)
            policy = build_policy(model, layout, "float32")
            engines = {
                "local": local_engine(model, layout),
                "SGLang": sglang_engine(policy, options.folder / f"{name}-sglang", options.python),
            }
            for engine_name, opened in engines.items():
                with opened as engine:
                    for seed in range(1, options.seeds + 1):
                        differing, replayed, without = compare(policy, engine, seed)
                        row = (name, engine_name, seed, f"{differing:.1%}", f"{replayed:.2g}", f"{without:.2g}")
                        print(f"| {' | '.join(map(str, row))} | {without / replayed:.1f} |", flush=True)
                        fell += [without / replayed] if name == "close" else []
    return 0 if min(fell) >= 10 else 1


if __name__ == "__main__":
    sys.exit(main())
