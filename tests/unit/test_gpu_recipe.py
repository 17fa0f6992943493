"""The GPU recipe agrees with itself: pyproject.toml, the lock, the container and the documentation."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement

from megatron_rlvr.doctor import OLDEST_GLIBC, SUPPORTED_TRANSFORMER_ENGINE, pins
from tests.processes import ROOT

LOCK = ROOT / "examples" / "gpu" / "requirements.txt"
CONTAINER = ROOT / "examples" / "container" / "Dockerfile"
# Built after the lock is installed, because its build needs torch.
FROM_SOURCE = {"transformer-engine-torch"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def locked() -> dict[str, str]:
    lines = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    matches = [re.fullmatch(r"([a-z0-9-]+)==([\w.]+)", line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return {match[1]: match[2] for match in matches if match}


def test_the_lock_has_every_pin_of_the_extras_and_fits_every_range() -> None:
    lock = locked()
    wanted = [Requirement(line) for line in (*EXTRAS["train"], *EXTRAS["gpu"])]
    for requirement in wanted:
        if requirement.name not in FROM_SOURCE:
            version = lock[requirement.name]
            assert requirement.specifier.contains(version, prereleases=True), (
                f"{requirement}, but the lock has {version}"
            )
    assert FROM_SOURCE & set(lock) == set()
    assert len(lock) > 200  # with all that they depend on


def test_everything_that_the_recipe_adds_is_exact() -> None:
    for extra in ("cpu", "gpu"):
        assert set(pins(extra)) == {Requirement(line).name for line in EXTRAS[extra]}


def test_the_trainers_ranges_hold_both_environments() -> None:
    train = {requirement.name: requirement.specifier for requirement in map(Requirement, EXTRAS["train"])}
    for extra in ("cpu", "gpu"):
        for name, version in pins(extra).items():
            assert name not in train or train[name].contains(version), f"{extra}: {name}=={version}"
    for name in ("torch", "numpy", "transformers", "tokenizers"):
        assert name in pins("cpu") and name in pins("gpu")


def test_the_packages_of_transformer_engine_are_of_one_supported_version() -> None:
    versions = {pins("gpu")[f"transformer-engine{part}"] for part in ("", "-cu13", "-torch")}
    assert len(versions) == 1
    assert Requirement(f"transformer-engine{SUPPORTED_TRANSFORMER_ENGINE}").specifier.contains(versions.pop())


def test_nvcc_is_not_newer_than_the_cuda_of_torch() -> None:
    """PTX of a newer nvcc would not load on the oldest driver that runs torch's CUDA."""
    lock = locked()
    release = lock["nvidia-cuda-runtime"].split(".")[:2]
    for name in ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-nvjitlink", "nvidia-cuda-nvrtc"):
        assert lock[name].split(".")[:2] == release, name


def test_sglang_on_the_cpu_is_the_same_version() -> None:
    text = (ROOT / "examples" / "sglang" / "requirements.txt").read_text()
    assert f"sglang=={pins('gpu')['sglang']}\n" in text
    assert f"torch_memory_saver=={pins('gpu')['torch-memory-saver']}\n" in text


def test_the_documentation_and_the_container_name_the_recipes_versions() -> None:
    glibc = ".".join(map(str, OLDEST_GLIBC))
    assert f"glibc {glibc}" in LOCK.read_text()
    shown = (ROOT / "docs" / "slurm.md").read_text()
    for name in ("torch", "transformer-engine", "sglang", "nvidia-nccl-cu13", "nvidia-cudnn-cu13"):
        assert pins("gpu")[name] in shown, name
    base = re.search(r"^FROM python:(\d+\.\d+)\.\d+-slim-bookworm$", CONTAINER.read_text(), re.MULTILINE)
    assert base and f"Python {base[1]}" in LOCK.read_text()
