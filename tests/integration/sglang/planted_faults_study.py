"""Does the mismatch alarm ring for faults of the real SGLang? ``python FILE FOLDER [--seeds 3]``

A random Qwen3-MoE is served in float32 by SGLang on the CPU. The server gets the weights of `tests.planted_faults`
under the right version, or samples as it was not asked to, while the trainer keeps the right weights. Each fault must
ring in the first step with it, and right rollouts must not: the exit status is 1 otherwise. Not part of the test suite,
because a server takes a minute to start. `test_engine.py` plants some of these faults in a server that it has anyway.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from routing_replay_study import VOCABULARY, make_model

from megatron_rlvr.config import Config, resolve
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ModelConfig, ParallelConfig
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.mismatch import MismatchAlarm
from megatron_rlvr.rollout.sampling import SamplingSettings
from megatron_rlvr.training.rollout_metrics import measure_rollout
from tests.generation import generate
from tests.planted_faults import FAULTS, Fault, exchanged_layers, noise, permuted_expert

# A server reports the log-probs of the whole distribution at the temperature that it was asked for, so that what it
# samples from cannot be seen in them.
CASES = {
    "none": Fault(),
    "permuted-expert": Fault(permuted_expert),
    "exchanged-layers": Fault(exchanged_layers),
    **{name: fault for name, fault in FAULTS.items() if fault.reports_own},
}
PROMPTS, SAMPLES, TOKENS = 8, 32, 32


def main() -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model and logs are written")
    python = os.environ.get("SGLANG_PYTHON", ".venv-sglang/bin/python")
    parser.add_argument("--python", default=python, help="Python of SGLang's environment")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    from megatron_rlvr.rollout.engines.sglang.engine import SGLangEngine
    from megatron_rlvr.training.policy import Policy

    model = make_model(options.folder / "model", 0.0, 1.0)
    servers = SGLangConfig(
        python=options.python,
        server={"max_total_tokens": 16384},
        weight_sync="disk",
        health_timeout_seconds=300.0,
    )
    settings = ModelConfig(path=str(model), dtype="float32", layer_spec="local")
    config = resolve(Config(model=settings, rollout=RolloutConfig(sglang=servers)), on_gpu=False)
    wrong = version = 0
    print("| served | seed | KL | surprise / its error | rings |")
    print("| --- | --- | --- | --- | --- |")
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout, ExitStack() as resources:
        policy = Policy(config, layout)
        engine = SGLangEngine(config.rollout, options.folder / "sglang", policy, resources)
        parameters = {name: p for chunk in policy.model_chunks for name, p in chunk.named_parameters()}
        own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        before = noise(0.03)(own, own)

        def set_weights(weights: dict[str, torch.Tensor]) -> None:
            for name, weight in weights.items():
                parameters[name].data.copy_(weight)

        for name, fault in CASES.items():
            version += 1
            set_weights(fault.weights(own, before))
            engine.update_weights(version)
            set_weights(own)
            right = SamplingSettings(samples=SAMPLES, max_tokens=TOKENS)
            sampling = replace(right, temperature=fault.temperature, top_p=fault.top_p, top_k=fault.top_k)
            for seed in range(options.seeds):
                generator = torch.Generator().manual_seed(seed)
                prompts = torch.randint(3, VOCABULARY, (PROMPTS, 12), generator=generator).tolist()
                completions = generate(engine, prompts, sampling, first_seed=10**5 * seed)
                batch = RolloutBatch.from_completions(prompts, completions, [0.0] * len(completions), padding=0)
                weight = torch.ones(len(completions))
                measured = measure_rollout(batch, weight, policy.score(batch, weight), layout).metrics
                alarm = MismatchAlarm.build(config, True, True)
                alarm.observe(version, measured)
                rings = alarm.warned > 0
                wrong += rings == (name == "none")
                surprise = measured["mismatch/surprise"] / measured["mismatch/surprise_standard_error"]
                row = (name, seed, f"{measured['kl_rollout']:.1e}", f"{surprise:+.1f}", "yes" if rings else "no")
                print(f"| {' | '.join(map(str, row))} |", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
