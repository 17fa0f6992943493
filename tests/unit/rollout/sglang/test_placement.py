"""Which training process hands its weights to which rank of a server, and what cannot work."""

from __future__ import annotations

import base64
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import device, waiting
from megatron_rlvr.rollout.engines.sglang.registry import ServerPlace, read_registry, register
from megatron_rlvr.rollout.engines.sglang.weight_sync import shared_memory
from megatron_rlvr.rollout.engines.sglang.weight_sync.placement import (
    RankPlace,
    check_broadcast,
    gpu_uuids,
    nccl_version,
    suppliers,
)
from megatron_rlvr.rollout.engines.sglang.weight_sync.shared_memory import SharedMemoryTransport, Supply
from megatron_rlvr.weights.buckets import Bucket

# Two nodes of four GPUs. torchrun numbers the processes of a node in the order of its GPUs.
PROCESSES = [RankPlace(node, f"{node}-gpu{gpu}") for node in ("n1", "n2") for gpu in range(4)]
ON_CPU = [RankPlace(node) for node in ("n1", "n1", "n2", "n2")]


@pytest.mark.parametrize(
    ("node", "gpus", "expected"),
    [("n1", [0, 1, 2, 3], [0, 1, 2, 3]), ("n2", [2, 3], [6, 7]), ("n2", [3, 0], [7, 4]), ("n1", [1], [1])],
)
def test_a_server_rank_reads_the_memory_of_the_process_on_its_gpu(node: str, gpus: list, expected: list) -> None:
    server = ServerPlace("http://s", node, tuple(f"{node}-gpu{gpu}" for gpu in gpus))
    assert suppliers(server, len(gpus), PROCESSES) == expected


def test_servers_on_the_cpu_are_supplied_by_their_own_node() -> None:
    assert suppliers(ServerPlace("http://s", "n2"), 1, ON_CPU) == [2]
    assert suppliers(ServerPlace("http://s", "n2"), 3, ON_CPU) == [2, 3, 2]


def test_server_that_shares_nothing_with_a_process() -> None:
    unknown = r"the server at http://s runs on n9, where no training process runs \(they run on n1, n2\), .*distributed"
    with pytest.raises(UserError, match=unknown):
        suppliers(ServerPlace("http://s", "n9"), 1, ON_CPU)
    with pytest.raises(UserError, match=r"uses GPU n1-gpu7 of n1, on which no training process runs"):
        suppliers(ServerPlace("http://s", "n1", ("n1-gpu0", "n1-gpu7")), 2, PROCESSES)


def test_broadcast_that_nccl_cannot_form() -> None:
    server = ServerPlace("http://s", "n3", ("n3-gpu0",), nccl="2.27.5")
    check_broadcast([server], PROCESSES[0], "2.27.5")
    check_broadcast([ServerPlace("http://s", "n1")], ON_CPU[0], None)
    with pytest.raises(UserError, match=r"the trainer has 2.28.3, the server at http://s has 2.27.5; install the same"):
        check_broadcast([server], PROCESSES[0], "2.28.3")
    same_gpu = ServerPlace("http://s", "n1", ("n1-gpu1", "n1-gpu0"), nccl="2.27.5")
    with pytest.raises(UserError, match=r"uses the GPU of rank 0 \(n1-gpu0 of n1\).*weight_sync=tensor"):
        check_broadcast([same_gpu], PROCESSES[0], "2.27.5")


def test_version_of_nccl_of_another_environment(tmp_path: Path) -> None:
    assert nccl_version(sys.executable) is None or device.on_gpu()
    with pytest.raises(UserError, match=r"torch of /nowhere/python does not report its version of NCCL"):
        nccl_version("/nowhere/python")
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\" >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(UserError, match=r"NCCL \(ModuleNotFoundError: No module named 'torch'\): repair it"):
        nccl_version(str(broken))


def test_uuids_are_written_as_torch_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '0, GPU-aa-11'\necho '1, GPU-bb-22'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu_uuids(["1", "GPU-aa-11", "GPU-bb"]) == ("bb-22", "aa-11", "bb-22")
    assert gpu_uuids([]) == ()
    with pytest.raises(UserError, match="nvidia-smi does not report the UUIDs of GPUs 7"):
        gpu_uuids(["7"])


def test_registry_of_all_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [ServerPlace("http://n1:1", "n1", ("a", "b"), "2.27.5"), ServerPlace("http://n2:1", "n2")]
    for place in places:
        monkeypatch.setenv("SLURMD_NODENAME", place.node)
        register(tmp_path, [place])
    assert read_registry(tmp_path) == places
    (tmp_path / "n2.json").write_text('{"servers": [{"url": "http://n2:1"}]}')
    with pytest.raises(UserError, match=r"n2.json does not describe SGLang servers .*start the servers again"):
        read_registry(tmp_path)
    with pytest.raises(UserError, match=r"registry=.*/none describes no SGLang server"):
        read_registry(tmp_path / "none")


def test_handles_name_the_gpu_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eight arguments that torch 2.13 and SGLang's patch agree on: the device is the one at index 6."""
    arguments = (torch.Tensor, (3,), (1,), 0, torch.UntypedStorage, torch.uint8, 5, b"handle", 3, 0, False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"uuid-of-{index}"))
    assert shared_memory.with_uuid(arguments) == (*arguments[:6], "uuid-of-5", *arguments[7:])


def test_handles_of_all_processes_reach_the_sender_in_the_order_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes 4 to 7 supply a server whose first rank is on the GPU of process 6."""
    by_rank, gathered = [6, 7, 4, 5], {}

    def gather(sender: int, own: dict[int, str], group: object, what: str) -> list | None:
        gathered[rank] = own
        return [gathered[r] for r in sorted(gathered)] if rank == sender and len(gathered) == 4 else None

    monkeypatch.setattr(waiting, "gather_to", gather)
    monkeypatch.setattr(shared_memory, "_serialize", lambda bucket: base64.b64encode(pickle.dumps(rank)).decode())
    shared = {}
    for rank in (0, 4, 5, 7, 6):  # the sender last, because this gather does not wait
        supply = Supply("http://s", by_rank, object() if rank in by_rank else None)  # type: ignore[arg-type]
        transport = SharedMemoryTransport([supply], rank)
        assert transport.holds_buckets == (rank in by_rank)
        bucket = Bucket(torch.empty(0, dtype=torch.uint8), torch.float32)
        transport.share(bucket)
        shared[rank] = bucket.shared
    assert shared[0] == shared[4] == {} and list(gathered) == [4, 5, 7, 6]
    assert [pickle.loads(base64.b64decode(handle)) for handle in shared[6]["http://s"]] == by_rank
