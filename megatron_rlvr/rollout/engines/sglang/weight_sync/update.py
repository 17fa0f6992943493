"""A single weight update: all servers load a folder, or receive all buckets through a transport."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint, ServerLostError
from megatron_rlvr.rollout.engines.sglang.server_state import ServerState
from megatron_rlvr.rollout.engines.sglang.weight_sync.checks import check_checksums, check_model, checksum, is_norm
from megatron_rlvr.rollout.engines.sglang.weight_sync.transport import Receiver, Transport
from megatron_rlvr.weights.buckets import Bucket


async def load_on_servers(
    endpoints: Sequence[Endpoint], state: ServerState, hf_config: Any, flush_cache: bool
) -> list[str]:
    """Load the expected weights from their folder on all servers at once.

    A client loads them on a server that is lost meanwhile when it is back, before it sends a prompt.

    Returns:
        one line for each server that did not answer.

    Raises:
        UserError: if a server serves a different model, refuses the weights, or reports another version afterwards.
    """

    async def load(endpoint: Endpoint) -> str | None:
        try:
            check_model(endpoint.url, await endpoint.model_info(), hf_config)
            await endpoint.load_folder(state, flush_cache)
        except ServerLostError as error:
            return f"{endpoint.url}: {error}"
        return None

    failures = await asyncio.gather(*[load(endpoint) for endpoint in endpoints])
    return [failure for failure in failures if failure is not None]


def stream_to_servers(
    runner: asyncio.Runner,
    receivers: Sequence[Receiver],
    transport: Transport,
    stream: Iterable[Bucket],
    version: int,
    flush_cache: bool,
    compare_checksums: bool,
) -> str | None:
    """Send all buckets to running servers and read the version back. A bucket is filled while the last one is sent.

    The version travels with the last bucket, so a server that received only some of the buckets still reports the old
    version.

    Args:
        runner: runs the event loop that the receivers' connections belong to. A thread of this function uses it.
        receivers: the servers; an empty sequence counts as a failure.
        transport: the transport that allocated the buckets.
        stream: the buckets. It is consumed to the end even after a failure, because it is collective.
        version: version of the weights.
        flush_cache: whether servers flush their prefix cache.
        compare_checksums: whether to compare the checksums of all norms afterwards.

    Returns:
        why the update failed, or None. After a failure, the weights of all servers are undefined.

    Raises:
        UserError: if a server reports another version or another checksum afterwards.
    """
    failure = None if receivers else "no server answers"
    checksums: dict[str, str] = {}
    last_fields: dict[str, Any] = {"weight_version": str(version), "flush_cache": flush_cache}
    with ThreadPoolExecutor(1, "weights-sender") as sender:

        def run(work: Coroutine[Any, Any, None]) -> Future[None]:
            return sender.submit(runner.run, work)

        sending = run(_begin(receivers, transport)) if failure is None else None
        for bucket in stream:
            if compare_checksums:
                checksums |= {name: checksum(tensor) for name, tensor in bucket.tensors() if is_norm(name)}
            # The memory of the previous bucket is free for the next one when this is done.
            failure, sending = failure or _outcome(sending), None
            if failure is None:
                sending = run(transport.send(bucket, last_fields if bucket.last else {"flush_cache": False}))
        failure = failure or _outcome(sending)
        if failure is None:
            failure = _outcome(run(_end(receivers, version, checksums)))
    if failure is not None:
        transport.abandon()
    return failure


def _outcome(work: Future[None] | None) -> str | None:
    """Wait for work of the sender; returns why it failed, or None."""
    try:
        if work is not None:
            work.result()
    except ServerLostError as error:
        return str(error)
    return None


async def _begin(receivers: Sequence[Receiver], transport: Transport) -> None:
    await transport.connect(receivers)
    try:
        for receiver in receivers:
            try:
                await receiver.endpoint.command("/begin_weight_update", {}, "begin a weight update")
            except UserError:  # an earlier update failed and is still open
                await receiver.endpoint.command("/end_weight_update", {}, "end a weight update")
                await receiver.endpoint.command("/begin_weight_update", {}, "begin a weight update")
    except UserError as error:
        raise ServerLostError(str(error)) from error


async def _end(receivers: Sequence[Receiver], version: int, checksums: dict[str, str]) -> None:
    for endpoint in (receiver.endpoint for receiver in receivers):
        await endpoint.command("/end_weight_update", {}, "end a weight update")
        await endpoint.check_version(version)
        if checksums:
            await check_checksums(endpoint, checksums)
