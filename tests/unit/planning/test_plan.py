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
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.config import ModelConfig, ParallelConfig
from megatron_rlvr.megatron.stage_shapes import model_stages
from megatron_rlvr.planning.memory import CONTEXT_BYTES, GIB, peak_bytes, phase_memory, static_memory
from megatron_rlvr.planning.plan import make_plan
from megatron_rlvr.planning.servers import SERVER_RUNTIME_BYTES, Servers, served_bytes
from tests.families import FAMILIES, make_family
from tests.job_scripts import SCRIPTS, JobScript
from tests.processes import ROOT

CONFIGS = ROOT / "examples" / "configs"
NODES = {
    "qwen2.5-math-7b": 1,
    "qwen2.5-32b": 4,
    "llama3.3-70b": 16,
    "llama3.3-70b-lora": 2,
    "qwen2.5-72b": 16,
    "qwen3-30b-a3b": 4,
}
ADAPTED = "llama3.3-70b-lora"  # the model of another example
SMALL_ENOUGH = [name for name in NODES if name != ADAPTED]  # to be counted whole in seconds
NODES |= {"deepseek-v3": 32, "glm-4.5-air": 4, "moonlight-16b": 1}
SERVERS = {"deepseek-v3": "nodes:4"}
PARAMETERS = {  # as the model cards count them
    "qwen2.5-math-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "llama3.3-70b": 70_553_706_496,
    "llama3.3-70b-lora": 70_553_706_496,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-30b-a3b": 30_532_122_624,
    "deepseek-v3": 671_026_404_352,  # without multi-token prediction
    "glm-4.5-air": 106_852_245_504,
    "moonlight-16b": 15_960_108_544,
}
WHOLE = {"deepseek-v3": 61 * 7168 * (1536 + 512 + 64)}
"""Elements of matrices that every tensor-parallel rank holds: the projections to latents."""


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


def example(name: str, folder: Path, *overrides: str) -> Config:
    config = resolve(load_config(CONFIGS / f"{name}.yaml", overrides), on_gpu=True)
    config.rollout.sglang.weight_sync = "auto"  # follows from where the servers are
    (folder / "config.json").write_text((CONFIGS / "architectures" / f"{name}.json").read_text())
    config.model.path = str(folder)
    return config


def bare_70b(folder: Path) -> Config:
    """Llama 3.3 70B at tensor 8, pipeline 2, with a server of 8 GPUs that has no memory fraction of its own."""
    config = example("llama3.3-70b", folder, "parallel.pipeline=2", "parallel.context=1", "rollout.sglang.servers=1")
    config.rollout.sglang.server = {"tensor-parallel-size": 8}
    return config


def test_every_example_is_planned_here() -> None:
    assert {p.stem for p in CONFIGS.glob("*.yaml")} == set(NODES)


@pytest.mark.parametrize("name", NODES)
def test_examples_fit(name: str, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(CONFIGS / f"{name}.yaml"), "--nodes", str(NODES[name])]
    command += ["--servers", SERVERS[name]] if name in SERVERS else []
    assert tool.main(command) == 0  # finds the architecture
    printed = capsys.readouterr().out
    assert "\nfits: " in printed and "computed, none measured" in printed
    assert printed.startswith(f"architecture: {CONFIGS / 'architectures' / name}.json\n")
    config = example(name, tmp_path, "optimizer.cpu_offload=0")
    servers = Servers.of_job(config, SERVERS.get(name))
    plan = make_plan(config, NODES[name] - servers.nodes, 8, servers=servers)
    assert plan.shape.parameters == PARAMETERS[name]
    # Bytes of all ranks: every data-parallel rank holds the weights; Adam's state and the master weights exist once.
    replicas = plan.data_parallel * plan.config.parallel.context
    ranks = plan.config.parallel.tensor * replicas
    # Every tensor-parallel rank holds the norms and routers.
    norms = 1 + 2e-3 + (plan.config.parallel.tensor - 1) * WHOLE.get(name, 0) / PARAMETERS[name]
    weights = sum(static.weights for static, _ in plan.memory) * ranks
    if plan.config.lora.rank:
        return
    if not plan.shape.experts:
        assert 1 <= weights / (2 * PARAMETERS[name] * replicas) < norms
    optimizer = sum(static.optimizer for static, _ in plan.memory) * ranks
    assert 1 <= optimizer / (12 * PARAMETERS[name]) < norms


def test_a_cache_of_latents_by_hand(tmp_path: Path) -> None:
    """DeepSeek-V3 on a server of 32 GPUs: 61 layers of 512 + 64 elements per token, in each of 8 attention groups."""
    server = "rollout.sglang.server.tensor_parallel_size=32"
    config = example("deepseek-v3", tmp_path, "rollout.quantization=none", server)
    servers = Servers("nodes", 4)
    plan = make_plan(config, 28, 8, servers=servers)
    attention = 61 * (7168 * 1536 + 1536 * 128 * 192 + 7168 * (512 + 64) + 512 * 128 * (128 + 128) + 128 * 128 * 7168)
    weights = (671_026_404_352 + 7 * attention) * 2 // 32
    tokens = (int(0.85 * 80e9) - weights) * 8 / (61 * (512 + 64) * 2)  # one copy in each group, over its 4 GPUs
    assert plan.load is not None
    assert plan.load.concurrent == pytest.approx(tokens / (512 + 2048), rel=1e-9)
    assert [stage.layers for stage in plan.stages] == [9] * 6 + [7]
    assert [stage.mixtures for stage in plan.stages] == [6] + [9] * 5 + [7]
    active = 671_026_404_352 - 58 * (256 - 8) * 3 * 7168 * 2048
    assert plan.shape.active == active
    with pytest.raises(UserError, match="a server of 32 GPUs does not divide the 24 GPUs of 3 nodes"):
        make_plan(config, 28, 8, servers=Servers("nodes", 3))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.last_stage_layers=0", "does not divide the model's 61 layers: .* set parallel.last_stage_layers=7"),
        ("parallel.last_stage_layers=8", "leaves 53 of the model's 61 layers to 6 stages, .*: set it to 7"),
        ("parallel.last_stage_layers=61", "leaves 0 of the model's 61 layers to 6 stages, .*: set it to 7"),
        ("parallel.virtual_pipeline=2", "to 6 stages of 2 model chunks each, which do not divide them: change"),
        ("parallel.expert=24", "parallel.expert=24 does not divide the model's 256 experts"),
    ],
)
def test_uneven_stages_that_do_not_divide_the_layers(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(example("deepseek-v3", tmp_path, override), 28 if "expert" not in override else 21, 8)


def test_only_adapters_have_gradients_and_optimizer_state(tmp_path: Path) -> None:
    """Llama 3.3 70B: per layer, r (inputs + outputs) of each of seven modules, of which ranks hold A or B whole."""
    config = example("llama3.3-70b-lora", tmp_path)
    plan = make_plan(config, 2, 8)
    h, q, kv, f, r, layers, tensor = 8192, 8192, 1024, 28672, config.lora.rank, 80, config.parallel.tensor
    assert plan.shape.adapters == layers * r * ((h + q) + 2 * (h + kv) + (q + h) + 2 * (h + f) + (f + h))
    whole = layers * r * (3 * h + h + 2 * h + h)  # A of q, k, v, gate and up; B of o and down
    trained = whole + layers * r * (q + 2 * kv + q + 2 * f + f) // tensor
    [stage], [(static, phases)] = plan.stages, plan.memory
    assert stage.trained == trained
    assert stage.frozen == pytest.approx(PARAMETERS["llama3.3-70b"] / tensor, rel=1e-3)
    assert static.weights == pytest.approx(2 * (stage.frozen + trained), rel=1e-5)
    assert static.gradients == pytest.approx(4 * trained, rel=1e-4)
    assert static.optimizer == pytest.approx(12 * trained / 2, rel=1e-4)  # over two context-parallel ranks
    whole_model = make_plan(example("llama3.3-70b-lora", tmp_path, "lora.rank=0"), 2, 8)
    assert not whole_model.fits and plan.fits
    # Of forward, two backward and one recomputed pass, the gradient of the weights is left out.
    assert plan.time.update / whole_model.time.update == pytest.approx(3 / 4, rel=0.01)
    assert plan.time.tensor_parallel == whole_model.time.tensor_parallel
    assert plan.time.data_parallel < whole_model.time.data_parallel / 20
    assert phases.update < whole_model.memory[0].phases.update


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
    whole = ["parallel.distributed_optimizer=false"]
    assert tool.main(arguments("llama3.3-70b", "--nodes", "16", *whole)) == 1
    printed = capsys.readouterr().out
    assert re.search(r"does NOT fit: stage \d needs \d+\.\d of 74\.5 GiB, \d+\.\d GiB too many; largest: ", printed)
    assert "tools/plan.py --suggest lists layouts that fit" in printed
    assert tool.main(arguments("llama3.3-70b", "--nodes", "1")) == 2
    assert "does not divide the 8 GPUs" in capsys.readouterr().err
    assert tool.main(arguments("llama3.3-70b", "--nodes", "64", "parallel.pipeline=32")) == 2
    assert "parallel.pipeline=32 does not divide the model's 80 layers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tensor=16", "parallel.tensor=16 does not divide the model's 8 key/value heads"),
        ("rollout.prompts_per_step=120", "is not a multiple of 2 data-parallel ranks"),
        ("rollout.prompts_per_step=120", "the nearest that divides is 112 or 128"),
        ("rollout.engine=local", "rollout.engine=local needs model.layer_spec=local, found transformer_engine"),
        ("rollout.max_tokens=131072", "rollout.max_tokens=131072 exceed the 131072 positions of the model"),
        ("rollout.sglang.server.mem_fraction_static=1.5", "mem_fraction_static=1.5 is not a share"),
        ("rollout.sglang.server.tensor_parallel_size=16", "of 16 GPUs each need more than the 8 GPUs of a node"),
        ("parallel.tensr=8", "did you mean parallel.tensor?"),
        ("model.path=nowhere", "has no config.json, and there is no "),
    ],
)
def test_wrong_configurations_are_refused(
    override: str, message: str, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments("llama3.3-70b", "--nodes", "16", override)
    if override.startswith("model.path"):
        (tmp_path / "renamed.yaml").write_text((CONFIGS / "llama3.3-70b.yaml").read_text())
        command = [str(tmp_path / "renamed.yaml"), *command[3:]]
    assert tool.main(command) == 2
    line = capsys.readouterr().err
    assert message in line and line.startswith("error: ") and line.count("\n") == 1


def test_bytes_by_hand(tmp_path: Path) -> None:
    """Llama 3.3 70B at tensor 8, pipeline 2, data 8, with every formula written out."""
    config = bare_70b(tmp_path)
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
    local = replace(config, rollout=replace(config.rollout, engine="local", local_batch=64))
    # one key/value head of 128 on every tensor rank
    assert phase_memory(shape, stages[0], local, 2, 8).cache == 64 * tokens * layers * 2 * 128 * 2
    plain = replace(config, algorithm=replace(config.algorithm, fused_linear=False))
    hidden = 2 * (tokens + 8192) * h * 2
    assert phase_memory(shape, stages[1], plain, 2, 8).head == hidden + 8192 * (v // 8) * 2
    plan = make_plan(config, 16, 8)
    server = PARAMETERS["llama3.3-70b"] * 2 // 8
    beside = max(phases.update + server, phases.export + server) + SERVER_RUNTIME_BYTES
    assert plan.stage_bytes(0) == static.total + beside + CONTEXT_BYTES
    config.rollout.sglang.server["mem_fraction_static"] = 0.3
    shared = make_plan(config, 16, 8)
    assert shared.memory[0].phases.server == int(0.3 * 80e9)
    alone = make_plan(config, 16, 8, servers=Servers("nodes", 8))
    assert alone.stage_bytes(0) == static.total + max(phases.update, phases.export) + CONTEXT_BYTES


def test_quantized_rollouts_halve_what_servers_read_and_receive(tmp_path: Path) -> None:
    plain, quantized = (
        example("llama3.3-70b", tmp_path, f"rollout.quantization={form}", "rollout.sglang.model_path=x")
        for form in ("none", "fp8")
    )
    shape, _, _ = model_stages(plain.model, plain.parallel, 128)
    embeddings = 2 * shape.vocabulary * shape.hidden
    projections = 80 * shape.hidden * (2 * shape.query + shape.key + shape.value + 3 * shape.feed_forward)
    assert served_bytes(shape, plain, 2) == 2 * shape.parameters
    scales = 4 * projections // 128**2
    assert served_bytes(shape, quantized, 2) == 2 * shape.parameters - projections + scales
    assert 2 * shape.parameters - 2 * projections == 2 * (embeddings + 161 * shape.hidden)


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
    config = example("qwen2.5-72b", tmp_path, "parallel.pipeline=2", "parallel.context=1")
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
    config = bare_70b(tmp_path)
    weights = 2 * PARAMETERS["llama3.3-70b"] / 8
    cache = 256 * (512 + 2048) * 80 * 2 * 1024 * 2 / 8  # on average, half of the mean response is generated
    unlimited = Servers("nodes", 16)  # as many GPUs as train, and caches that hold everything
    config.rollout.sglang.server["mem_fraction_static"] = 0.9
    plan = make_plan(config, 16, 8, servers=unlimited)
    assert plan.load is not None and plan.load.waves == 1 and plan.load.sequences == 256
    assert plan.time.generate == pytest.approx((8192 * weights + 4096 * cache) / (3.35e12 * 0.6), rel=1e-6)
    # As 2 pipeline stages of 4, a decoding step reads twice the weights in sequence.
    config.rollout.sglang.server = {"tp": 4, "pp": 2, "mem_fraction_static": 0.9}
    staged = make_plan(config, 16, 8, servers=unlimited)
    assert staged.time.generate == pytest.approx((8192 * 2 * weights + 4096 * cache) / (3.35e12 * 0.6), rel=1e-6)
    # Two replicas of 4 GPUs in one server equal two servers of 4.
    config.rollout.sglang.server = {"tp": 4, "dp": 2, "mem_fraction_static": 0.9}
    replicated = make_plan(config, 16, 8, servers=unlimited)
    config.rollout.sglang.server = {"tp": 4, "mem_fraction_static": 0.9}
    assert replicated.time.generate == make_plan(config, 16, 8, servers=unlimited).time.generate
    # Half the servers have twice the sequences each.
    half = make_plan(config, 16, 8, servers=Servers("nodes", 8))
    assert half.load is not None and replicated.load is not None
    assert half.load.sequences == 2 * replicated.load.sequences
    config.rollout.sglang.server = {"tp": 4, "dp": 2}
    colocated = make_plan(config, 16, 8)
    assert colocated.memory[0].phases.server == PARAMETERS["llama3.3-70b"] * 2 // 4
    config.rollout.sglang.urls = ["http://elsewhere:30000"]
    assert make_plan(config, 16, 8).memory[0].phases.server == 0


def test_waves_by_hand(tmp_path: Path) -> None:
    """At a fraction of 0.32 a server of 8 GPUs holds 76 of its 256 sequences of the 70B model at once."""
    config = bare_70b(tmp_path)
    config.rollout.sglang.server["mem_fraction_static"] = 0.32
    plan = make_plan(config, 16, 8)
    weights = 2 * PARAMETERS["llama3.3-70b"] // 8
    tokens = (int(0.32 * 80e9) - weights) * 8 / (80 * 2 * 1024 * 2)
    held = tokens / (512 + 2048)
    assert plan.load is not None and round(plan.load.concurrent) == 76
    assert plan.load.concurrent == pytest.approx(held, rel=1e-6)
    steps = 8192 + (256 / held - 1) * 4096
    cache = 256 * (512 + 2048) * 80 * 2 * 1024 * 2 / 8
    assert plan.time.generate == pytest.approx((steps * weights + 4096 * cache) / (3.35e12 * 0.6), rel=1e-6)


def test_rollouts_ahead_overlap_with_training_on_other_nodes(tmp_path: Path) -> None:
    config = bare_70b(tmp_path)
    config.rollout.sglang.server["mem_fraction_static"] = 0.85
    before = make_plan(config, 8, 8, servers=Servers("nodes", 8)).time
    config.rollout.max_staleness = 1
    after = make_plan(config, 8, 8, servers=Servers("nodes", 8)).time
    training = before.total - before.generate - before.weight_sync
    assert after.total == pytest.approx(max(before.generate, training) + before.weight_sync)
    config.rollout.sglang.server["mem_fraction_static"] = 0.3
    shared = make_plan(config, 16, 8).time
    assert shared.hidden == 0 and shared.total == pytest.approx(sum(shared.seconds_by_phase.values()))


def test_weights_to_the_servers_by_hand(tmp_path: Path) -> None:
    config = bare_70b(tmp_path)
    whole = 2 * PARAMETERS["llama3.3-70b"]
    nvlink, network, memory = 450e9 * 0.7, 50e9 * 0.7, 3.35e12 * 0.6
    gathered = whole / 8 / network + whole * 7 / 8 / nvlink + 2 * whole / memory
    elsewhere = Servers("nodes", 8)
    for servers, way, sent in (
        (Servers("colocated"), "auto", 2 * whole / memory),
        (elsewhere, "auto", whole / network),
        (elsewhere, "disk", 2 * whole / 2e9),
        (elsewhere, "delta", 7 * whole / 30e9 + 2 * (0.05 * 1.5 + 1 / 50) * whole / 2e9),
        (Servers("urls"), "auto", 2 * whole / 2e9),
    ):
        config.rollout.sglang.weight_sync = way  # type: ignore[assignment]
        plan = make_plan(config, 16, 8, servers=servers)
        assert plan.time.weight_sync == pytest.approx(gathered + sent, rel=1e-6)
        assert plan.time.seconds_by_phase["weight_sync"] == plan.time.weight_sync
    config.rollout.sglang.weight_sync = "tensor"
    with pytest.raises(UserError, match="reaches only servers on the GPUs that train"):
        make_plan(config, 16, 8, servers=elsewhere)
    config.rollout.sglang.weight_sync = "auto"
    config.parallel.pipeline = 1
    [(_, phases)] = make_plan(config, 1, 8, servers=Servers("colocated")).memory
    # The embedding is gathered twice, and each of the two buffers can hold it.
    assert phases.export == 4 * 128256 * 8192 * 2


def test_servers_that_release_their_memory(tmp_path: Path) -> None:
    config = bare_70b(tmp_path)
    assert not make_plan(config, 16, 8).fits
    config.rollout.sglang.release_memory = True
    released = make_plan(config, 16, 8)
    static, phases = released.memory[0]
    assert released.stage_bytes(0) == peak_bytes(released.memory[0], released=True)
    assert (
        released.stage_bytes(0)
        == static.total + max(phases.update, phases.server + phases.export) + CONTEXT_BYTES + SERVER_RUNTIME_BYTES
    )
    assert released.fits


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.servers == "colocated"], ids=lambda s: s.path.stem)
def test_the_share_that_is_named_as_the_largest_is_the_largest(script: JobScript, tmp_path: Path) -> None:
    config = example(script.config.stem, tmp_path, *script.overrides)
    plan = make_plan(config, script.nodes, 8)
    share = plan.server_share
    assert share is not None and plan.fits
    for other in (share, share + 0.01):
        config.rollout.sglang.server["mem_fraction_static"] = other
        assert make_plan(config, script.nodes, 8).fits is (other == share)


def test_time_scales_with_length_and_gpus(tmp_path: Path) -> None:
    config = example("qwen2.5-math-7b", tmp_path)
    short, long = (make_plan(config, 1, 8, response_share=share).time for share in (0.25, 0.5))
    assert 1.9 < long.update / short.update < 2.2 and long.generate > short.generate
    two = make_plan(config, 2, 8).time
    one = make_plan(config, 1, 8)
    assert two.update == pytest.approx(one.time.update / 2, rel=1e-6)
    # 6 operations per parameter and token at 23 % of 989 TFLOP/s on 8 GPUs, plus attention; and the same at 40 %.
    tokens = 4096 * (512 + 1536)
    bound = 6 * PARAMETERS["qwen2.5-math-7b"] * tokens / (8 * 989e12 * 0.23)
    assert bound < one.time.update < 1.2 * bound
    assert one.optimistic_time.update == pytest.approx(one.time.update * 0.23 / 0.40)


@pytest.mark.parametrize(("tensor", "recompute", "share"), [(4, "full", 0.248), (8, "none", 0.36)])
def test_the_workload_of_a_public_report(tensor: int, recompute: str, share: float, tmp_path: Path) -> None:
    """NeMo-RL issue 959: 2,048 sequences of 530 tokens, 64 H100, 70B, pipeline 4: 178 s, of which training is 31 s."""
    config = example(
        "llama3.3-70b",
        tmp_path,
        f"parallel.tensor={tensor}",
        "parallel.pipeline=4",
        "parallel.context=1",
        f"parallel.recompute={recompute}",
        "rollout.prompts_per_step=64",
        "rollout.samples_per_prompt=32",
        "rollout.max_tokens=3072",
        "algorithm.minibatches=4",
        f"rollout.sglang.server.mem_fraction_static={share}",
    )
    plan = make_plan(config, 8, 8, response_share=530 / 4096, servers=Servers.of_job(config, "colocated"))
    assert plan.fits and plan.load is not None and plan.load.waves < 1.7
    assert plan.config.rollout.sglang.weight_sync == "tensor"  # what the job of a Slurm script does
    assert plan.time.total <= 178
    # Their training reaches 23 %: 31 s, and their log-probs of two models 20 s.
    passes = 4 if recompute == "full" else 3
    assert plan.time.update * 3 / passes == pytest.approx(31, rel=0.1)
    assert 2 * plan.time.score == pytest.approx(20, rel=0.1)


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s.nodes == 16], ids=lambda s: s.path.stem)
def test_jobs_of_16_nodes_take_little_more_than_their_own_parts(script: JobScript, tmp_path: Path) -> None:
    """Exchanges, optimizer and weight sync add at most a fifth to generation, scoring and updates."""
    config = example(script.config.stem, tmp_path, *script.overrides)
    servers = Servers.of_job(config, script.servers)
    plan = make_plan(config, script.training_nodes, 8, servers=servers)
    assert plan.fits
    for time in (plan.time, plan.optimistic_time):
        assert time.total <= 1.2 * (time.generate + time.score + time.update)
    assert plan.time.weight_sync < 10


def suggested(printed: str) -> list[tuple[float, float, float, list[str]]]:
    """Sequences held, seconds, GiB and overrides of every suggestion."""
    lines = printed.split("then the fastest:\n")[1].splitlines()
    rows = []
    for line, overrides in zip(lines[::2], lines[1::2], strict=True):
        found = re.match(r" +(\d+) s +(\d+\.\d) GiB  (\d+) of (\d+) sequences", line)
        assert found, line
        rows.append((int(found[3]) / int(found[4]), float(found[1]), float(found[2]), overrides.split()))
    return rows


def test_suggestions_are_ranked_by_the_cache_and_fit_as_they_are_printed(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments("qwen2.5-32b", "--nodes", "4")
    refused = [*command, "rollout.prompts_per_step=504"]  # 2 data-parallel ranks do not share 63 groups
    assert tool.main([*refused, "--suggest"]) == 2
    captured = capsys.readouterr()
    assert "the nearest that divides is" in captured.err and captured.err.count("\n") == 1
    rows = suggested(captured.out)
    assert len(rows) > 1 and [row[0] for row in rows] == sorted((row[0] for row in rows), reverse=True)
    assert all(gib <= 74.5 for _, _, gib, _ in rows)
    # The first one whose data-parallel ranks do not share 63 groups per minibatch either.
    _, seconds, gib, overrides = next(row for row in rows if "rollout.prompts_per_step=" in " ".join(row[3]))
    assert any(word.startswith("rollout.sglang.server.mem_fraction_static=") for word in overrides)
    assert tool.main([*refused, *overrides]) == 0  # as a user copies it
    printed = capsys.readouterr().out
    step = re.search(r"\n  step +(\d+\.\d)", printed)
    assert f"needs {gib} of" in printed and step and round(float(step[1])) == pytest.approx(seconds, abs=1)


@pytest.mark.parametrize("name", [name for name in NODES if name != ADAPTED])
def test_architecture_files_describe_the_published_models(name: str, tmp_path: Path) -> None:
    """A model that transformers builds from them has the number of parameters in the model card."""
    from transformers import AutoConfig, AutoModelForCausalLM

    (tmp_path / "config.json").write_text((CONFIGS / "architectures" / f"{name}.json").read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_slurm_scripts_take_the_nodes_that_are_planned_here() -> None:
    asked = {script.config.stem: script.nodes for script in SCRIPTS if script.gpus}
    assert len(asked) >= 4 and asked == {name: NODES[name] for name in asked}


@pytest.mark.parametrize("name", SMALL_ENOUGH)
def test_examples_do_not_fit_with_the_whole_model_on_every_gpu(
    name: str, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = ["tensor=1", "sequence=false", "pipeline=1", "context=1", "expert=1", "distributed_optimizer=false"]
    overrides = [*(f"parallel.{setting}" for setting in layout), "algorithm.minibatches=1"]
    assert tool.main(arguments(name, "--nodes", str(NODES[name]), *overrides)) == 1
    printed = capsys.readouterr().out
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    config.model.path = example(name, tmp_path).model.path
    [(static, _)] = make_plan(config, NODES[name], 8).memory
    count = PARAMETERS[name]
    assert (static.weights, static.gradients, static.optimizer) == (2 * count, 4 * count, 12 * count)
    assert re.search(rf"stage 0 .* {2 * count / GIB:.2f} +{4 * count / GIB:.2f} +{12 * count / GIB:.2f} \|", printed)


def test_servers_in_float32_hold_half_as_much(tmp_path: Path) -> None:
    config = example("qwen2.5-math-7b", tmp_path)
    config.rollout.sglang.server = {"mem_fraction_static": 0.6}
    held = []
    for dtype in ("bfloat16", "float32"):
        config.model.dtype = dtype  # type: ignore[assignment]
        plan = make_plan(config, 1, 8)
        assert plan.load is not None
        free = 0.6 * 80e9 - PARAMETERS["qwen2.5-math-7b"] * plan.itemsize
        held.append(plan.load.concurrent * plan.itemsize / free)
    assert held[1] == pytest.approx(held[0], rel=1e-3)
