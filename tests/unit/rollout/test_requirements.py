"""What a job is refused for before anything starts, by a dry run too: a line and status 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rlvr.cluster import dry_run
from megatron_rlvr.config import load_config
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.requirements import check_engine, check_groups, check_job
from tests.processes import ROOT

CONFIGS = ROOT / "examples" / "configs"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    architecture = json.loads((CONFIGS / "architectures" / "qwen2.5-math-7b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(architecture))
    return tmp_path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.max_tokens=4096", "rollout.max_tokens=4096 exceed the 4096 positions of the model"),
        ("parallel.tensor=3", "does not divide the 8 processes"),
        ("parallel.tensor=8", "parallel.tensor=8 does not divide the model's 28 attention heads"),
        ("rollout.prompts_per_step=8", "the nearest that divides is 16"),
        ("rollout.routing_replay=true", "has no experts: set rollout.routing_replay=false"),
        ("model.layer_spec=transformer_engine rollout.engine=local", "needs model.layer_spec=local"),
    ],
)
def test_a_dry_run_refuses_what_training_refuses(
    override: str, message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = [str(CONFIGS / "qwen2.5-math-7b.yaml"), f"model.path={model}"]
    command = ["--nodes=n0", "--processes-per-node=8", "--", "-m", "megatron_rlvr.train", *config]
    assert dry_run.main(command) == 0
    capsys.readouterr()
    assert dry_run.main([*command, *override.split()]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize(
    ("servers", "override", "message"),
    [
        ("colocated", "rollout.max_tokens=4096", "exceed the 4096 positions of the model"),
        ("colocated", "parallel.tensor=8", "parallel.tensor=8 does not divide the model's 28 attention heads"),
        ("colocated", "rollout.sglang.server.mem_fraction_static=null", "mem_fraction_static: set it to the share"),
        (
            "colocated",
            "rollout.sglang.server.tp_size=2",
            "8 servers (rollout.sglang.servers) of 2 GPUs each need more than",
        ),
        (
            "nodes:1",
            "rollout.sglang.servers=9",
            "9 servers (rollout.sglang.servers) of 1 GPUs each need more than the 8",
        ),
        ("colocated", "rollout.sglang.server.mem_fraction_statik=1", "did you mean mem_fraction_static?"),
        ("none", "rollout.engine=local", "needs model.layer_spec=local, found transformer_engine"),
    ],
)
def test_a_dry_run_for_gpus_takes_the_published_architecture(
    servers: str, override: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(CONFIGS / "qwen2.5-math-7b.yaml")
    command = ["--gpus=8", f"--servers={servers}", "--nodes=n0", "--processes-per-node=8"]
    command += ["--", "-m", "megatron_rlvr.train", config, "rollout.sglang.servers=8"]
    assert dry_run.main([*command, override]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_says_when_the_model_was_not_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text((CONFIGS / "qwen2.5-math-7b.yaml").read_text())
    command = ["--gpus=8", "--nodes=n0", "--processes-per-node=8", "--", "-m", "megatron_rlvr.train", str(mine)]
    assert dry_run.main(command) == 0
    assert "\nthe model was not checked: model.path=models/" in capsys.readouterr().out


def test_the_first_job_can_be_tried_before_its_data_exist(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--nodes=n0,n1", "--processes-per-node=1", "--", "-m", "megatron_rlvr.train"]
    command += [str(ROOT / "examples/quickstart/quickstart.yaml"), f"model.path={ROOT}/examples/quickstart/base_model"]
    command += ["data.train=nowhere/train.jsonl", "data.heldout=nowhere/heldout.jsonl"]
    assert dry_run.main(command) == 0
    assert dry_run.main([*command, "data.max_prompt_tokens=1024"]) == 2
    expected = (
        "set data.max_prompt_tokens to 46 if no prompt is longer, or use a model whose config.json allows for more"
    )
    assert f"positions of the model (max_position_embeddings): {expected}\n" in capsys.readouterr().err


def test_the_context_is_unknown_without_the_model() -> None:
    check_job(load_config(CONFIGS / "qwen2.5-math-7b.yaml", ["rollout.max_tokens=4096"]), 8)


@pytest.mark.parametrize(("prompts", "nearest"), [(1, "16"), (15, "16"), (17, "16 or 32"), (250, "240 or 256")])
def test_the_nearest_batch_is_named(prompts: int, nearest: str) -> None:
    check_groups(256, 8, 2)
    with pytest.raises(UserError, match=f"the nearest that divides is {nearest}$"):
        check_groups(prompts, 8, 2)


def test_engines_that_cannot_generate() -> None:
    config = load_config(CONFIGS / "qwen3-30b-a3b.yaml", ["rollout.engine=local", "model.layer_spec=local"])
    with pytest.raises(UserError, match=r"cannot generate with parallel\.expert=8"):
        check_engine(config)
    config.rollout.engine = "recorded"
    check_engine(config)
    config.data.heldout = "heldout.jsonl"
    with pytest.raises(UserError, match=r"rollout\.engine=recorded evaluates with the local engine"):
        check_engine(config)


@pytest.mark.parametrize(
    ("override", "needed"),
    [
        ("parallel.tensor=2", "parallel.tensor=1, found 2"),
        ("parallel.context=2", "parallel.context=1, found 2"),
        ("model.dtype=bfloat16", "model.dtype=float32, found bfloat16"),
        ("model.layer_spec=transformer_engine", "model.layer_spec=local, found transformer_engine"),
    ],
)
def test_where_results_would_depend_on_the_batch(override: str, needed: str) -> None:
    settings = ["model.batch_invariant=true", "model.dtype=float32", "model.layer_spec=local", "rollout.engine=local"]
    settings += ["parallel.tensor=1", "parallel.context=1", "parallel.sequence=false"]
    check_engine(load_config(CONFIGS / "qwen2.5-math-7b.yaml", settings))
    with pytest.raises(UserError, match=f"^model.batch_invariant needs {needed}: set it, or "):
        check_engine(load_config(CONFIGS / "qwen2.5-math-7b.yaml", [*settings, override]))
