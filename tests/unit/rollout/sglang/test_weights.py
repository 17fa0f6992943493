"""Weights in buckets, and updates that a server refuses or does not answer."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_sglang import FakeServer, fake_server

from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint
from megatron_rlvr.rollout.engines.sglang.weight_sync import broadcast
from megatron_rlvr.rollout.engines.sglang.weight_sync.broadcast import BroadcastTransport
from megatron_rlvr.rollout.engines.sglang.weight_sync.checks import checksum
from megatron_rlvr.rollout.engines.sglang.weight_sync.shared_memory import SharedMemoryTransport
from megatron_rlvr.rollout.engines.sglang.weight_sync.transport import Receiver, Transport
from megatron_rlvr.rollout.engines.sglang.weight_sync.update import stream_to_servers
from megatron_rlvr.weights.buckets import Bucket, filled, largest_bytes, plan_buckets
from tests.processes import DEADLINE_SECONDS, environment

CONFIG = SGLangConfig(update_timeout_seconds=200.0, health_timeout_seconds=200.0)
TENSORS = {
    "embed.weight": torch.randn(10, 8),
    "a.weight": torch.randn(3, 5),
    "a_norm.weight": torch.randn(7),
    "half.weight": torch.randn(4, 4).bfloat16(),
    "scalar": torch.tensor(3.0),
    "b.weight": torch.randn(6, 2),
}


DESCRIBED = [(name, tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()]


@pytest.mark.parametrize("size", [1, 64, 350, 10**6])
def test_buckets_hold_every_tensor_once(size: int) -> None:
    reused = torch.empty(80)

    def exported() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in TENSORS.items():  # an exporter may give views of one buffer
            view = reused.view(torch.uint8)[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            yield name, view.copy_(tensor)

    planned = plan_buckets(DESCRIBED, size)
    assert [b.last for b in planned] == [False] * (len(planned) - 1) + [True]
    buffers = [torch.full((largest_bytes(planned),), 255, dtype=torch.uint8) for _ in range(2)]
    found: dict[str, torch.Tensor] = {}
    previous = None
    for bucket in filled(planned, exported(), buffers):
        assert len(bucket.flat) <= size or len(bucket.names) == 1
        found |= {name: tensor.clone() for name, tensor in bucket.tensors()}
        for name, tensor in previous.tensors() if previous else ():  # it is still being sent
            assert torch.equal(tensor, TENSORS[name])
        previous = bucket
    assert list(found) == list(TENSORS)
    for name, tensor in found.items():
        assert torch.equal(tensor, TENSORS[name]) and tensor.dtype == TENSORS[name].dtype
    assert len(planned) == {1: 6, 64: 4, 350: 2, 10**6: 1}[size]


def test_process_that_holds_no_buckets_takes_part_in_the_export() -> None:
    taken: list[str] = []

    def exported() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in TENSORS.items():
            taken.append(name)
            yield name, tensor

    steps: list[str] = []
    for bucket in filled(plan_buckets(DESCRIBED, 64), exported(), [], before_each=lambda: steps.append("wait")):
        steps.append(",".join(bucket.names))
        assert bucket.flat.numel() == 0
    assert taken == list(TENSORS)
    assert steps[::2] == ["wait"] * 4 and ",".join(steps[1::2]) == ",".join(TENSORS)


def test_export_that_differs_from_the_plan() -> None:
    planned = plan_buckets(DESCRIBED, 64)
    with pytest.raises(AssertionError, match=r"yields b.weight, but a.weight was planned"):
        list(filled(planned, [("embed.weight", TENSORS["embed.weight"]), ("b.weight", TENSORS["b.weight"])], []))
    with pytest.raises(AssertionError, match=r"yields more, which was not planned"):
        list(filled(planned, [*TENSORS.items(), ("more", torch.ones(1))], []))


def test_a_bucket_is_filled_while_another_is_sent_and_its_memory_is_free_then(fake: FakeServer) -> None:
    """The next bucket is in the other buffer; the one after it overwrites the first, which the server has loaded."""
    filling = threading.Event()
    events: list[str] = []

    def control(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/update_weights_from_tensor":
            if "weight_version" not in body:
                assert filling.wait(200), "the next bucket is not filled meanwhile"
            filling.clear()
            events.append("loaded")
        fake.version = body.get("weight_version", fake.version)
        return 200, {"success": True}

    def exported() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in TENSORS.items():
            filling.set()
            yield name, tensor

    fake.control = control
    transport = SharedMemoryTransport()
    planned = plan_buckets(DESCRIBED, 1)
    buffers = [transport.allocate(largest_bytes(planned)) for _ in range(2)]
    stream = filled(planned, exported(), buffers, before_each=lambda: events.append("next"))
    with asyncio.Runner() as runner:
        receivers = [Receiver(Endpoint(fake.url, CONFIG), ranks=1, starts=1)]
        assert stream_to_servers(runner, receivers, transport, stream, 3, True, False) is None
    for number in range(6):  # before bucket n + 2 is filled, bucket n is loaded
        done = events[: [i for i, event in enumerate(events) if event == "next"][number]].count("loaded")
        assert done >= number - 1


def test_checksum_depends_only_on_the_bytes() -> None:
    tensor = torch.arange(6, dtype=torch.int32)
    assert checksum(tensor) == checksum(tensor.clone().view(2, 3)) == "cd9a54ed1f18bf97"
    assert checksum(tensor) != checksum(tensor + 1)


def test_shared_memory_does_not_keep_the_output_of_the_trainer_open() -> None:
    """torch's shared-memory manager outlives the trainer while a server uses the memory. It must not inherit stderr."""
    program = """
import os, psutil
from megatron_rlvr.rollout.engines.sglang.weight_sync.shared_memory import SharedMemoryTransport
buffer = SharedMemoryTransport().allocate(1000)
buffer.fill_(1)
managers = [p for p in psutil.Process().children() if "shm_manager" in p.name()]
trainer = {os.readlink(f"/proc/self/fd/{fd}") for fd in (1, 2)}
manager = {os.readlink(f"/proc/{managers[0].pid}/fd/{fd}") for fd in os.listdir(f"/proc/{managers[0].pid}/fd")}
print(len(managers), trainer & manager)
os.write(2, b"still here")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), timeout=DEADLINE_SECONDS
    )
    assert done.stdout.split("\n")[0] == "1 set()" and done.stderr.endswith("still here"), done.stderr


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with fake_server() as server:
        yield server


def _stream(
    fake: FakeServer, transport: Transport, version: int = 3, config: SGLangConfig = CONFIG
) -> tuple[str | None, int]:
    taken = []

    def stream() -> Iterator[Bucket]:
        planned = plan_buckets(DESCRIBED, 64)
        buffers = [transport.allocate(largest_bytes(planned)) for _ in range(2)]
        for bucket in filled(planned, TENSORS.items(), buffers):
            transport.share(bucket)
            taken.append(bucket.names)
            yield bucket

    with asyncio.Runner() as runner:
        receiver = Receiver(Endpoint(fake.url, config), ranks=1, starts=1)
        failure = stream_to_servers(
            runner, [receiver], transport, stream(), version, flush_cache=True, compare_checksums=False
        )
    return failure, len(taken)


def test_update_has_a_begin_and_an_end_and_the_version_in_the_last_bucket(fake: FakeServer) -> None:
    asked: list[tuple[str, Any]] = []

    def control(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        asked.append((path, body))
        fake.version = body.get("weight_version", fake.version)
        return 200, {"success": True}

    fake.control = control
    assert _stream(fake, SharedMemoryTransport()) == (None, 4)
    assert [path for path, _ in asked] == [
        "/begin_weight_update",
        *["/update_weights_from_tensor"] * 4,
        "/end_weight_update",
    ]
    assert [body.get("weight_version") for _, body in asked[1:-1]] == [None] * 3 + ["3"]
    assert [body["flush_cache"] for _, body in asked[1:-1]] == [False] * 3 + [True]


def test_an_open_update_is_ended_first(fake: FakeServer) -> None:
    asked: list[str] = []

    def control(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        asked.append(path)
        fake.version = body.get("weight_version", fake.version)
        return (400, {"success": False, "message": "already open"}) if len(asked) == 1 else (200, {"success": True})

    fake.control = control
    assert _stream(fake, SharedMemoryTransport()) == (None, 4)
    assert asked[:3] == ["/begin_weight_update", "/end_weight_update", "/begin_weight_update"]


def test_server_that_hangs_during_an_update_is_found_before_the_timeout(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found long before ``update_timeout_seconds``, but a server that is only slow is not given up."""
    monkeypatch.setattr("megatron_rlvr.rollout.engines.sglang.endpoint._PROBE_PERIOD_S", 0.1)
    reply, probes = fake.reply, []

    def count_probes(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        answer = reply(path, body)
        probes.append(path == "/model_info")
        return answer

    def control(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/end_weight_update" and fake.version == "4":
            fake.silent = True
        elif path == "/end_weight_update":  # slow: probed twice meanwhile
            enough = sum(probes) + 2
            while sum(probes) < enough:
                time.sleep(0.01)
        fake.version = body.get("weight_version", fake.version)
        while fake.silent:
            time.sleep(0.05)
        return 200, {"success": True}

    fake.control, fake.reply = control, count_probes  # type: ignore[method-assign]
    assert _stream(fake, SharedMemoryTransport()) == (None, 4)
    hanging = dataclasses.replace(CONFIG, update_timeout_seconds=1e6, health_timeout_seconds=3.0)
    failure, taken = _stream(fake, SharedMemoryTransport(), version=4, config=hanging)
    assert failure is not None and "/end_weight_update: silent, and so is /model_info" in failure and taken == 4


@pytest.mark.parametrize("transport", [SharedMemoryTransport(), BroadcastTransport(6.0)], ids=["tensor", "distributed"])
def test_refusal_ends_the_transfer_but_not_the_export(fake: FakeServer, transport: Transport) -> None:
    refused = (
        "/update_weights_from_tensor" if isinstance(transport, SharedMemoryTransport) else "/init_weights_update_group"
    )
    asked: list[str] = []

    def control(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        asked.append(path)
        return (400, {"success": False, "message": "no"}) if path == refused else (200, {"success": True})

    fake.control = control
    failure, taken = _stream(fake, transport)
    assert failure is not None and "it answered" in failure and taken == 4
    assert asked.count(refused) == 1
    transport.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "weights"]


def test_the_port_of_a_broadcast_is_occupied_before_servers_know_it(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = threading.Event()

    def control(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with socket.create_connection((body["master_address"], body["master_port"])):
            told.set()
        return 400, {"success": False, "message": "no"}

    fake.control = control
    monkeypatch.setattr(BroadcastTransport, "_join", lambda *_: told.wait(DEADLINE_SECONDS))
    failure, _ = _stream(fake, BroadcastTransport(6.0))
    assert failure is not None and "it answered" in failure
    assert told.is_set()


def test_a_broadcast_that_cannot_listen_leaves_the_servers_to_the_disk(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "LOOPBACK", "192.0.2.1")  # an address for documentation, which no machine has
    failure, taken = _stream(fake, BroadcastTransport(6.0))
    assert failure is not None and "cannot listen at 192.0.2.1 (Cannot assign requested address)" in failure
    assert taken == 4


def test_server_that_keeps_its_old_version(fake: FakeServer) -> None:
    fake.control = lambda path, body: (200, {"success": True})
    with pytest.raises(UserError, match="serves weights of version 0 after it was sent version 3"):
        _stream(fake, SharedMemoryTransport())
