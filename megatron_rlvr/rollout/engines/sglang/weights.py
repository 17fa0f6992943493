"""Giving the policy's weights to running servers: from a folder, or bucket by bucket from the trainer's memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint, ServerLostError, Weights
from megatron_rlvr.rollout.engines.sglang.identity import check_model, check_sums, checksum, is_norm
from megatron_rlvr.rollout.engines.sglang.transfer import Receiver, Transfer
from megatron_rlvr.weights.buckets import Bucket


async def load_everywhere(endpoints: Sequence[Endpoint], weights: Weights, hf_config: Any, flush: bool) -> list[str]:
    """Have servers load the weights' folder, all at once; returns why those that did not answer did not.

    A server that is lost here gets the weights when it is back, before it is asked anything.

    Raises:
        UserError: when a server has another model, refuses them, or then names another version.
    """

    async def load(endpoint: Endpoint) -> str | None:
        try:
            check_model(endpoint.url, await endpoint.model_info(), hf_config)
            await endpoint.load_folder(weights, flush)
        except ServerLostError as error:
            return f"{endpoint.url}: {error}"
        return None

    failures = await asyncio.gather(*[load(endpoint) for endpoint in endpoints])
    return [failure for failure in failures if failure is not None]


def stream_everywhere(
    runner: asyncio.Runner,
    receivers: Sequence[Receiver],
    transfer: Transfer,
    stream: Iterable[Bucket],
    version: int,
    flush: bool,
    checked: bool,
) -> str | None:
    """Hand all buckets to running servers and read the version back; returns why not, where it failed.

    The version goes with the last bucket, so that a server which got a part of them still names the old one. `stream`
    is exhausted in any case: it is collective.

    Raises:
        UserError: when a server names another version afterwards, or the checksums differ that `checked` asks for.
    """
    failure = None if receivers else "no server answers"
    sums: dict[str, str] = {}
    last: dict[str, Any] = {"weight_version": str(version), "flush_cache": flush}
    if failure is None:
        try:
            runner.run(_begin(receivers, transfer))
        except ServerLostError as error:
            failure = str(error)
    for bucket in stream:
        if checked:
            sums |= {name: checksum(tensor) for name, tensor in bucket.tensors() if is_norm(name)}
        if failure is None:
            try:
                runner.run(transfer.send(bucket, last if bucket.last else {"flush_cache": False}))
            except ServerLostError as error:
                failure = str(error)
        del bucket  # before the next is allocated
    if failure is None:
        try:
            runner.run(_end(receivers, version, sums))
        except ServerLostError as error:
            failure = str(error)
    if failure is not None:
        transfer.abandon()
    return failure


async def _begin(receivers: Sequence[Receiver], transfer: Transfer) -> None:
    await transfer.begin(receivers)
    try:
        for receiver in receivers:
            try:
                await receiver.endpoint.order("/begin_weight_update", {}, "begin a weight update")
            except UserError:  # one that failed half-way is still open
                await receiver.endpoint.order("/end_weight_update", {}, "end a weight update")
                await receiver.endpoint.order("/begin_weight_update", {}, "begin a weight update")
    except UserError as error:
        raise ServerLostError(str(error)) from error


async def _end(receivers: Sequence[Receiver], version: int, sums: dict[str, str]) -> None:
    for endpoint in (r.endpoint for r in receivers):
        await endpoint.order("/end_weight_update", {}, "end a weight update")
        await endpoint.check_version(version)
        if sums:
            await check_sums(endpoint, sums)
