"""Server processes, with shell scripts instead of SGLang: error messages, restarts, and how they are stopped."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import device
from megatron_rlvr.rollout.engines.sglang import server_pool
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.server import Server
from megatron_rlvr.rollout.engines.sglang.server_pool import ServerPool
from tests.processes import ROOT, environment


def _program(folder: Path, body: str) -> str:
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return str(script)


def test_user_arguments_win_over_defaults(tmp_path: Path) -> None:
    config = SGLangConfig(server={"max-total-tokens": 7, "dtype": "bfloat16"}, environment={"OMP_NUM_THREADS": "3"})
    server = Server(config, "float32", tmp_path / "log")
    assert server.arguments["max_total_tokens"] == 7 and server.arguments["dtype"] == "bfloat16"
    assert server.environment["OMP_NUM_THREADS"] == "3"


def test_servers_do_not_inherit_the_environment_of_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TORCHELASTIC_USE_AGENT_STORE a server would wait for a store that nobody starts."""
    for name in ("RANK", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HOME", "/somewhere")
    environment = Server(SGLangConfig(), "float32", tmp_path / "log").environment
    assert not [name for name in environment if "RANK" in name or "TORCHELASTIC" in name or "MASTER" in name]
    assert environment["HOME"] == "/somewhere"


@pytest.mark.parametrize(
    ("arguments", "each"),
    [
        ({}, 1),
        ({"tp": 2}, 2),
        ({"tensor-parallel-size": 2, "pp_size": 2}, 4),
        ({"tp_size": 2, "dp": 2}, 4),
        ({"tp_size": 4, "dp_size": 4, "enable_dp_attention": True}, 4),
    ],
)
def test_servers_of_one_machine_use_different_gpus(
    arguments: dict[str, Any], each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer and its servers see the same GPUs, because CUDA IPC names one by its index."""
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    count = 8 // each
    pool = ServerPool(SGLangConfig(servers=count, server=arguments), tmp_path, "bfloat16", tmp_path)
    assert [server.arguments["base_gpu_id"] for server in pool.servers] == [each * n for n in range(count)]
    later = ServerPool(SGLangConfig(servers=1, server=arguments | {"base_gpu_id": 4}), tmp_path, "bfloat16", tmp_path)
    assert later.servers[0].arguments["base_gpu_id"] == 4
    with pytest.raises(UserError, match=rf"{count + 1} servers .* of {each} GPUs each need more than the 8 GPUs"):
        ServerPool(SGLangConfig(servers=count + 1, server=arguments), tmp_path, "bfloat16", tmp_path)


def test_error_of_a_server_that_ends_is_quoted(tmp_path: Path) -> None:
    config = SGLangConfig(python=_program(tmp_path, "echo starting; echo out of memory; exit 3"))
    expected = rf"ended with status 3 before it was ready: see {tmp_path}/server_0.log, which says: out of memory"
    with pytest.raises(UserError, match=expected), ServerPool(config, tmp_path, "float32", tmp_path):
        pass


@pytest.mark.parametrize("failures", [2, 3])
def test_server_whose_port_was_taken_is_started_again(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def passes_once_it_is_up(self: Server, timeout: float) -> bool:
        assert self.process is not None
        while self.process.poll() is None:
            if "up" in self.log.read_text().split():
                return True
            time.sleep(0.05)
        return False

    monkeypatch.setattr(Server, "passes_health_check", passes_once_it_is_up)
    monkeypatch.setattr(server_pool, "_WATCH_PERIOD_S", 0.01)
    taken = "torch.distributed.DistNetworkError: port: 23937, code: -98, message: address already in use"
    program = _program(
        tmp_path,
        f"echo >> {tmp_path}/starts; [ $(wc -l < {tmp_path}/starts) -gt {failures} ] || "
        f"{{ echo '{taken}'; exit 1; }}; echo up; exec sleep 1000",
    )
    pool = ServerPool(SGLangConfig(python=program), tmp_path, "float32", tmp_path)
    if failures == 2:
        with pool:
            assert pool.servers[0].starts == 3
    else:
        with pytest.raises(UserError, match=r"status 1 before it was ready: .* address already in use"), pool:
            pass


def test_server_that_is_never_ready_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_once_it_is_loading(self: Server, timeout: float) -> bool:
        while "loading" not in self.log.read_text():
            time.sleep(0.05)
        return False

    monkeypatch.setattr(Server, "passes_health_check", fail_once_it_is_loading)
    # The server has a child: the whole process group must be stopped.
    program = _program(tmp_path, f"sleep 1000 & echo $! > {tmp_path}/child; echo loading; exec sleep 1000")
    config = SGLangConfig(python=program, start_timeout_seconds=1.0)
    pool = ServerPool(config, tmp_path, "float32", tmp_path)
    with pytest.raises(UserError, match=r"was not ready after .*=1: see .* which says: loading"), pool:
        pass
    child = int((tmp_path / "child").read_text())
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)  # it dies when it next runs


@pytest.mark.parametrize(("body", "given_up"), [("kill -9 $$", False), ("exit 1", True)], ids=["killed", "ends"])
def test_server_that_dies_while_it_starts_is_restarted(body: str, given_up: bool, tmp_path: Path) -> None:
    """A server that ends by itself is started three times; a server that something kills, without limit."""
    config = SGLangConfig(python=_program(tmp_path, body), start_timeout_seconds=1e6)
    pool = ServerPool(config, tmp_path, "float32", tmp_path)
    pool.servers[0].start(tmp_path, 0)
    try:
        for _ in range(6):
            if pool.servers[0].process is not None:
                pool.servers[0].process.wait()
            pool._supervise(pool.servers[0], answer=None)
        assert (pool.failure is not None) == given_up and pool.servers[0].starts == (3 if given_up else 7)
    finally:
        pool.__exit__()


def test_silent_server_delays_neither_another_nor_an_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All servers are asked at once, outside the lock, and what was asked before an update counts no more after it."""
    together, silent, later = threading.Barrier(3, timeout=200), threading.Event(), threading.Event()
    generated: list[Server] = []

    def answers(timeout: float) -> bool:
        if silent.is_set():
            later.set()
            return True
        together.wait()
        silent.wait(200)
        return False

    monkeypatch.setattr(server_pool, "_WATCH_PERIOD_S", 0.01)
    monkeypatch.setattr(server_pool, "_HEALTH_CHECK_PERIOD_S", 0.0)
    config = SGLangConfig(python=_program(tmp_path, "exec sleep 1000"), servers=2)
    pool = ServerPool(config, tmp_path, "float32", tmp_path)
    for server in pool.servers:  # and no other pool's, whose watcher may still be ending
        monkeypatch.setattr(server, "answers", answers)
        monkeypatch.setattr(server, "passes_health_check", lambda timeout, server=server: not generated.append(server))
    with pool:
        together.wait()  # both servers are being asked
        with pool.without_health_checks():  # an update of the weights, which need not wait for an answer
            silent.set()
        assert later.wait(200)
        assert [server.starts for server in pool.servers] == [1, 1]
        assert len(generated) == 2, "a server that is ready was asked to generate"


@pytest.mark.parametrize(
    ("inherited", "left"),
    [
        ("expandable_segments:True", None),
        ("max_split_size_mb:128,expandable_segments:True", "max_split_size_mb:128"),
        (" expandable_segments : True ,garbage_collection_threshold:0.8", "garbage_collection_threshold:0.8"),
        ("max_split_size_mb:128", "max_split_size_mb:128"),
    ],
)
@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_servers_do_not_inherit_expandable_segments(
    variable: str, inherited: str, left: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, inherited)
    assert Server(SGLangConfig(), "float32", tmp_path / "log").environment.get(variable) == left


class Driver:
    """A nvidia-smi that reports ``free`` MiB for the GPUs that it is asked about."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.file = folder / "free"
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho $1 >> {folder}/asked\ncat {self.file}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setattr(device, "on_gpu", lambda: True)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")

    def reports(self, *free_mib: int) -> None:
        self.file.write_text("".join(f"{mib}\n" for mib in free_mib))


def test_restarted_server_gets_the_memory_of_its_first_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's fraction is one of the memory that is free at the start, and the trainer has taken most since."""
    driver = Driver(tmp_path, monkeypatch)
    log = tmp_path / "arguments"
    config = SGLangConfig(python=_program(tmp_path, f'echo "$@" >> {log}; exec sleep 1000'), server={"tp": 2})
    server = Server(config, "bfloat16", tmp_path / "log", number=1)
    info = httpx.Response(200, json={"mem_fraction_static": 0.3})
    monkeypatch.setattr(httpx, "get", lambda *_, **__: info)

    def start(starts: int) -> str:
        server.start(tmp_path, 0)
        while not log.exists() or len(lines := log.read_text().splitlines()) < starts:
            time.sleep(0.01)
        return lines[-1]

    try:
        driver.reports(140 * 1024, 139 * 1024)
        assert "--mem-fraction-static" not in start(1)
        server.became_ready()
        server.kill()
        driver.reports(60 * 1024, 70 * 1024)
        assert "--mem-fraction-static 0.695" in start(2)  # 0.3 * 139 GiB of 60 GiB
        assert (tmp_path / "asked").read_text().splitlines() == ["--id=6,7"] * 2
    finally:
        server.kill()


def test_server_waits_for_memory_to_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(tmp_path, monkeypatch)
    config = SGLangConfig(python=_program(tmp_path, "exec sleep 1000"), start_timeout_seconds=1e6)
    pool = ServerPool(config, tmp_path, "bfloat16", tmp_path)
    server = pool.servers[0]
    server._first_free_gib, server._memory_fraction, server.ready = 140.0, 0.5, True
    try:
        driver.reports(200 * 1024)
        server.start(tmp_path, 0)
        driver.reports(70 * 1024)
        server.kill()
        pool._restart(server)
        for _ in range(3):
            pool._supervise(server, None)
        assert server.process is None and server.starts == 1 and pool.failure is None
        driver.reports(80 * 1024)
        pool._supervise(server, None)
        assert server.starts == 2 and server.died_at is None
        server.kill()
        driver.reports(70 * 1024)
        config.start_timeout_seconds = -1.0
        pool._restart(server)
        needs = r"needs 70.0 GiB of each .* \(mem_fraction_static=0.5 of the 140.0 GiB .* only 70.0 GiB are free"
        assert re.search(needs, pool.failure or "")
    finally:
        pool.__exit__()


def test_no_such_python(tmp_path: Path) -> None:
    config = SGLangConfig(python="/nowhere/python")
    with (
        pytest.raises(UserError, match=r"rollout.sglang.python=/nowhere/python is not a program"),
        ServerPool(config, tmp_path, "float32", tmp_path),
    ):
        pass


def test_server_dies_with_a_killed_trainer(tmp_path: Path) -> None:
    program = _program(tmp_path, "exec sleep 1000")
    code = f"""
import time
from pathlib import Path
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.server import Server
server = Server(SGLangConfig(python={program!r}), "float32", Path({str(tmp_path / "log")!r}))
server.start(Path("model"), 0)
print(server.process.pid, flush=True)
time.sleep(1000)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], env=environment(), cwd=ROOT, stdout=subprocess.PIPE)
    assert trainer.stdout is not None
    try:
        server = psutil.Process(int(trainer.stdout.readline()))
        while server.cmdline()[:1] != ["sleep"]:  # during exec, a process has no command line for a moment
            time.sleep(0.05)
    finally:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
    psutil.wait_procs([server], timeout=200)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
