"""The key of the servers: who sends it, who cannot read it, and what a wrong one does."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.base import GroupRequest
from megatron_rlvr.rollout.engines.sglang import launch_with_key, server_pool
from megatron_rlvr.rollout.engines.sglang.client import Client
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint
from megatron_rlvr.rollout.engines.sglang.server import Server
from megatron_rlvr.rollout.engines.sglang.server_control import ServerControl
from megatron_rlvr.rollout.engines.sglang.server_files import remove_abandoned
from megatron_rlvr.rollout.engines.sglang.server_key import KEY_VARIABLE, key_from_environment, new_key
from megatron_rlvr.rollout.engines.sglang.server_pool import ServerPool
from megatron_rlvr.rollout.engines.sglang.server_state import ServerState
from megatron_rlvr.rollout.sampling import SamplingSettings
from tests.unit.rollout.sglang.fake_sglang import fake_server

KEY = "secret-of-this-run"
SAMPLING = SamplingSettings(samples=1, max_tokens=1, temperature=1.0)


def ask(url: str, key: str | None) -> object:
    """Generate on one server through the client."""

    async def generate() -> object:
        async with Client([url], SGLangConfig(), ServerState(0, None, key=key)) as client:
            return await client.generate([GroupRequest([1, 2], [7])], SAMPLING)

    return asyncio.run(generate())


def test_every_request_carries_the_key() -> None:
    with fake_server() as fake:
        fake.key = KEY
        fake.control = lambda path, body: (200, {"success": True})
        ((completion,),) = ask(fake.url, KEY)  # type: ignore[misc]
        assert completion.token_ids == [3]
        control = ServerControl([fake.url], SGLangConfig(), KEY)
        asyncio.run(control.pause_generation())
        asyncio.run(control.release_memory())
        asyncio.run(control.endpoints()[0].check_health())


@pytest.mark.parametrize(("key", "found"), [(None, "it demands a key"), ("another", "it demands another key")])
def test_a_wrong_key_is_a_user_error_of_one_line(key: str | None, found: str) -> None:
    with fake_server() as fake:
        fake.key = KEY
        with pytest.raises(UserError, match=rf"{fake.url} refuses this run \(status 401\): {found}; set") as caught:
            ask(fake.url, key)
        assert KEY not in str(caught.value)
        with pytest.raises(UserError, match=KEY_VARIABLE):
            asyncio.run(Endpoint(fake.url, SGLangConfig(), key=key).model_info())
        with pytest.raises(UserError, match=KEY_VARIABLE):
            asyncio.run(Endpoint(fake.url, SGLangConfig(), key=key).command("/pause_generation", {}, "pause"))


def test_the_key_is_in_no_text_that_is_printed() -> None:
    endpoint = Endpoint("http://h:1", SGLangConfig(), key=KEY)
    assert KEY not in repr(endpoint) and KEY not in repr(endpoint.connections)
    assert KEY not in repr(ServerState(0, None, key=KEY))


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "\u00fc"])
def test_a_key_that_no_header_can_carry(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(UserError, match="must hold printable ASCII") as caught:
        key_from_environment()
    assert key not in str(caught.value)


@pytest.mark.parametrize("name", ["api_key", "api-key", "admin_api_key"])
def test_a_key_in_the_configuration_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is set by the trainer itself"):
        SGLangConfig(server={name: KEY}).check()
    with pytest.raises(UserError, match="SGLang checks no key with more than one tokenizer"):
        SGLangConfig(server={"tokenizer-worker-num": 2}).check()


def test_pools_have_different_keys(tmp_path: Path) -> None:
    keys = {ServerPool(SGLangConfig(), tmp_path, "float32", tmp_path).key for _ in range(3)} | {new_key()}
    assert len(keys) == 4 and min(map(len, keys)) == 64


def test_sglang_gets_the_key_and_ps_does_not_show_it(tmp_path: Path) -> None:
    """A module named sglang writes what it received. Only the environment of its process holds the key."""
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang" / "launch_server.py").write_text(
        "import http.client, logging, os, sys, time\n"
        "logging.basicConfig()\n"
        "logging.warning(f'server_args={sys.argv}')\n"
        "logging.warning('api_key=%s', sys.argv[-1])\n"
        "print('received', sys.argv[-2:], os.environ.get('RLVR_SGLANG_KEY'), flush=True)\n"
        "time.sleep(1000)\n"
    )
    config = SGLangConfig(python=sys.executable, environment={"PYTHONPATH": str(tmp_path)})
    server = Server(config, "float32", tmp_path / "log", key=KEY)
    server.start(tmp_path, 0)
    assert server.process is not None
    try:
        while "received" not in server.log.read_text():
            assert server.process.poll() is None, server.log.read_text()
            time.sleep(0.05)
        assert f"received ['--api-key', '{KEY}'] None" in server.log.read_text()
        assert [line.count(KEY) for line in server.log.read_text().splitlines() if "WARNING" in line] == [0, 0]
        shown = subprocess.run(
            ["ps", "-ww", "-o", "args", "-p", str(server.process.pid)], capture_output=True, text=True
        )
        assert "launch_with_key.py" in shown.stdout and KEY not in shown.stdout
        assert psutil.Process(server.process.pid).environ()[KEY_VARIABLE] == KEY
        assert server.log.stat().st_mode & 0o777 == 0o600
    finally:
        server.kill()
    assert KEY_VARIABLE == "RLVR_SGLANG_KEY" and KEY_VARIABLE in Path(launch_with_key.__file__).read_text()


@pytest.mark.parametrize("obeys", [True, False])
def test_servers_are_asked_to_end_before_they_are_killed(
    obeys: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_pool, "_GRACE_S", 120.0 if obeys else 0.5)
    script = tmp_path / "python"
    action = f"echo cleaned >> {tmp_path}/cleaned; {'exit 0' if obeys else ':'}"
    script.write_text(f"#!/bin/sh\ntrap '{action}' TERM\necho ready\nwhile :; do sleep 0.05; done\n")
    script.chmod(0o755)
    pool = ServerPool(SGLangConfig(python=str(script), servers=2), tmp_path, "float32", tmp_path)
    processes = []
    for server in pool.servers:
        server.start(tmp_path, 0)
        assert server.process is not None
        processes.append(psutil.Process(server.process.pid))
        while "ready" not in server.log.read_text():
            time.sleep(0.05)
    pool.__exit__()
    assert (tmp_path / "cleaned").read_text().count("cleaned") == 2
    assert not any(process.is_running() for process in processes)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path leaves room for that of a socket, which has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="rlvr-", dir="/tmp") as folder:
        yield Path(folder)


def test_what_a_server_leaves_behind_is_removed(short_path: Path) -> None:
    """A server leaves a socket and shared memory, as SGLang does. Also if its starter was killed."""
    tmp_path = short_path
    name = f"rlvr-test-{tmp_path.name}-{time.time_ns()}"
    shared = Path("/dev/shm") / name
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport mmap, os, socket, tempfile, time\n"
        "socket.socket(socket.AF_UNIX).bind(tempfile.mkdtemp() + '/s')\n"
        f"file = open('{shared}', 'w+b'); file.write(bytes(4096)); file.flush()\n"
        "memory = mmap.mmap(file.fileno(), 4096)\nprint('ready', flush=True)\ntime.sleep(1000)\n"
    )
    script.chmod(0o755)
    config = SGLangConfig(python=str(script), environment={"TMPDIR": str(tmp_path)})

    def started() -> Server:
        server = Server(config, "float32", tmp_path / f"log-{time.time_ns()}")
        server.start(tmp_path, 0)
        while "ready" not in server.log.read_text():
            assert server.process is not None and server.process.poll() is None, server.log.read_text()
            time.sleep(0.05)
        server.became_ready()
        return server

    server = started()
    assert shared.exists() and len(list(tmp_path.glob("rlvr-sglang-*/tmp/*/s"))) == 1
    server.kill()
    assert not shared.exists() and not list(tmp_path.glob("rlvr-sglang-*"))
    abandoned = started()
    assert abandoned.process is not None and abandoned._files is not None
    remove_abandoned(tmp_path)
    assert shared.exists()  # its starter lives
    abandoned.process.kill()
    abandoned._files._lock.close()
    remove_abandoned(tmp_path)
    assert not shared.exists() and not list(tmp_path.glob("rlvr-sglang-*"))
