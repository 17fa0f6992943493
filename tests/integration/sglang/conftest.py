"""One real SGLang server for all tests of this folder, which are skipped without an SGLang environment."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.server_key import KEY_VARIABLE
from tests.processes import ROOT

PYTHON = Path(os.environ.get("SGLANG_PYTHON", ROOT / ".venv-sglang" / "bin" / "python"))


@pytest.fixture(scope="session")
def sglang() -> SGLangConfig:
    """The engine's configuration on this machine, whose servers may answer late while other work runs beside them."""
    if not PYTHON.is_file():
        pytest.skip(f"no SGLang environment at {PYTHON}: run `make sglang`, or set SGLANG_PYTHON to another Python")
    return SGLangConfig(
        python=str(PYTHON),
        # Tests wait for the log line of the first decoding step; by default there is one every 40 steps.
        server={"max_total_tokens": 8192, "decode_log_interval": 1},
        health_timeout_seconds=60.0,
        start_timeout_seconds=600.0,
    )


@pytest.fixture(scope="session")
def servers(sglang: SGLangConfig, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A pool of one server with the small model, whose key is in the environment. It must leave no files behind."""
    from megatron_rlvr.rollout.engines.sglang.server_pool import ServerPool

    temporary = tmp_path_factory.mktemp("tmp")
    sglang = dataclasses.replace(sglang, environment={"TMPDIR": str(temporary)})
    pool = ServerPool(sglang, small_model, "float32", tmp_path_factory.mktemp("sglang"))
    with pytest.MonkeyPatch.context() as patch, pool:
        patch.setenv(KEY_VARIABLE, pool.key)
        yield pool
        (note,) = temporary.glob("*/shared_memory")
        shared = [Path("/dev/shm", name) for name in note.read_text().split()]
    assert shared and not any(file.exists() for file in shared)
    assert not list(temporary.iterdir())
