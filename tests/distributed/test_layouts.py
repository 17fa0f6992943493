"""Every parallel layout computes what one process computes, on the same rollouts."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_rlvr.telemetry.metrics import deterministic, read_metrics
from tests.processes import run_trainers
from tests.small_model import make_small_model
from tests.waiting_probe import computes, records, violations

LAYOUTS = {
    "dp2": (2, []),
    "tp2": (2, ["parallel.tensor=2"]),
    "tp2-sp": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "tp2-sp-fused": (2, ["parallel.tensor=2", "parallel.sequence=true", "algorithm.fused_linear=true"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "pp2-microbatches": (2, ["parallel.pipeline=2", "parallel.microbatch_sequences=3"]),
    "dp2-packed": (2, ["parallel.microbatch_tokens=70"]),
    "pp2-packed-fused": (2, ["parallel.pipeline=2", "parallel.microbatch_tokens=80", "algorithm.fused_linear=true"]),
    "tp2-sp-packed": (2, ["parallel.tensor=2", "parallel.sequence=true", "parallel.microbatch_tokens=90"]),
    "cp2": (2, ["parallel.context=2"]),
    "cp2-fused": (2, ["parallel.context=2", "algorithm.fused_linear=true"]),
    "pp2-interleaved": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.microbatch_sequences=3"]),
    "tp2-sp-recompute": (2, ["parallel.tensor=2", "parallel.sequence=true", "parallel.recompute=full"]),
    "cp2-packed-recompute": (
        2,
        ["parallel.context=2", "parallel.microbatch_tokens=100", "parallel.recompute=selective"],
    ),
    "dp2-zero": (2, ["parallel.distributed_optimizer=true"]),
    "tp2-dp2": (4, ["parallel.tensor=2"]),
    "tp2-pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "cp2-tp2-sp": (4, ["parallel.context=2", "parallel.tensor=2", "parallel.sequence=true"]),
    "cp2-pp2-packed": (4, ["parallel.context=2", "parallel.pipeline=2", "parallel.microbatch_tokens=100"]),
    "pp2-interleaved-dp2-zero": (
        4,
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.distributed_optimizer=true"],
    ),
    "cp2-dp2": (4, ["parallel.context=2", "parallel.microbatch_sequences=3"]),
    "pp2-dp2-zero": (4, ["parallel.pipeline=2", "parallel.distributed_optimizer=true"]),
}
# With a penalty on KL to another model, in the loss.
LOSS_KL = ["algorithm.kl_coefficient=0.3", "reference.weights=host"]
MIXTURES = {
    "moe-ep2-zero": (2, ["parallel.expert=2", "parallel.distributed_optimizer=true", *LOSS_KL]),
    "moe-ep2-packed": (2, ["parallel.expert=2", "parallel.microbatch_tokens=60", *LOSS_KL]),
    "moe-pp2": (2, ["parallel.pipeline=2", *LOSS_KL]),
    "moe-tp2-ep2": (2, ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2", *LOSS_KL]),
}
# Under top-p and top-k, so that kept sets travel between processes, and with the penalty in the reward, which all ranks
# of a data-parallel rank need.
CUT = [
    *("rollout.top_p=0.8", "rollout.top_k=50", "reference.weights=disk"),
    *("algorithm.kl_coefficient=0.3", "algorithm.kl_in=reward"),
]
CUTS = {
    "cut-dp2-packed": (2, ["parallel.microbatch_tokens=70", *CUT]),
    "cut-tp2-sp": (2, ["parallel.tensor=2", "parallel.sequence=true", *CUT]),
    "cut-pp2-fused": (2, ["parallel.pipeline=2", "algorithm.fused_linear=true", *CUT]),
    "cut-cp2": (2, ["parallel.context=2", *CUT]),
}
# Routes are recorded and replayed; `test_replayed_layouts.py` replays random ones.
R3 = ["rollout.routing_replay=true"]
REPLAYED = {
    "r3-pp2-interleaved": (
        2,
        [
            *("parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.microbatch_sequences=3"),
            *("parallel.recompute=full", *R3),
        ],
    ),
    "r3-dp2-packed": (2, ["parallel.microbatch_tokens=70", *R3]),
}
# Rollouts whose log-probs are not those of the policy that trains, with corrections of every kind.
OFF = ["algorithm.objective.importance='icepop(cap=2) + mis(cap=2) + opsm(cap=0.02) + m2po(cap=0.2)'"]
OFF_POLICY = {
    "off-dp2-fused": (2, ["parallel.microbatch_sequences=3", "algorithm.fused_linear=true", *OFF]),
    "off-cp2-packed": (2, ["parallel.context=2", "parallel.microbatch_tokens=100", *OFF]),
    "off-pp2": (2, ["parallel.pipeline=2", *OFF]),
    "off-tp2-sp": (2, ["parallel.tensor=2", "parallel.sequence=true", *OFF]),
}
# Tensor, pipeline and data parallelism combined, and layouts with every option.
EIGHT = {
    "tp2-pp2-dp2": (8, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "tp2-sp-cp2-pp2-packed": (
        8,
        [
            *("parallel.tensor=2", "parallel.sequence=true", "parallel.context=2", "parallel.pipeline=2"),
            *("parallel.microbatch_tokens=100", "parallel.recompute=full", "algorithm.fused_linear=true"),
        ],
    ),
    "moe-tp2-sp-pp2-ep4-zero": (
        8,
        [
            *("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.virtual_pipeline=2"),
            *("parallel.expert=4", "parallel.distributed_optimizer=true"),
            *LOSS_KL,
        ],
    ),
}
# bfloat16 weights with float32 gradients and master weights: close to float32, and bit-equal when resumed.
HALF = {
    "bf16": (2, ["model.dtype=bfloat16"]),
    "bf16-zero": (2, ["model.dtype=bfloat16", "parallel.distributed_optimizer=true"]),
}
# Layouts whose run is reset to the checkpoint of its third step and resumed by two processes, with these overrides.
RESUMED = {
    **{name: overrides for name, (_, overrides) in HALF.items()},
    "moe-ep2-zero": ["parallel.pipeline=2", "parallel.distributed_optimizer=true", *LOSS_KL],
    "moe-ep2-packed": ["parallel.pipeline=2", *LOSS_KL],
    "moe-pp2": ["parallel.expert=2", *LOSS_KL],
    "pp2-interleaved": ["parallel.tensor=2"],
    "tp2-pp2": [],
    "dp2-zero": ["parallel.distributed_optimizer=true"],
    "pp2-dp2-zero": ["parallel.tensor=2", "parallel.distributed_optimizer=true"],
    "cut-dp2-packed": CUTS["cut-dp2-packed"][1],
    "cut-pp2-fused": ["parallel.tensor=2", "algorithm.fused_linear=true", *CUT],
    "r3-dp2-packed": REPLAYED["r3-dp2-packed"][1],
}
GENERATING = ("dp2", "tp2-sp", "pp2-interleaved", "cp2", *CUTS, "r3-pp2-interleaved")
EXACT = ("reward", "tokens", "lr")
CLOSE = (
    *("loss", "grad_norm", "entropy", "entropy_standard_error", "entropy_change/predicted", "entropy_change/measured"),
    *("ratio_max", "clip/upper_intercept", "clip/lower_slope", "control/steering", "control/shift"),
)
WITH_REFERENCE = ("kl_reference", "kl_penalty")


class Runs:
    """The runs in one folder. ``one``, ``moe-one`` and ``cut-one`` record their rollouts, and the layouts replay them.

    The same processes train all layouts of a group that have their number, when the first is requested.
    """

    def __init__(self, folder: Path, model: Path, problems: Path):
        self.folder, self.config = folder, folder / "run.yaml"
        self.config.write_text(
            f"""
steps: 4
seed: 1
run_directory: unset
threads: 1
model: {{path: {model}}}
data: {{train: {problems}, stratify_key: kind, max_prompt_tokens: 32}}
verifier: {{name: "tests.rewards:letter_sum", workers: 0}}
rollout: {{prompts_per_step: 8, samples_per_prompt: 4, max_tokens: 10, temperature: 0.9}}
algorithm: {{epochs: 2, minibatches: 2, schedule: {{name: target-entropy}}}}
optimizer: {{learning_rate: 1.0e-3}}
telemetry: {{tensorboard: false, plots: false}}
checkpoint: {{every: 3, keep: 9}}
"""
        )
        mixture = make_small_model(folder / "mixture", mixture=True)
        self.models = {"one": model, "cut-one": model, "moe-one": mixture, "r3-one": mixture}
        self.references = {
            "cut-one": make_small_model(folder / "reference", seed=5),
            "moe-one": make_small_model(folder / "mixture-reference", seed=5, mixture=True),
        }
        settings = {"cut-one": CUT, "moe-one": LOSS_KL, "r3-one": R3}
        run_trainers([self.run(n, "rollout.record=true", *self.model(n), *settings.get(n, [])) for n in self.models])
        self.models["off-one"] = model

    @staticmethod
    def single(layout: str) -> str:
        """The one-process run that a layout replays."""
        return next((f"{kind}-one" for kind in ("moe", "cut", "off", "r3") if layout.startswith(kind)), "one")

    def model(self, layout: str) -> list[str]:
        single = self.single(layout)
        reference = [f"reference.path={self.references[single]}"] if single in self.references else []
        return [f"model.path={self.models[single]}", *reference]

    def run(self, name: str, *overrides: str) -> list[object]:
        return [self.config, f"run_directory={self.folder / name}", *overrides]

    def replay(self, layout: str, name: str | None = None, overrides: Sequence[str] = ()) -> list[object]:
        recording = f"rollout.recording={self.folder / self.single(layout) / 'rollouts'}"
        return self.run(name or layout, "rollout.engine=recorded", recording, *self.model(layout), *overrides)

    def finished(self, name: str) -> Path:
        """The finished run of a layout."""
        if name in OFF_POLICY and not (self.folder / "off-one").exists():
            move_rollout_logprobs(self.folder / "one" / "rollouts", self.folder / "off-one" / "rollouts")
            run_trainers([self.replay("off-one", overrides=OFF)])
        groups = (LAYOUTS, MIXTURES, CUTS, OFF_POLICY, REPLAYED, EIGHT, HALF)
        group = next(group for group in groups if name in group)
        processes = group[name][0]
        if not (self.folder / name).exists():
            chosen = {n: overrides for n, (count, overrides) in group.items() if count == processes}
            run_trainers([self.replay(n, overrides=overrides) for n, overrides in chosen.items()], processes)
        return self.folder / name

    def resumed(self, name: str) -> Path:
        """The run of a layout, reset to its checkpoint of step 3 and resumed."""
        if not (self.folder / f"{name}-resumed").exists():
            runs = []
            for layout, overrides in RESUMED.items():
                directory = shutil.copytree(self.finished(layout), self.folder / f"{layout}-resumed")
                shutil.rmtree(directory / "checkpoints" / "step_4")
                runs.append(self.replay(layout, f"{layout}-resumed", overrides))
            run_trainers(runs, processes=2)
        return self.folder / f"{name}-resumed"

    def generated(self, name: str) -> Path:
        """A run of one step in a layout that generates its own rollouts."""
        if not (self.folder / f"{name}-generated").exists():
            settings = ("rollout.record=true", "steps=1")
            all_layouts = LAYOUTS | CUTS | REPLAYED
            runs = [self.run(f"{n}-generated", *settings, *self.model(n), *all_layouts[n][1]) for n in GENERATING]
            run_trainers(runs, processes=2)
        return self.folder / f"{name}-generated"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small_model: Path, problems: Path) -> Runs:
    return Runs(tmp_path_factory.mktemp("layouts"), small_model, problems)


@pytest.mark.parametrize("name", LAYOUTS | MIXTURES | CUTS | OFF_POLICY | REPLAYED | EIGHT)
def test_layout_equals_one_process(name: str, runs: Runs) -> None:
    agree(runs, name, runs.finished(name))


@pytest.mark.parametrize("name", [name for name in RESUMED if name not in HALF])
def test_resumed_in_another_layout(name: str, runs: Runs) -> None:
    agree(runs, name, runs.resumed(name))
    steps = sorted(p.name for p in (runs.resumed(name) / "checkpoints").glob("step_*"))
    assert steps == ["step_3", "step_4"]


@pytest.mark.parametrize("name", HALF)
def test_bfloat16_is_close(name: str, runs: Runs) -> None:
    for ours, theirs in zip(read_metrics(runs.folder / "one"), read_metrics(runs.finished(name)), strict=True):
        assert theirs["entropy"] == pytest.approx(ours["entropy"], rel=1e-3)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=0.1)
        # Advantages, of size 1, cancel in the loss. What remains is due to steering, which is perhaps 0. It answers to
        # the predicted change of entropy, a difference of nearly equal numbers.
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=0.015) and theirs["loss"] != ours["loss"]


@pytest.mark.parametrize("name", ["dp2-zero", "cut-dp2-packed", "r3-dp2-packed", *HALF])
def test_resumed_in_the_same_layout_is_bit_equal(name: str, runs: Runs) -> None:
    uninterrupted, resumed = read_metrics(runs.finished(name)), read_metrics(runs.resumed(name))
    assert [deterministic(r) for r in resumed] == [deterministic(r) for r in uninterrupted]


def agree(runs: Runs, layout: str, other: Path) -> None:
    """Metrics and trained weights equal those of one process, except for the order of float32 sums."""
    one = runs.folder / runs.single(layout)
    initial_model = runs.models[one.name]
    expected, found = read_metrics(one), read_metrics(other)
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(expected, found, strict=True):
        assert ours["grad_norm"] > 1e-3
        assert [theirs[key] for key in EXACT] == [ours[key] for key in EXACT]
        for key in (*CLOSE, *(WITH_REFERENCE if one.name in runs.references else ())):
            # The loss near ratio 1 and the drift of entropies are differences of nearly equal numbers, so `abs` counts.
            # A threshold is moved by such a drift divided by what the threshold can do, 1 % per step.
            limit = 1e-5 if key.startswith("clip/") else 2e-6
            assert theirs[key] == pytest.approx(ours[key], rel=1e-5, abs=limit), (ours["step"], key)
    start, ours, theirs = (
        load_file(f / "model.safetensors") for f in (initial_model, one / "huggingface", other / "huggingface")
    )
    assert ours.keys() == theirs.keys() == start.keys()
    for name, weight in ours.items():
        assert (weight - start[name]).norm() > 3e-3 * weight.norm()
        # A bias of all keys shifts all scores of a query equally, except for the rotation. Its gradient is a difference
        # of nearly equal numbers, and 16 steps of Adam scale it to the size of the others.
        limit = 3e-5 if name.endswith("k_proj.bias") else 1e-5
        assert (theirs[name] - weight).norm() < limit * weight.norm(), name


@pytest.mark.parametrize("name", LAYOUTS | MIXTURES | EIGHT)
def test_no_process_enters_a_computing_group_while_another_waits(name: str, runs: Runs) -> None:
    folder = runs.finished(name)
    assert violations(folder) == []
    groups = {group for record in records(folder) for _, _, group in record["collectives"]}
    assert any(group.startswith("waiting") for group in groups) and any(map(computes, groups))
    waits = {what for record in records(folder) for _, _, what in record["waits"]}
    assert waits == {"a recording", "a verifier", "the disk"}


@pytest.mark.parametrize("name", RESUMED)
def test_no_process_enters_a_computing_group_while_another_loads(name: str, runs: Runs) -> None:
    assert violations(runs.resumed(name)) == []


@pytest.mark.parametrize("name", GENERATING)
def test_no_process_computes_while_another_verifies(name: str, runs: Runs) -> None:
    assert violations(runs.generated(name)) == []


@pytest.mark.parametrize("name", GENERATING)
def test_layout_generates_what_one_process_generates(name: str, runs: Runs) -> None:
    single = runs.folder / runs.single(name)
    ours, theirs = runs.generated(name) / "rollouts", single / "rollouts" / "step_000000"
    files = sorted(ours.rglob("*.jsonl"))
    assert len(files) == 8
    # The random numbers are equal, but logits differ in the last bits, so in rare cases a draw or a route differs.
    equal = sum(a == b for f in files for a, b in zip(_sampled(f), _sampled(theirs / f.name), strict=True))
    assert equal >= 31


def test_a_cut_policy_is_the_one_that_is_trained(runs: Runs) -> None:
    """KL(rollout || train) is rounding, and the entropy is that of at most 50 tokens."""
    whole, cut = read_metrics(runs.folder / "one"), read_metrics(runs.folder / "cut-one")
    assert all(abs(r["kl_rollout"]) < 1e-9 and r["mismatch/max"] < 1e-5 for r in cut)
    assert all(r["entropy"] < 3.92 < entire["entropy"] for r, entire in zip(cut, whole, strict=True))
    for file in (runs.folder / "cut-one" / "rollouts").rglob("*.jsonl"):
        for row in map(json.loads, file.read_text().splitlines()):
            assert all(token in kept for token, kept in zip(row["token_ids"], row["kept"], strict=True))


def move_rollout_logprobs(recording: Path, moved: Path) -> None:
    """Copy a recording with other log-probs: every token's by a few hundredths, those of each fifth one by more."""
    for file in recording.rglob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rng = random.Random(f"{file.parent.name} {file.name}")
        for row in rows:
            row["logprobs"] = [min(0.0, x + rng.gauss(0, 0.4 if rng.random() < 0.2 else 0.05)) for x in row["logprobs"]]
        (moved / file.parent.name).mkdir(parents=True, exist_ok=True)
        (moved / file.parent.name / file.name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _sampled(path: Path) -> list[tuple[list[int], str | None]]:
    """Token ids and routes of each completion."""
    rows = map(json.loads, path.read_text().splitlines())
    return [(row["token_ids"], row.get("routes")) for row in rows]
