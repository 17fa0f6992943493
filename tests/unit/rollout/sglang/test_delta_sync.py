"""Weights that travel as deltas: copies of several nodes over many versions, lost and damaged deltas, restarts."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import torch

from megatron_rlvr.checksums import LIST, digest
from megatron_rlvr.errors import UserError
from megatron_rlvr.node import node_name
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint, ServerLostError
from megatron_rlvr.rollout.engines.sglang.engine import _check_copies
from megatron_rlvr.rollout.engines.sglang.registry import ServerPlace, read_registry, register
from megatron_rlvr.rollout.engines.sglang.server_key import headers
from megatron_rlvr.rollout.engines.sglang.server_state import ServerState
from megatron_rlvr.rollout.engines.sglang.weight_sync import copy_service
from megatron_rlvr.rollout.engines.sglang.weight_sync.delta_folders import DeltaFolders
from megatron_rlvr.rollout.engines.sglang.weight_sync.local_copy import LocalCopy, copy_root
from megatron_rlvr.weights.huggingface_folder import write_folder

KEY = "key"
LEARNING_RATE = 1e-6


class Trained:
    """Weights in bfloat16 with float32 masters, as mixed-precision training holds them, under Adam."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        shapes = {f"layers.{i}.{kind}.weight": (96, 128) for i in range(3) for kind in ("qkv", "up")}
        shapes |= {"embed.weight": (300, 128), "norm.weight": (128,)}
        self.masters = {name: 0.02 * torch.randn(shape, generator=self.generator) for name, shape in shapes.items()}
        self.masters["norm.weight"] += 1
        self.optimizer = torch.optim.Adam(self.masters.values(), lr=LEARNING_RATE)

    def step(self, updates: int = 4) -> None:
        for _ in range(updates):
            for master in self.masters.values():
                master.grad = torch.randn(master.shape, generator=self.generator)
            self.optimizer.step()

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, master.bfloat16()) for name, master in self.masters.items())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    return folder


class Job:
    """The main process of a run and the service of another node, whose copies are in different folders."""

    def __init__(self, tmp_path: Path, model: Path, resources: ExitStack, every: int = 1000):
        self.run, self.model = tmp_path / "run" / "sglang" / "weights", model
        self.config = SGLangConfig(weight_sync="delta", full_sync_every=every, local_folder=str(tmp_path / "here"))
        self.remote = tmp_path / "there" / copy_root("/", self.run).name
        self.node = resources.enter_context(ExitStack())
        self.serve()
        self.places = [ServerPlace("http://a:1", node_name()), ServerPlace("http://b:1", "b", copies=self.service)]
        self.resources = resources
        self.start()

    def serve(self) -> None:
        """Start the service of the other node, or start it again."""
        self.node.close()
        self.service = self.node.enter_context(copy_service.copy_service("127.0.0.1", KEY))

    def start(self) -> None:
        """Start the trainer, or start it again after it was killed."""
        bridge: Any = SimpleNamespace(path=self.model)
        self.folders = DeltaFolders(
            self.config, self.run, bridge, self.places, KEY, lambda folder, version: set(), None, is_main=True
        )
        self.resources.callback(self.folders.close)

    def kill(self) -> None:
        """End the trainer as SIGKILL does, which leaves its copy and releases its lock."""
        assert self.folders.copy is not None
        self.folders.copy._lock.close()

    def publish(self, trained: Trained, version: int, before_delivery: Callable[[], None] = lambda: None) -> None:
        self.folders.write(trained.tensors(), version, is_main=True)
        before_delivery()
        own, self.folders._copies = self.folders._copies, self.remote  # in a job, both nodes have the same path
        asyncio.run(self.folders.deliver(version))
        self.folders._copies = own

    def check(self, trained: Trained, version: int, tmp_path: Path) -> None:
        """Both copies are, file by file, a full export of the weights."""
        full = tmp_path / "expected"
        write_folder(full, trained.tensors(), companions=self.model)
        for root in (copy_root(str(tmp_path / "here"), self.run), self.remote):
            assert [p.name for p in root.iterdir() if p.name != "lock"] == [f"step_{version:06d}"]
            assert _digests(root / f"step_{version:06d}") == _digests(full)


def _digests(folder: Path) -> dict[str, str]:
    files = [file for file in folder.iterdir() if file.name != "SHA256SUMS"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture
def resources() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_twenty_versions_with_a_lost_and_a_damaged_message(
    tmp_path: Path, model: Path, resources: ExitStack, capsys: pytest.CaptureFixture
) -> None:
    job, trained = Job(tmp_path, model, resources), Trained(seed=1)
    job.publish(trained, 1)
    full = job.folders.metrics["weight_sync/bytes"]
    for version in range(2, 21):
        trained.step()
        services = job.folders._services
        if version == 8:  # the message is lost
            job.folders._services = {}
        damage = partial(_flip_a_bit, job.run / "delta_000014")
        job.publish(trained, version, damage if version == 14 else lambda: None)
        job.folders._services = services
        metrics, warned = job.folders.metrics, capsys.readouterr().err
        assert metrics["weight_sync/full"] == 0 and 0.01 < metrics["weight_sync/changed_fraction"] < 0.13
        assert metrics["weight_sync/bytes"] < full / 5
        if version == 8:
            assert not (job.remote / "step_000008").exists()
            continue
        if version == 9:
            assert "it holds weights of step 7, and the delta is one to step 8" in warned
            assert "it gets the full weights" in warned
        elif version == 14:
            assert "differs from its checksum" in warned and "it gets the full weights" in warned
        else:
            assert not warned
        job.check(trained, version, tmp_path)
        assert job.folders.without_weights == frozenset()


def test_a_node_without_the_run_directory_gets_deltas_over_http(
    tmp_path: Path, model: Path, resources: ExitStack, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, trained = Job(tmp_path, model, resources), Trained(seed=5)
    holds, receive = copy_service._holds, LocalCopy.receive
    monkeypatch.setattr(
        copy_service, "_holds", lambda f, checksum: not f.is_relative_to(job.run) and holds(f, checksum)
    )

    def damaging(copy: LocalCopy, checksum: str, name: str, file: BufferedIOBase, length: int) -> None:
        receive(copy, checksum, name, file, length)
        if name.endswith(".safetensors"):
            _flip_a_bit(copy.incoming(checksum))
            monkeypatch.setattr(LocalCopy, "receive", receive)

    def hanging_up(copy: LocalCopy, checksum: str, name: str, file: BufferedIOBase, length: int) -> None:
        if name.endswith(".safetensors"):
            raise ConnectionResetError
        receive(copy, checksum, name, file, length)

    full, expected = 0.0, {1: "does not see", 4: "holds weights of step 2", 5: "differs from its checksum"}
    expected |= {7: "a node has no weights of step 7: /files/", 8: "holds weights of step 6", 9: "it has no weights"}
    for version in range(1, 11):
        trained.step()
        services = job.folders._services
        if version == 3:  # the message is lost
            job.folders._services = {}
        elif version == 5:
            monkeypatch.setattr(LocalCopy, "receive", damaging)
        elif version == 7:  # the connection breaks
            monkeypatch.setattr(LocalCopy, "receive", hanging_up)
        elif version == 9:  # the service of the node starts again
            job.serve()
            job.folders._services = services = {job.service: ["http://b:1"]}
        job.publish(trained, version)
        job.folders._services = services
        sent, warned = job.folders.metrics.get("weight_sync/http_bytes", 0.0), capsys.readouterr().err
        if version in expected:
            assert expected.pop(version) in warned, (version, warned)
        else:
            assert not warned, (version, warned)
        if version == 1:
            full = sent
            assert full > job.folders.metrics["weight_sync/bytes"] == pytest.approx(full, rel=0.05)
        elif version in (2, 6):
            assert 0 < sent < full / 5 and job.folders.metrics["weight_sync/full"] == 0
        elif version in (4, 5, 8):
            assert full < sent < 1.2 * full  # the delta, and then everything
        if version == 7:
            monkeypatch.setattr(LocalCopy, "receive", receive)
            assert job.folders.without_weights == {"http://b:1"}
        elif version != 3:
            job.check(trained, version, tmp_path)
            assert job.folders.without_weights == frozenset()


def _flip_a_bit(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


def test_full_weights_travel_every_n_versions_and_after_a_restart(
    tmp_path: Path, model: Path, resources: ExitStack, capsys: pytest.CaptureFixture
) -> None:
    job, trained = Job(tmp_path, model, resources, every=3), Trained(seed=2)
    full = []
    for version in (1, 2, 3, 4):
        trained.step()
        job.publish(trained, version)
        full.append(job.folders.metrics["weight_sync/full"])
    assert full == [1, 0, 1, 0]
    # The run is killed, resumed from an earlier checkpoint, and comes to the same version with other weights.
    job.kill()
    job.start()
    for version in (4, 5):
        trained.step()
        job.publish(trained, version)
        assert job.folders.metrics["weight_sync/full"] == (version == 4)
        job.check(trained, version, tmp_path)
    # Somebody empties the folder of this node.
    shutil.rmtree(copy_root(job.config.local_folder, job.run) / "step_000005")
    trained.step()
    job.publish(trained, 7)
    assert job.folders.metrics["weight_sync/full"] == 1
    job.check(trained, 7, tmp_path)
    assert not capsys.readouterr().err


def test_a_delta_of_another_chain_is_refused(tmp_path: Path, model: Path, resources: ExitStack) -> None:
    """Version numbers repeat when a run resumes, so they alone do not say what a delta applies to."""
    job, trained = Job(tmp_path, model, resources), Trained(seed=3)
    job.publish(trained, 1)
    job.kill()
    job.start()
    job.folders.write(trained.tensors(), 1, is_main=True)
    trained.step()
    job.folders.write(trained.tensors(), 2, is_main=True)
    endpoint = Endpoint(job.service, job.config, key=KEY)
    delta = job.run / "delta_000002"
    body = {"root": str(job.remote), "folder": str(delta), "checksum": digest(delta / LIST)}
    with pytest.raises(UserError, match="it holds other weights of step 1, and the delta is one to step 1"):
        asyncio.run(endpoint.command("/weights", body, "take a delta"))


def test_a_node_that_cannot_be_reached_gets_no_prompts(
    tmp_path: Path, model: Path, resources: ExitStack, capsys: pytest.CaptureFixture
) -> None:
    job, trained = Job(tmp_path, model, resources), Trained(seed=4)
    gone = ServerPlace("http://c:1", "c", copies="http://127.0.0.1:9")
    job.places.append(gone)
    job.kill()
    job.start()
    job.publish(trained, 1)
    assert job.folders.without_weights == {"http://c:1"}
    assert "a node has no weights of step 1: " in capsys.readouterr().err
    job.check(trained, 1, tmp_path)
    state = ServerState(1, job.folders.folder(1), node_local=True, without_folder=job.folders.without_weights)
    with pytest.raises(ServerLostError, match="its node has no copy of the current weights"):
        asyncio.run(Endpoint("http://c:1", job.config).load_folder(state))


def test_only_the_holder_of_the_key_reaches_the_service(tmp_path: Path, model: Path, resources: ExitStack) -> None:
    job = Job(tmp_path, model, resources)
    body = {"root": str(job.remote), "folder": "/nowhere", "checksum": 64 * "0"}
    with httpx.Client(base_url=job.service, timeout=200.0) as client:
        for wrong in (None, "another"):
            for path in ("/offer", "/weights", f"/files/{64 * '0'}/config.json"):  # their body is not read
                answer = client.post(path, json=body, headers=headers(wrong))
                assert (answer.status_code, answer.headers["connection"]) == (401, "close")
            assert client.get("/model_info", headers=headers(wrong)).status_code == 401
        assert client.post("/other", json=body, headers=headers(KEY)).status_code == 404
        answer = client.post("/weights", json=body, headers=headers(KEY))
        assert (answer.status_code, answer.json()["message"]) == (
            400,
            f"{job.remote}/incoming_{64 * '0'} is missing, or has another SHA256SUMS",
        )
        for malformed in (b"[", b"{}", b'{"root": 1, "folder": 2}', b'{"root": "/x"}'):
            for path in ("/offer", "/weights"):
                answer = client.post(path, content=malformed, headers=headers(KEY))
                assert answer.status_code == 400 and answer.json()["success"] is False


def test_only_files_of_the_offered_folder_are_received(tmp_path: Path, model: Path, resources: ExitStack) -> None:
    job, checksum = Job(tmp_path, model, resources), 64 * "a"
    body = {"root": str(job.remote), "folder": "/nowhere", "checksum": checksum}
    with httpx.Client(base_url=job.service, headers=headers(KEY), timeout=200.0) as client:
        sent = client.post(f"/files/{checksum}/early", content=b"1")
        assert (sent.status_code, sent.json()["message"]) == (400, "nothing was offered")
        assert client.post("/offer", json={**body, "checksum": "../.."}).status_code == 400
        assert client.post("/offer", json=body).json()["seen"] is False
        for name in ("../../escaped", "/escaped", "a/../../../escaped", "a\0b", "", "."):
            sent = client.post(f"/files/{checksum}/{quote(name, safe='').replace('.', '%2e')}", content=b"1")
            assert sent.status_code == 400 and sent.json()["success"] is False, name
        assert client.post(f"/files/{64 * 'b'}/name", content=b"1").json()["message"] == "other weights were offered"
        assert client.post(f"/files/{checksum}/of/a%20folder", content=b"12").json()["success"] is True
        assert client.post(f"/files/{checksum}/empty", content=b"").json()["success"] is True
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    there = f"there/{job.remote.name}"
    received = [f"{there}/incoming_{checksum}/{name}" for name in ("empty", "of/a folder")]
    assert [name for name in found if name.startswith("there")] == [*received, f"{there}/lock"]
    assert not any("escaped" in name for name in found)


def test_copies_of_other_processes(tmp_path: Path) -> None:
    """The copy of a process that was killed is removed by the next one. That of a living one is not."""
    dead, alive = LocalCopy(tmp_path / "rlvr-weights-1"), LocalCopy(tmp_path / "rlvr-weights-2")
    dead._lock.close()
    with pytest.raises(UserError, match="is used by another process of this run directory"):
        LocalCopy(alive.root)
    own = LocalCopy(tmp_path / "rlvr-weights-3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rlvr-weights-2", "rlvr-weights-3"]
    own.close()
    alive.close()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written .*set rollout\.sglang\.local_folder"):
        LocalCopy(tmp_path / "file" / "rlvr-weights-4")


def test_every_node_needs_a_service(tmp_path: Path) -> None:
    register(tmp_path, [ServerPlace("http://x:1", "n1", copies="http://x:2"), ServerPlace("http://y:1", "n2")])
    served, unserved = read_registry(tmp_path)
    assert served.copies == "http://x:2"
    _check_copies([served, ServerPlace("http://127.0.0.1:1", node_name())], sure=True)
    for place, sure in ((unserved, True), (ServerPlace("http://elsewhere:1", node_name()), False)):
        with pytest.raises(UserError, match=r"no process keeps a copy .* start its servers with .*cluster\.serve"):
            _check_copies([served, place], sure)
