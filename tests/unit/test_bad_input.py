"""User errors are reported in one line on stderr, with exit status 2 and without a traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlvr.train import main
from tests.processes import DEADLINE_SECONDS, ROOT


def _refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.temprature=1", "did you mean rollout.temperature?"),
        ("schedule.name=constant", "unknown configuration key schedule: did you mean algorithm.schedule?"),
        ("steps=many", "steps='many': steps must be a whole number"),
        ("steps=1.5", "steps=1.5: steps must be a whole number"),
        ("steps=", "steps has no value"),
        ("steps=[1", "override 'steps=[1'"),
        ("steps.first=1", "steps must be a whole number"),
        ("model=here", "model must be a section: write model.path=..."),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate must be a number"),
        (f"optimizer.learning_rate={10**400}", "optimizer.learning_rate must be a number"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate must be a finite number"),
        ("optimizer.beta1=1.5", "optimizer.beta1 must be in [0, 1)"),
        ("parallel.sequence=maybe", "parallel.sequence must be true or false"),
        ("rollout.stop=end", "write rollout.stop=[end]"),
        ("rollout.stop=[[end]]", "rollout.stop=[['end']]: rollout.stop must be a list of texts"),
        ("rollout.sglang.environment={A: [1]}", "A=[1]: rollout.sglang.environment.A must be text"),
        ("verifier.options={1: 2}", "verifier.options={1: 2}: verifier.options must be a section"),
        ("algorithm.schedule=constant", "write algorithm.schedule.name=constant"),
        ("algorithm.schedule=[constant]", "algorithm.schedule must be a section"),
        ("seed=-1", "seed must be in [0, 2**63), not -1"),
        ("threads=-2", "threads must be at least 0, not -2"),
        ("parallel.microbatch_sequences=-2", "parallel.microbatch_sequences must be at least 0, not -2"),
        ("name=${nothing}", "configuration key name: Interpolation key 'nothing' not found"),
        ("steps", "is not key=value"),
        ("steps=0", "steps must be greater than 0, not 0"),
        ("rollout.samples_per_prompt=1", "must be at least 2, not 1: advantages compare the samples of a prompt"),
        ("rollout.engine=vllm", "rollout.engine must be one of local, sglang, recorded"),
        ("rollout.sglang.server.port=30000", "rollout.sglang.server.port is set by the trainer itself"),
        ("rollout.sglang.urls=[localhost:30000]", "'localhost:30000' is not a URL"),
        ("rollout.sglang.urls=['http://[::1']", "is not a URL"),
        ("rollout.sglang.urls=['http://a:99999999']", "is not a URL"),
        ("rollout.sglang.urls=['http://']", "is not a URL"),
        ("rollout.sglang.environment={'A=B': x}", "'A=B' is not the name of a variable"),
        (
            'rollout.sglang.environment={A: "x\\0y"}',
            "characters, without the character NUL",
        ),
        ("run_directory=a\0b", "without the character NUL"),
        (f"data.train={'a' * 5000}.jsonl", "data.train must be text of at most 4096 characters"),
        (f"data.train={'a' * 300}.jsonl", "no such file"),
        (f"model.path={'a' * 300}", "is not a folder"),
        (f"algorithm.schedule={{name: target-entropy, curve: file, file: {'a' * 300}}}", "no such file"),
        ("rollout.sglang.server.trust_remote_code=true", "would run Python code of the model folder"),
        ("rollout.sglang.concurrency=0", "rollout.sglang.concurrency must be greater than 0"),
        ("rollout.engine=recorded", "needs rollout.recording"),
        ("algorithm.minibatches=3", "algorithm.minibatches=3 does not divide rollout.prompts_per_step=8"),
        ("algorithm.schedule.name=up-and-down", "algorithm.schedule.name must be one of constant, clip-higher"),
        ("algorithm.schedule.name=constnat", "not 'constnat': did you mean constant?"),
        ("algorithm.schedule.splt=0.4", "did you mean algorithm.schedule.split?"),
        ("algorithm.schedule.splt=0.4", "increase-then-decrease takes total_steps, eps, upper_intercept"),
        ("algorithm.schedule.split=half", "algorithm.schedule.split must be a number"),
        ("algorithm.schedule={name: target-entropy, points: [1, 2]}", "points must be a list of lists: write"),
        ("algorithm.importance=tis", "algorithm.importance: did you mean algorithm.objective.importance?"),
        ("algorithm.split=0.3", "algorithm.split: did you mean algorithm.schedule.split?"),
        ("objective.clip_ratio=0.3", "objective: did you mean algorithm.objective?"),
        (
            "data.train={path: a.jsonl, wieght: 1}",
            "data.train must be text or a list: write data.train=[{path: ..., ...}",
        ),
        ("data.train={path: a.jsonl", "its value is not valid YAML"),
        ("data.heldout=[{path: a.jsonl}]", "data.heldout='[{path: a.jsonl}]' is a list: write one file"),
        ("resume.allow=[lora.rank]", "lora.rank cannot change within a run"),
        ("algorithm.objective.name=[clip]", "algorithm.objective.name must be one of clip, dual-clip"),
        ("algorithm.objective.gamma=1", "algorithm.objective.gamma: clip takes importance_cap"),
        ("algorithm.objective.name=reinforce", "algorithm.objective.name must be one of clip, dual-clip"),
        ("algorithm.advantage=gae", "algorithm.advantage must be one of"),
        ("verifier.name=oracle", "verifier 'oracle' is not known"),
        ("parallel.tensor=2", "does not divide the 1 processes"),
        ("parallel.virtual_pipeline=2", "needs parallel.pipeline > 1"),
        ("parallel.recompute=some", "parallel.recompute must be one of none, selective, full"),
        ("checkpoint.keep_best=evaluation/pass@1 data.heldout=null", "keep_best=evaluation/pass@1 needs data.heldout"),
        (
            "checkpoint.keep_best=evaluation/pass@8",
            "evaluation/pass@1, evaluation/pass@2, evaluation/pass@4,",
        ),
        ("checkpoint.keep_best=evaluation/entropy", "is not a metric of evaluations with evaluation.samples=4"),
        ("rollout.dynamic_sampling=true data.stratify_key=kind", "data.stratify_key chose: set only one"),
        ("rollout.overlong_buffer=10", "rollout.overlong_buffer=10 must be less than rollout.max_tokens=10"),
        ("rollout.max_staleness=1", "rollout.max_staleness=1 needs rollout.engine=sglang"),
        (
            "rollout.engine=sglang rollout.max_staleness=1 rollout.sglang.release_memory=true",
            "rollout.sglang.release_memory=true needs rollout.max_staleness=0",
        ),
        (
            "rollout.engine=recorded rollout.recording=x rollout.dynamic_sampling=true",
            "set rollout.dynamic_sampling=false",
        ),
        ("model.fp8=hybrid model.dtype=float32", "model.fp8=hybrid needs model.dtype=bfloat16"),
        (
            "parallel.microbatch_tokens=4000 parallel.microbatch_sequences=2",
            "parallel.microbatch_sequences pads them: set only one",
        ),
        ("parallel.expert_tensor=2", "parallel.expert_tensor=2 must be 1 or parallel.tensor=1"),
        ("algorithm.objective.importance_level=sequence", "importance_level needs importance_cap"),
        ("algorithm.objective={name: clip-cov, lower: 6}", "needs lower < upper, found 6.0, 5.0"),
        ("algorithm.schedule={name: target-entropy, curve: linear}", "target curve: linear needs end"),
        ("parallel.expert=2", "= 2 does not divide the 1 processes"),
        ("model.router_aux_loss=0.1", "has no experts: set it to 0"),
        ("optimizer.cpu_offload=0.5", "needs parallel.distributed_optimizer=true"),
        ("checkpoint.keep_hours=-1", "checkpoint.keep_hours must be at least 0, not -1.0"),
        ("parallel.context=2", "= 2 does not divide the 1 processes"),
        ("parallel.microbatch_tokens=1000", "less than data.max_prompt_tokens + rollout.max_tokens = 1034"),
        ("parallel.sequence=true", "needs parallel.tensor > 1"),
        ("data.max_prompt_tokens=3", "data.max_prompt_tokens=3"),
        (
            "rollout.prompts_per_step=128",
            "rollout.prompts_per_step=128 must be between 1 and the number of examples, 64",
        ),
        ("model.path=nowhere", "model.path=nowhere is not a folder"),
        ("model.path=null", "model.path"),
        ("data.train=nowhere.jsonl", "nowhere.jsonl"),
        ("model.layer_spec=transformer_engine", "needs Transformer Engine"),
    ],
)
def test_override_is_refused(override: str, expected: str, run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [override] if "{" in override else override.split()  # braces hold spaces
    assert expected in _refused(capsys, run_yaml, *overrides)


def test_a_new_process_prints_one_line_alone(run_yaml: Path) -> None:
    """Imports print nothing: a warning of megatron-core while it loads would come before the error."""
    command = [sys.executable, "-m", "megatron_rlvr.train", str(run_yaml), "sed=1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: unknown configuration key sed: did you mean seed?\n"


def test_nobody_at_the_url(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = _refused(capsys, run_yaml, "rollout.engine=sglang", "rollout.sglang.urls=[http://127.0.0.1:9]")
    assert "no server of rollout.sglang.urls can be used: http://127.0.0.1:9: /model_info: cannot connect" in line


def test_python_without_sglang(run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trainer's Python has no SGLang, so the server ends at once, and its log says why."""
    line = _refused(capsys, run_yaml, "rollout.engine=sglang")
    assert (
        f"ended with status 1 before it was ready: see {tmp_path / 'run' / 'sglang' / 'logs' / 'server_0.log'}" in line
    )
    assert "No module named" in line and "sglang" in line.split("server_0.log")[1]


def test_missing_configuration_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no configuration file nowhere.yaml" in _refused(capsys, "nowhere.yaml")


def test_malformed_line_is_named(run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "bad.jsonl"
    good = json.dumps({"prompt": "1 2 3 : 6 >", "answer": {"numbers": [1, 2, 3], "target": 6}})
    data.write_text(f"{good}\n{good}\n{{'prompt': 1\n")
    assert "bad.jsonl" in (line := _refused(capsys, run_yaml, f"data.train={data}")) and "3" in line


def test_list_in_place_of_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.yaml").write_text("- steps\n")
    assert "holds a list" in _refused(capsys, tmp_path / "list.yaml")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("model: {", "config.yaml is not valid YAML"),
        ("- 1\n", "config.yaml holds a list"),
        ("sed: 1\n", "config.yaml: unknown configuration key sed: did you mean seed?; choose another run_directory"),
    ],
)
def test_damaged_configuration_of_the_run_is_named(
    damage: str, expected: str, run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file to look at is the run directory's, not the one on the command line."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_1\n")
    (tmp_path / "run" / "config.yaml").write_text(damage)
    assert f"{tmp_path / 'run'}" in (line := _refused(capsys, run_yaml)) and expected in line


def test_unreadable_answer_names_file_and_example(
    run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"prompt": "1 2 3 : 6 >", "answer": {"numbers": [1, 2, 3], "target": 6}}
    (tmp_path / "odd.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(good | {'answer': 6})}\n")
    line = _refused(capsys, run_yaml, f"data.train={tmp_path / 'odd.jsonl'}", "verifier.name=countdown")
    assert "example 1 (counted from 0) of" in line and "odd.jsonl" in line and "found 6" in line


def test_prompts_in_another_language(run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model's tokenizer has only numbers and signs, and drops words silently."""
    lines = [json.dumps({"prompt": f"reach {i} from 1 2", "answer": 3}) for i in range(9)]
    (tmp_path / "words.jsonl").write_text("\n".join(lines))
    line = _refused(capsys, run_yaml, f"data.train={tmp_path / 'words.jsonl'}")
    assert "example 0 of words, 'reach 0 from 1 2', as '012'" in line


def test_empty_data(run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert "no examples" in _refused(capsys, run_yaml, f"data.train={tmp_path / 'empty.jsonl'}")


def test_tokenizer_of_another_model(
    run_yaml: Path, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(small_model, tmp_path / "mixed")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["extra"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = _refused(capsys, run_yaml, f"model.path={folder}")
    assert "token id 5000" in line and "vocabulary ends at 111" in line


def test_missing_tokenizer(
    run_yaml: Path, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(small_model, tmp_path / "bare")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in _refused(capsys, run_yaml, f"model.path={folder}")


def test_missing_weights(run_yaml: Path, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(small_model, tmp_path / "hollow")
    (folder / "model.safetensors").unlink()
    assert "holds no *.safetensors" in _refused(capsys, run_yaml, f"model.path={folder}")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": 64}, "has shape [112, 32], but config.json describes [112, 64]"),
        ({"intermediate_size": 96}, "has shape [32, 64], but config.json describes [32, 96]"),
        ({"vocab_size": 120}, "has shape [112, 32], but config.json describes [120, 32]"),
        ({"num_hidden_layers": 5, "layer_types": None}, "have layers 0 to 3, but config.json describes 5"),
        ({"num_hidden_layers": 5}, "config.json cannot be read"),
        ({"hidden_size": "wide"}, "config.json cannot be read"),
    ],
)
def test_weights_of_another_shape(
    changes: dict[str, object],
    expected: str,
    run_yaml: Path,
    small_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(small_model, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    assert expected in _refused(capsys, run_yaml, f"model.path={folder}")


def test_broken_generation_configuration(
    run_yaml: Path, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(small_model, tmp_path / "broken")
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json cannot be read" in _refused(capsys, run_yaml, f"model.path={folder}")


def test_truncated_weights(
    run_yaml: Path, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(small_model, tmp_path / "torn")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "cannot be read" in _refused(capsys, run_yaml, f"model.path={folder}")


def test_one_update_per_rollout_warns(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inert = ["algorithm.minibatches=1", "algorithm.epochs=1", "data.train=nowhere.jsonl"]
    assert main([str(run_yaml), *inert]) == 2
    assert "every clip threshold is inert" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["algorithm.objective.name=gspo"], "GSPO gives every sequence the same weight"),
        (
            ["algorithm.objective.name=gspo", "algorithm.aggregation=constant"],
            "set algorithm.aggregation=",
        ),
        (["algorithm.objective.name=gspo", "algorithm.aggregation=sequence-mean"], None),
        (["algorithm.objective.importance=tis + icepop"], "2 of the corrections weigh every token by pi / pi_rollout"),
        (["algorithm.objective.importance=tis + geometric"], None),
        (["checkpoint.keep_best=evaluation/pass@1"], "set evaluation.every"),
        (["checkpoint.keep_best=evaluation/pass@1", "evaluation.every=1"], None),
    ],
)
def test_settings_that_are_probably_not_meant_warn(
    overrides: list[str], expected: str | None, run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_yaml), *overrides, "data.train=nowhere.jsonl"]) == 2
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [expected in line for line in warnings] == [True] if expected else warnings == []
