"""Which GPUs a node's SGLang servers get."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlvr.cluster import serve
from megatron_rlvr.cluster.serve import node_pool, still_wanted
from megatron_rlvr.config import Config, resolve
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import device


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setenv("SLURMD_NODENAME", "n7.cluster")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    config = Config(run_directory=str(tmp_path))
    config.model.path = str(tmp_path)
    config.rollout.sglang.server = {"tensor-parallel-size": 4}
    return resolve(config, on_gpu=True)


def test_each_server_has_gpus_of_its_own_and_can_be_reached(config: Config, tmp_path: Path) -> None:
    config.rollout.sglang.servers = 2
    pool = node_pool(config, tmp_path / "logs", "k")
    assert [server.environment["CUDA_VISIBLE_DEVICES"] for server in pool.servers] == ["0,1,2,3", "4,5,6,7"]
    assert [server.arguments["base_gpu_id"] for server in pool.servers] == [0, 0]  # among the GPUs that each one sees
    assert {server.host for server in pool.servers} == {"127.0.0.1"}
    assert [server.url for server in pool.servers] == [f"http://127.0.0.1:{s.port}" for s in pool.servers]
    assert pool.servers[0].port != pool.servers[1].port
    assert pool.servers[0].arguments["dtype"] == "bfloat16"
    assert pool.config.health_timeout_seconds >= config.rollout.sglang.update_timeout_seconds


def test_gpus_below_base_gpu_id_are_left_free(config: Config, tmp_path: Path) -> None:
    config.rollout.sglang.server["base_gpu_id"] = 4
    (server,) = node_pool(config, tmp_path / "logs", "k").servers
    assert (server.environment["CUDA_VISIBLE_DEVICES"], server.arguments["base_gpu_id"]) == ("4,5,6,7", 0)
    config.rollout.sglang.servers = 2
    with pytest.raises(UserError, match=r"2 servers .* of 4 GPUs each after base_gpu_id=4 need more than the 8 GPUs"):
        node_pool(config, tmp_path / "logs", "k")


def test_more_servers_than_gpus_are_refused(config: Config, tmp_path: Path) -> None:
    config.rollout.sglang.servers = 3
    with pytest.raises(UserError, match=r"3 servers .* of 4 GPUs each need more than the 8 GPUs"):
        node_pool(config, tmp_path / "logs", "k")


def test_servers_run_until_the_file_says_stop(tmp_path: Path) -> None:
    assert still_wanted(tmp_path)
    for word, wanted in (("run", True), ("stop", False)):
        (tmp_path / "wanted").write_text(f"{word}\n")
        assert still_wanted(tmp_path) == wanted


def test_without_a_key_nothing_is_started(
    run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RLVR_SGLANG_KEY", raising=False)
    monkeypatch.setattr(serve, "exit_with_parent", lambda: None)
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    assert serve.main(["--folder", str(tmp_path / "servers"), str(run_yaml)]) == 2
    assert capsys.readouterr().err.startswith("error: no RLVR_SGLANG_KEY for the servers: ")
