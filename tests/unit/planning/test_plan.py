"""`tools/plan.py` on the example configurations; its counts against transformers and against written-out formulas."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_rlvr.config import Config, load_config, resolve
from megatron_rlvr.megatron.config import ModelConfig, ParallelConfig
from megatron_rlvr.megatron.stage_shapes import model_stages
from megatron_rlvr.planning.memory import CONTEXT_BYTES, GIB, phase_memory, static_memory
from megatron_rlvr.planning.plan import make_plan
from megatron_rlvr.planning.report import describe
from tests.families import FAMILIES, make_family
from tests.processes import ROOT

CONFIGS = ROOT / "examples" / "configs"
NODES = {"qwen2.5-math-7b": 1, "qwen2.5-32b": 4, "llama3.3-70b": 16, "qwen2.5-72b": 16, "qwen3-30b-a3b": 4}
PARAMETERS = {  # as the model cards count them
    "qwen2.5-math-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "llama3.3-70b": 70_553_706_496,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-30b-a3b": 30_532_122_624,
}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan", ROOT / "tools" / "plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(name: str, *more: str) -> list[str]:
    architecture = str(CONFIGS / "architectures" / f"{name}.json")
    return [str(CONFIGS / f"{name}.yaml"), "--architecture", architecture, *more]


def example(name: str, folder: Path) -> Config:
    config = resolve(load_config(CONFIGS / f"{name}.yaml"), on_gpu=True)
    (folder / "config.json").write_text((CONFIGS / "architectures" / f"{name}.json").read_text())
    config.model.path = str(folder)
    return config


def test_every_example_is_planned_here() -> None:
    assert {p.stem for p in CONFIGS.glob("*.yaml")} == set(NODES)


@pytest.mark.parametrize("name", NODES)
def test_examples_fit(name: str, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(arguments(name, "--nodes", str(NODES[name]))) == 0
    printed = capsys.readouterr().out
    assert "\nfits: " in printed and "computed, none measured" in printed
    assert ("5120 tokens exceed the 4096 positions" in printed) is (name == "qwen2.5-math-7b")
    plan = make_plan(example(name, tmp_path), NODES[name], 8)
    assert plan.shape.parameters == PARAMETERS[name]
    # Bytes of all ranks: every data-parallel rank holds the weights; Adam's state and the master weights exist once.
    ranks = plan.config.parallel.tensor * plan.data_parallel
    norms = 1 + 2e-3  # every tensor-parallel rank holds the norms and routers
    weights = sum(static.weights for static, _ in plan.memory) * ranks
    if not plan.shape.experts:
        assert 1 <= weights / (2 * PARAMETERS[name] * plan.data_parallel) < norms
    optimizer = sum(static.optimizer for static, _ in plan.memory) * ranks
    assert 1 <= optimizer / (12 * PARAMETERS[name]) < norms


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "sequence": True}, {"pipeline": 2}], ids=["one", "tp2", "pp2"])
def test_parameters_are_those_of_transformers(family: str, layout: dict[str, int], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    make_family(tmp_path, family)
    (tmp_path / "model.safetensors").unlink()  # config.json alone is enough
    config = Config(model=ModelConfig(path=str(tmp_path)), parallel=ParallelConfig(**layout))  # type: ignore[arg-type]
    config = resolve(config, on_gpu=True)
    shape, dtype, stages = model_stages(config.model, config.parallel, 4)
    assert dtype is torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert sum(stage.layers for stage in stages) == 2
    if "pipeline" in layout:
        last = sum(p.numel() for n, p in model.named_parameters() if "layers.1." in n or n[6:] == "norm.weight")
        assert stages[1].count == last + model.lm_head.weight.numel()


def test_configurations_that_do_not_fit(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    whole = ["parallel.distributed_optimizer=false", "rollout.local_batch=4096"]
    assert tool.main(arguments("llama3.3-70b", "--nodes", "16", *whole)) == 1
    printed = capsys.readouterr().out
    assert re.search(r"does NOT fit: stage \d needs \d+\.\d of 74\.5 GiB, \d+\.\d GiB too many; largest: ", printed)
    assert tool.main(arguments("llama3.3-70b", "--nodes", "1")) == 2
    assert "does not divide the 8 GPUs" in capsys.readouterr().err
    assert tool.main(arguments("llama3.3-70b", "--nodes", "32", "parallel.pipeline=32")) == 2
    assert "parallel.pipeline=32 does not divide the model's 80 layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tensor=16", "parallel.tensor=16 does not divide the model's 8 key/value heads"),
        ("rollout.prompts_per_step=24", "is not a multiple of 8 data-parallel ranks"),
        ("parallel.tensr=8", "did you mean parallel.tensor?"),
        ("model.path=nowhere", "has no config.json: correct it, or name one with --architecture"),
    ],
)
def test_wrong_layouts_are_refused(
    override: str, message: str, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments("llama3.3-70b", "--nodes", "16", override)
    if override.startswith("model.path"):
        command = [command[0], *command[3:]]
    assert tool.main(command) == 2
    line = capsys.readouterr().err
    assert message in line and line.startswith("error: ") and line.count("\n") == 1


def test_bytes_by_hand(tmp_path: Path) -> None:
    """Llama 3.3 70B at tensor 8, pipeline 2, data 8, with every formula written out."""
    config = example("llama3.3-70b", tmp_path)
    shape, dtype, stages = model_stages(config.model, config.parallel, 128)
    h, f, kv, v, layers = 8192, 28672, 1024, 128256, 40
    norms = layers * 2 * h
    first = v * h // 8 + norms + layers * ((h * h + 2 * kv * h + h * h + 3 * h * f) // 8)
    assert stages[0].count == first and stages[1].count == first + h
    static = static_memory(stages[0], config.parallel, dtype, 8)
    assert (static.weights, static.gradients) == (2 * first, 4 * first)
    assert static.optimizer == 12 * first // 8
    phases = phase_memory(shape, stages[0], config, 2, 8)
    tokens = 1024 + 8192
    token_layer = 2 * (4 * h + (2 * h + 2 * kv) + 3 * f) // 8 + 4 * 64 // 8 + 8 // 8
    buffer = tokens * h * 2  # that sequence-parallel activations are gathered into
    # two microbatches in flight on the first stage
    assert phases.activations == 2 * layers * tokens * token_layer + buffer
    assert phase_memory(shape, stages[1], config, 2, 8).activations == layers * tokens * token_layer + buffer
    # Transformer Engine keeps a tensor for the gradient of one weight of each shape.
    placeholders = 2 * (2 * h + 2 * kv + 3 * f) * h // 8
    assert phases.feed_forward == tokens * 2 * (2 * f + h) // 8 + placeholders
    assert phases.cache == 64 * tokens * layers * 2 * 128 * 2  # one key/value head of 128 on every tensor rank
    plain = replace(config, algorithm=replace(config.algorithm, fused_linear=False))
    hidden = 2 * (tokens + 8192) * h * 2
    assert phase_memory(shape, stages[1], plain, 2, 8).head == hidden + 8192 * (v // 8) * 2
    plan = make_plan(config, 16, 8)
    assert plan.stage_bytes(0) == static.total + max(phases.update, phases.generation) + CONTEXT_BYTES


def test_mixture_by_hand(tmp_path: Path) -> None:
    """Qwen3-30B-A3B at tensor 4, expert 8, data 8: a rank has a quarter of the dense weights, 16 experts per layer."""
    config = example("qwen3-30b-a3b", tmp_path)
    shape, dtype, [stage] = model_stages(config.model, config.parallel, 32)
    h, f, q, kv, v, layers = 2048, 768, 4096, 512, 151936, 48
    assert sum(stage.experts) == layers * 16 * 3 * h * f
    norms = layers * (2 * h + 2 * 128) + h
    assert sum(stage.parameters) == 2 * v * h // 4 + norms + layers * (128 * h + (h * q + 2 * kv * h + q * h) // 4)
    # 8 of 128 experts compute: "3.3B activated" on the model card
    assert shape.active == shape.parameters - layers * 120 * 3 * h * f and 3.3e9 < shape.active < 3.4e9
    static = static_memory(stage, config.parallel, dtype, 8)
    assert static.weights == 2 * stage.count
    # Dense state is spread over 8 data-parallel ranks, that of an expert over the 4 ranks that hold it.
    exact = 12 * (sum(stage.parameters) // 8 + sum(stage.experts) // 4)
    assert exact <= static.optimizer < 1.001 * exact
    heads = 2 * 32 + 4
    token_layer = (2 * 4 * h + 8) // 4 + (2 * (2 * q + 2 * kv + q + kv) + 4 * heads) // 4
    token_layer += 8 * ((h + 3 * f) * 2 + 12) // 4 + (5 * 128 + 4 * 257) // 4
    whole = replace(config, parallel=replace(config.parallel, recompute="none"))
    assert phase_memory(shape, stage, whole, 2, 8).activations == layers * 18432 * token_layer + 18432 * h * 2
    inputs = layers * 18432 * h * 2 // 4 + 18432 * h * 2
    assert phase_memory(shape, stage, config, 2, 8).activations == inputs + 18432 * token_layer


def test_context_and_interleaving_by_hand(tmp_path: Path) -> None:
    config = example("qwen2.5-72b", tmp_path)
    shape, _, stages = model_stages(config.model, config.parallel, 128)
    half = replace(config, parallel=replace(config.parallel, context=2))
    whole, split = (phase_memory(shape, stages[0], c, 2, 4).activations for c in (config, half))
    assert split == whole // 2
    buffer = 9216 * 8192 * 2
    # 4 chunks per stage: the first of 2 stages holds 2 + 3 x 2 + 1 chunks of 10 layers instead of 2 x 40 layers
    interleaved = replace(config, parallel=replace(config.parallel, virtual_pipeline=4))
    assert phase_memory(shape, stages[0], interleaved, 2, 8).activations == (whole - buffer) * 9 * 10 // 80 + buffer
    assert make_plan(interleaved, 16, 8).time.update < make_plan(config, 16, 8).time.update


def test_generation_by_hand(tmp_path: Path) -> None:
    """Llama 3.3 70B on SGLang servers of 8 GPUs: 16 servers of 256 sequences on 128 GPUs."""
    config = example("llama3.3-70b", tmp_path)
    config.rollout.engine, config.rollout.sglang.server = "sglang", {"tensor-parallel-size": 8}
    weights = 2 * PARAMETERS["llama3.3-70b"] / 8
    cache = 256 * (512 + 2048) * 80 * 2 * 1024 * 2 / 8  # on average, half of the mean response is generated
    plan = make_plan(config, 16, 8)
    assert plan.time.generate == pytest.approx((8192 * weights + 4096 * cache) / (3.35e12 * 0.6), rel=1e-6)
    assert plan.memory[0].phases.server_weights == PARAMETERS["llama3.3-70b"] * 2 // 8
    # As 2 pipeline stages of 4, each GPU holds as much, and a decoding step reads twice the weights in sequence.
    config.rollout.sglang.server = {"tp": 4, "pp": 2}
    staged = make_plan(config, 16, 8)
    assert staged.memory[0].phases.server_weights == plan.memory[0].phases.server_weights
    assert staged.time.generate == pytest.approx((8192 * 2 * weights + 4096 * cache) / (3.35e12 * 0.6), rel=1e-6)
    # Two replicas of 4 GPUs in one server equal two servers of 4.
    config.rollout.sglang.server = {"tp": 4, "dp": 2}
    replicated = make_plan(config, 16, 8)
    config.rollout.sglang.server = {"tp": 4}
    assert replicated.time.generate == make_plan(config, 16, 8).time.generate
    assert replicated.memory[0].phases.server_weights == 2 * plan.memory[0].phases.server_weights
    config.rollout.sglang.urls = ["http://elsewhere:30000"]
    assert make_plan(config, 16, 8).memory[0].phases.server_weights == 0


def test_weights_to_the_servers_by_hand(tmp_path: Path) -> None:
    config = example("llama3.3-70b", tmp_path)
    assert make_plan(config, 16, 8).time.weight_sync == 0
    config.rollout.engine, config.rollout.sglang.server = "sglang", {"tensor-parallel-size": 8}
    whole = 2 * PARAMETERS["llama3.3-70b"]
    nvlink, network, memory = 450e9 * 0.7, 50e9 * 0.7, 3.35e12 * 0.6
    gathered = whole / 8 / network + whole * 7 / 8 / nvlink + 2 * whole / memory
    ways = {"auto": whole / network, "distributed": whole / network, "disk": 2 * whole / 2e9}
    for way, sent in ways.items():
        config.rollout.sglang.weight_sync = way
        plan = make_plan(config, 16, 8)
        assert plan.time.weight_sync == pytest.approx(gathered + sent, rel=1e-6)
        assert plan.time.seconds_by_phase["weight_sync"] == plan.time.weight_sync
    config.rollout.sglang.weight_sync, config.rollout.sglang.servers = "auto", 2
    config.parallel.pipeline = 1
    [(_, phases)] = make_plan(config, 1, 8).memory
    within = whole * 7 / 8 / nvlink + 2 * whole / memory + 2 * whole / nvlink
    assert make_plan(config, 1, 8).time.weight_sync == pytest.approx(within, rel=1e-6)
    # The embedding is gathered twice, and has its own bucket in addition to one of 256 MiB.
    assert phases.export == 3 * 128256 * 8192 * 2 + 256 * 1024**2


def test_servers_that_release_their_memory(tmp_path: Path) -> None:
    config = example("llama3.3-70b", tmp_path)
    config.rollout.engine, config.rollout.sglang.server = "sglang", {"tensor-parallel-size": 8}
    assert not make_plan(config, 16, 8).fits
    config.rollout.sglang.release_memory = True
    released = make_plan(config, 16, 8)
    static, phases = released.memory[0]
    assert (
        released.stage_bytes(0)
        == static.total + max(phases.update, phases.server_weights + phases.export) + CONTEXT_BYTES
    )
    assert released.fits


def test_time_scales_with_length_and_gpus(tmp_path: Path) -> None:
    config = example("qwen2.5-math-7b", tmp_path)
    short, long = (make_plan(config, 1, 8, response_share=share).time for share in (0.25, 0.5))
    assert 1.9 < long.update / short.update < 2.2 and long.generate > short.generate
    two = make_plan(config, 2, 8).time
    one = make_plan(config, 1, 8).time
    assert two.update == pytest.approx(one.update / 2, rel=1e-6)
    # 6 operations per parameter and token at 40 % of 989 TFLOP/s on 8 GPUs, plus attention.
    tokens = 4096 * (512 + 2048)
    bound = 6 * PARAMETERS["qwen2.5-math-7b"] * tokens / (8 * 989e12 * 0.4)
    assert bound < one.update < 1.2 * bound


def test_suggestions_are_ranked_and_fit(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(arguments("qwen2.5-32b", "--nodes", "4", "--suggest")) == 0
    lines = capsys.readouterr().out.split("the fastest first:\n")[1].splitlines()
    seconds = [float(line.split()[0]) for line in lines]
    assert len(lines) > 1 and seconds == sorted(seconds)
    assert all(float(line.split()[2]) < 74.5 for line in lines)


@pytest.mark.parametrize("name", NODES)
def test_architecture_files_describe_the_published_models(name: str, tmp_path: Path) -> None:
    """A model that transformers builds from them has the number of parameters in the model card."""
    from transformers import AutoConfig, AutoModelForCausalLM

    (tmp_path / "config.json").write_text((CONFIGS / "architectures" / f"{name}.json").read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_slurm_scripts_take_the_nodes_that_are_planned_here() -> None:
    asked = {}
    for script in (ROOT / "examples" / "slurm").glob("*.sbatch"):
        if config := re.search(r"\ntrain examples/configs/(\S+)\.yaml", script.read_text()):
            asked[config[1]] = int(re.search(r"#SBATCH --nodes=(\d+)", script.read_text())[1])  # type: ignore[index]
    assert len(asked) >= 4 and asked == {name: NODES[name] for name in asked}


@pytest.mark.parametrize("name", NODES)
def test_examples_do_not_fit_with_the_whole_model_on_every_gpu(
    name: str, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = ["tensor=1", "sequence=false", "pipeline=1", "expert=1", "distributed_optimizer=false"]
    overrides = [*(f"parallel.{setting}" for setting in layout), "algorithm.minibatches=1"]
    assert tool.main(arguments(name, "--nodes", str(NODES[name]), *overrides)) == 1
    printed = capsys.readouterr().out
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    config.model.path = example(name, tmp_path).model.path
    [(static, _)] = make_plan(config, NODES[name], 8).memory
    count = PARAMETERS[name]
    assert (static.weights, static.gradients, static.optimizer) == (2 * count, 4 * count, 12 * count)
    assert re.search(rf"stage 0 .* {2 * count / GIB:.2f} +{4 * count / GIB:.2f} +{12 * count / GIB:.2f} \|", printed)


def test_servers_in_float32_hold_twice_as_much(tmp_path: Path) -> None:
    config = example("qwen2.5-math-7b", tmp_path)
    config.rollout.engine = "sglang"
    cached = []
    for dtype in ("bfloat16", "float32"):
        config.model.dtype = dtype
        plan = make_plan(config, 1, 8)
        assert plan.memory[0].phases.server_weights == PARAMETERS["qwen2.5-math-7b"] * plan.itemsize
        tokens = re.search(r"a server holds keys and values of (\d+) tokens", describe(plan))
        cached.append(int(tokens[1]) * plan.itemsize / plan.spare_bytes if tokens else 0.0)
    assert cached[0] > 0 and cached[1] == pytest.approx(cached[0], rel=1e-3)
