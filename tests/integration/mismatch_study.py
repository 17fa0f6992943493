"""Does the mismatch alarm ring for planted faults, and only for them? Trains the quickstart with each of them.

python tests/integration/mismatch_study.py [--steps 16] [--seeds 3]        # make mismatch-study

Faults begin at step 3 and must ring within two steps. A healthy run, one whose rollouts are two steps old and one whose
rollouts come from bfloat16 weights must never ring.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_rlvr import components, train
from megatron_rlvr.telemetry.metrics import read_metrics
from tests.planted_faults import FAULTS, HEALTHY, FaultyEngine
from tests.processes import ROOT
from tests.rendezvous import renew

START = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=16, help="steps of a run that must not ring")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[*HEALTHY, *FAULTS])
    arguments = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data = [sys.executable, ROOT / "examples/quickstart/countdown.py", "--output", folder]
        subprocess.run(make_data, check=True, stdout=subprocess.DEVNULL)
        print(
            "| rollouts | seed | KL before | KL | surprise / its error | missing mass | rings at steps | as it should |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for number, (case, seed) in enumerate(
            (case, seed) for case in arguments.only for seed in range(arguments.seeds)
        ):
            renew(number)
            healthy = case in HEALTHY
            run = folder / f"{case}-{seed}"
            train_with(case, run, folder, seed, arguments.steps if healthy else START + 2)
            records = read_metrics(run)
            rings = [int(record["step"]) for record in records if record["mismatch/alarm"]]
            right = not rings if healthy else bool(rings) and rings[0] in (START, START + 1)
            wrong += not right
            of = records[-1]
            print(
                f"| {case} | {seed} | {records[2]['kl_rollout']:.1e} | {of['kl_rollout']:.1e} | "
                f"{of['mismatch/surprise'] / max(of['mismatch/surprise_standard_error'], 1e-12):+.1f} | "
                f"{of['mismatch/missing_mass']:+.1e} | {rings} | {'yes' if right else 'NO'} |",
                flush=True,
            )
    return 1 if wrong else 0


def train_with(case: str, run: Path, data: Path, seed: int, steps: int) -> None:
    """Train the quickstart with the rollouts of `case`."""

    def build_engine(config, policy, resources):
        return FaultyEngine(policy.model_chunks, config.rollout.local_batch, (FAULTS | HEALTHY)[case], START)

    original, components.build_engine = components.build_engine, build_engine
    output = io.StringIO()
    overrides = [
        *(f"run_directory={run}", f"seed={seed}", f"steps={steps}", "threads=1", "checkpoint.every=0"),
        *(f"data.train={data / 'train.jsonl'}", "data.heldout=null", "checkpoint.export_huggingface=false"),
        *("telemetry.plots=false", "telemetry.tensorboard=false", "telemetry.samples_every=0"),
    ]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = train.main([str(ROOT / "examples/quickstart/quickstart.yaml"), *overrides])
    components.build_engine = original
    if status and "in a row: engine and trainer compute different policies" not in output.getvalue():
        raise SystemExit(output.getvalue()[-3000:])


if __name__ == "__main__":
    sys.exit(main())
