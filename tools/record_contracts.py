"""Record the signatures of GPU-only dependencies for tests/contracts: tools/record_contracts.py [--wheels FOLDER].

Reads the sources in the wheels of the versions that the GPU recipe pins, without importing them, and writes one JSON
file per dependency. The arguments of SGLang's server go to a file of the package, which checks configurations with
them. With ``--wheels``, the wheels are read from a folder; otherwise pip downloads them. Run it after a change of these
versions. The tests then name each call of this project or of megatron-core that the new version does not take.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_arguments import launch_arguments
from wheels import Wheel, wheels_of

from megatron_rlvr.doctor import pins
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, user_errors_reported
from megatron_rlvr.rollout.engines.sglang.server_arguments import RECORDED

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "contracts"
PACKAGES = ("transformer-engine", "sglang", "torch-memory-saver", "nvidia-nccl-cu13")
_COMPILED = "transformer_engine_torch"


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names of a function's parameters, with ``*`` and ``**`` before those that take any number."""
    spec = function.args
    names = [argument.arg for argument in (*spec.posonlyargs, *spec.args)]
    names += [f"*{spec.vararg.arg}"] if spec.vararg else []
    names += [argument.arg for argument in spec.kwonlyargs]
    return names + ([f"**{spec.kwarg.arg}"] if spec.kwarg else [])


def definition(wheel: Wheel, module: str, name: str, depth: int = 0) -> dict[str, Any] | None:
    """Where a name of a module is defined, with its signature; None if the module does not define or import it."""
    tree = wheel.module(module)
    if tree is None or depth > 8:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return {"parameters": parameters(node)}
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {"methods": {m.name: parameters(m) for m in node.body if isinstance(m, ast.FunctionDef)}}
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return {"value": True}
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if alias.name in (name, "*") and (alias.asname or name) == name:
                    base = module.split(".")
                    if node.level:
                        base = base[: len(base) - node.level + wheel.is_package(module)]
                        source = ".".join([*base, *([node.module] if node.module else [])])
                    else:
                        source = node.module or ""
                    if source == _COMPILED:
                        return {"compiled": True}
                    found = definition(wheel, source, name, depth + 1)
                    if found is not None:
                        return found
                    if alias.name == name and wheel.module(f"{source}.{name}") is not None:
                        return {"module": True}
    return {"module": True} if wheel.module(f"{module}.{name}") is not None else None


def transformer_engine(wheel: Wheel) -> dict[str, Any]:
    """What megatron-core imports from Transformer Engine, by dotted name; null where it has no such name."""
    from tests.contracts.megatron_calls import imported_names

    names = sorted(imported_names())
    parts = {name: name.rpartition(".") for name in names}
    return {name: definition(wheel, module, last) for name, (module, _, last) in parts.items()}


def sglang(wheel: Wheel) -> dict[str, Any]:
    """The fields of every request, the endpoints with the request that they take, memory tags.

    Also the attention backends of deterministic inference, and the updates that look for a custom weight loader.
    """
    requests: dict[str, list[str]] = {}
    for name in ("managers.io_struct", "sampling.sampling_params"):
        for node in ast.walk(_parsed(wheel, f"sglang.srt.{name}")):
            if isinstance(node, ast.ClassDef) and re.search(r"(ReqInput|SamplingParams)$", node.name):
                annotated = [
                    f.target.id for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)
                ]
                started = [m for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__init__"]
                requests[node.name] = annotated or [p for m in started for p in parameters(m) if p != "self"]
    endpoints: dict[str, str | None] = {}
    for node in ast.walk(_parsed(wheel, "sglang.srt.entrypoints.http_server")):
        if isinstance(node, ast.AsyncFunctionDef):
            for decorator in node.decorator_list:
                path = decorator.args[0] if isinstance(decorator, ast.Call) and decorator.args else None
                if isinstance(path, ast.Constant) and isinstance(path.value, str) and path.value.startswith("/"):
                    found = re.findall(
                        r"\w+ReqInput", " ".join(ast.dump(a.annotation) for a in node.args.args if a.annotation)
                    )
                    endpoints[path.value] = found[0] if found else None
    tags = re.findall(r'^GPU_MEMORY_TYPE_\w+ = "(\w+)"', wheel.text("sglang/srt/constants.py"), re.MULTILINE)
    adapter = wheel.text("sglang/srt/utils/torch_memory_saver_adapter.py")
    calls = sorted(set(re.findall(r"_memory_saver\.(\w+)\(", adapter)))
    backends = re.search(
        r"DETERMINISTIC_ATTENTION_BACKEND_CHOICES = \[(.*?)\]",
        wheel.text("sglang/srt/arg_groups/choices.py"),
        re.DOTALL,
    )
    updater = _parsed(wheel, "sglang.srt.model_executor.model_runner_components.weight_updater")
    functions = [node for node in ast.walk(updater) if isinstance(node, ast.FunctionDef)]
    return {
        "requests": requests,
        "endpoints": endpoints,
        "memory_tags": tags,
        "torch_memory_saver_calls": calls,
        "deterministic_attention": re.findall(r'"(\w+)"', backends[1] if backends else ""),
        "custom_weight_loaders": [f.name for f in functions if "custom_weight_loaders" in ast.unparse(f)],
    }


def torch_memory_saver(wheel: Wheel) -> dict[str, Any]:
    """Methods of the memory saver, functions of its package, and the setting of torch's allocator that it refuses."""
    entry = "torch_memory_saver.entrypoint"
    package = _parsed(wheel, "torch_memory_saver")
    functions = {alias.name for node in ast.walk(package) if isinstance(node, ast.ImportFrom) for alias in node.names}
    refused = re.findall(r"expandable_segments", wheel.text("torch_memory_saver/entrypoint.py"))
    methods = definition(wheel, entry, "TorchMemorySaver") or {}
    return {**methods, "functions": sorted(functions), "refuses": sorted(set(refused))}


def nccl(wheel: Wheel) -> dict[str, Any]:
    """The version in NCCL's header."""
    header = wheel.text("nvidia/nccl/include/nccl.h")
    parts = [re.search(rf"#define NCCL_{part} (\d+)", header) for part in ("MAJOR", "MINOR", "PATCH")]
    return {"version": ".".join(part[1] for part in parts if part)}


def _parsed(wheel: Wheel, module: str) -> ast.Module:
    tree = wheel.module(module)
    if tree is None:
        raise UserError(f"the wheel has no {module}: it has moved, correct tools/record_contracts.py")
    return tree


@user_errors_reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of downloaded wheels")
    options = parser.parse_args(arguments)
    versions = {name: pins("gpu")[name] for name in PACKAGES}
    with wheels_of(versions, options.wheels) as wheels:
        for name, record in zip(PACKAGES, (transformer_engine, sglang, torch_memory_saver, nccl), strict=True):
            wheel = wheels[name]
            write(FOLDER / f"{record.__name__}.json", name, versions[name], record(wheel))
            if name == "sglang":
                write(RECORDED, name, versions[name], {"arguments": launch_arguments(wheel.names, wheel.text)})
    return EXIT_DONE


def write(path: Path, package: str, version: str, content: dict[str, Any]) -> None:
    """Write a record as JSON."""
    path.write_text(json.dumps({"package": package, "version": version, **content}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
