"""SGLang settings that may change when a run resumes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_rlvr.config import Config, save_config
from megatron_rlvr.errors import UserError
from megatron_rlvr.resume import check_same_run
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig


def test_a_resumed_run_may_have_other_servers(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    run = Config(run_directory=str(tmp_path), rollout=RolloutConfig(engine="sglang"))
    save_config(run, path)
    servers = SGLangConfig(urls=["http://elsewhere:30000"], server={"tensor_parallel_size": 2}, concurrency=7)
    check_same_run(dataclasses.replace(run, rollout=RolloutConfig(engine="sglang", sglang=servers)), path)
    with pytest.raises(UserError, match=r"rollout.top_k=0, this one has 5"):
        check_same_run(dataclasses.replace(run, rollout=RolloutConfig(engine="sglang", top_k=5)), path)
