"""Configurations that are accepted: overrides, interpolation, ``auto``, and which settings a resume may change."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_rlvr.config import Config, load_config, resolve, save_config
from megatron_rlvr.errors import UserError
from megatron_rlvr.resume import check_same_run


def with_algorithm(run_yaml: Path, algorithm: str) -> Path:
    """The configuration with another section ``algorithm``."""
    lines = [f"algorithm: {algorithm}" if line.startswith("algorithm:") else line for line in run_yaml.open()]
    run_yaml.write_text("\n".join(lines))
    return run_yaml


def test_another_schedule_or_objective_takes_no_parameters_from_the_file(run_yaml: Path) -> None:
    with_algorithm(
        run_yaml,
        "{minibatches: 2, schedule: {name: increase-then-decrease, split: 0.3, upper_intercept: 0.4}, "
        "objective: {name: gspo, eps_low: 0.1, importance_cap: 3.0}}",
    )
    in_file = load_config(run_yaml).algorithm
    assert asdict(in_file.schedule)["split"] == 0.3
    assert asdict(in_file.objective)["importance_cap"] == 3.0
    schedule = load_config(run_yaml, ["algorithm.schedule.name=clip-higher"]).algorithm.schedule
    assert (schedule.name, asdict(schedule)["upper_intercept"]) == ("clip-higher", 0.28)
    objective = load_config(run_yaml, ["algorithm.objective.name=dcpo", "algorithm.objective.eps_high=0.3"])
    parameters = asdict(objective.algorithm.objective)
    assert (parameters["name"], parameters["eps_low"], parameters["eps_high"]) == ("dcpo", 0.16, 0.3)
    assert parameters["importance_cap"] is None
    assert asdict(objective.algorithm.schedule)["split"] == 0.3  # only what is renamed loses its parameters


def test_a_parameter_alone_is_merged_into_the_file(run_yaml: Path) -> None:
    with_algorithm(run_yaml, "{minibatches: 2, schedule: {name: increase-then-decrease, split: 0.3}}")
    schedule = asdict(load_config(run_yaml, ["algorithm.schedule.eps=0.1"]).algorithm.schedule)
    assert (schedule["split"], schedule["eps"]) == (0.3, 0.1)


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ([], {"answer_tag": "a", "others": "math"}),
        (["verifier.options.answer_tag=b"], {"answer_tag": "b", "others": "math"}),
        (["verifier.options={}"], {}),
        (["verifier.options={answer_tag: b}"], {"answer_tag": "b"}),
        (["verifier.options={}", "verifier.options.others=exact"], {"others": "exact"}),
    ],
)
def test_a_mapping_on_the_command_line_replaces_that_of_the_file(
    overrides: list[str], options: dict[str, str], run_yaml: Path
) -> None:
    lines = [line for line in run_yaml.open() if not line.startswith("verifier:")]
    run_yaml.write_text("".join([*lines, "verifier: {name: math, options: {answer_tag: a, others: math}}\n"]))
    assert load_config(run_yaml, overrides).verifier.options == options


def test_values_are_converted_and_interpolated(run_yaml: Path) -> None:
    overrides = ["name=${rollout.max_tokens}", "rollout.sglang.environment.A=1", "steps='7'", "rollout.stop=[1]"]
    config = load_config(run_yaml, overrides)
    assert (config.name, config.steps, config.rollout.stop) == ("10", 7, ["1"])
    assert config.rollout.sglang.environment == {"A": "1"}


@pytest.mark.parametrize(
    ("on_gpu", "expected"), [(True, ("bfloat16", "transformer_engine")), (False, ("float32", "local"))]
)
def test_auto_is_resolved_by_device_and_stays_in_the_saved_file(
    on_gpu: bool, expected: tuple[str, str], run_yaml: Path, tmp_path: Path
) -> None:
    config = load_config(run_yaml)
    resolved = resolve(config, on_gpu)
    assert (resolved.model.dtype, resolved.model.layer_spec) == expected
    assert resolved.rollout.sglang.weight_sync == "tensor"
    servers = load_config(run_yaml, ["rollout.sglang.urls=[http://a:1]"])
    assert resolve(servers, on_gpu).rollout.sglang.weight_sync == "disk"
    assert resolved.rollout.sglang.bucket_mb == (1024 if on_gpu else 256)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert config.model.dtype == "auto"


@pytest.mark.parametrize(("node", "weight_sync"), [("n1", "tensor"), ("n3", "distributed")])
def test_weights_take_the_way_that_the_places_of_the_servers_allow(
    node: str, weight_sync: str, run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "n1.json").write_text('{"servers": [{"url": "http://n1:1", "node": "n1", "gpus": [], "nccl": null}]}')
    monkeypatch.setenv("SLURMD_NODENAME", node)
    servers = ["rollout.engine=sglang", "rollout.sglang.urls=[http://n1:1]", f"rollout.sglang.registry={tmp_path}"]
    assert resolve(load_config(run_yaml, servers), on_gpu=False).rollout.sglang.weight_sync == weight_sync
    chosen = load_config(run_yaml, [*servers, "rollout.sglang.weight_sync=disk"])
    assert resolve(chosen, on_gpu=False).rollout.sglang.weight_sync == "disk"


IDENTITY = [
    "seed=9",
    "data.heldout=null",
    "verifier.timeout_seconds=3",
    "rollout.temperature=0.5",
    "algorithm.epochs=1",
]
MAY_CHANGE = ["steps=9", "rollout.engine=sglang", "rollout.record=true", "parallel.sequence=false", "checkpoint.keep=9"]


@pytest.mark.parametrize("override", [*IDENTITY, "optimizer.learning_rate=1", "algorithm.schedule.split=0.4"])
def test_what_makes_another_run_is_refused_on_resume(override: str, run_yaml: Path, tmp_path: Path) -> None:
    save_config(load_config(run_yaml), tmp_path / "config.yaml")
    with pytest.raises(UserError, match=rf"holds a run with {override.split('=')[0]}=.*or set .* back"):
        check_same_run(load_config(run_yaml, [override]), tmp_path / "config.yaml")


@pytest.mark.parametrize(
    "override", [*MAY_CHANGE, "data.max_prompt_tokens=9", "rollout.local_batch=3", "telemetry.plots=true", "threads=2"]
)
def test_what_a_resume_may_change(override: str, run_yaml: Path, tmp_path: Path) -> None:
    save_config(load_config(run_yaml), tmp_path / "config.yaml")
    changed: Config = load_config(run_yaml, [override])
    check_same_run(changed, tmp_path / "config.yaml")


@pytest.mark.parametrize("key", ["run_directory", "model.path"])
def test_a_path_in_which_sglang_finds_no_weights_is_refused(key: str, run_yaml: Path) -> None:
    overrides = [f"{key}=/scratch/run[1]"]
    load_config(run_yaml, overrides)
    with pytest.raises(UserError, match=rf"{key}=/scratch/run\[1\]: the path contains one of"):
        load_config(run_yaml, [*overrides, "rollout.engine=sglang"])
