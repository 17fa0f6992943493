"""What SGLang servers need in order to return the experts that every token was routed to.

SGLang 0.5.23 keeps the experts of every slot of its key/value cache in host memory, and returns those of the slots of
a finished sequence. So a prompt token that was found in the prefix cache has the routes under which its keys and values
were computed. Arguments that move keys and values without their routes, or that compute layers elsewhere, are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_rlvr.checked_input import InvalidInputError, field
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint
from megatron_rlvr.rollout.engines.sglang.launch_arguments import ServerLayout, normalized
from megatron_rlvr.rollout.engines.sglang.server import ROUTES_ARGUMENT as ARGUMENT

_UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "enable_hierarchical_cache": (bool, "moves keys and values to other slots without their routes"),
    "enable_lmcache": (bool, "loads keys and values without their routes"),
    "disaggregation_mode": (lambda value: value not in (None, "null"), "moves keys and values without their routes"),
    "speculative_algorithm": (bool, "moves keys and values of accepted tokens without their routes"),
    "enable_two_batch_overlap": (bool, "records the routes of one half of a batch over those of the other"),
}
"""Arguments with which SGLang 0.5.23 reports wrong routes: whether a value enables them, and why they are wrong."""


def with_routed_experts(rollout: RolloutConfig, servers: SGLangConfig) -> SGLangConfig:
    """Return the configuration of the servers with the recording of routes, if `rollout` replays them.

    Args:
        rollout: section ``rollout`` of the configuration.
        servers: section ``rollout.sglang``, with what other features need.

    Raises:
        UserError: if ``rollout.sglang.server`` has an argument with which the routes would be wrong.
    """
    if not rollout.routing_replay:
        return servers
    _check_arguments("rollout.sglang.server", normalized(servers.server), ServerLayout.from_arguments(servers.server))
    return replace(servers, server={**servers.server, ARGUMENT: True})


async def check_server(endpoint: Endpoint) -> None:
    """Refuse a server that does not return routes, or whose routes would be wrong.

    Raises:
        UserError: if it does not return them.
        ServerLostError: if it does not answer.
    """
    reply = await endpoint.request("GET", "/server_info", endpoint.config.health_timeout_seconds)
    try:
        arguments = reply.json()
        enabled = field(arguments, ARGUMENT, bool)
    except InvalidInputError:
        raise UserError(
            f"{endpoint.url} cannot return routes for rollout.routing_replay: its /server_info has no {ARGUMENT}; use "
            "the SGLang version that docs/sglang.md names, or set rollout.routing_replay=false"
        ) from None
    if not enabled:
        raise UserError(
            f"{endpoint.url} returns no routes, which rollout.routing_replay needs: start it with "
            f"--{ARGUMENT.replace('_', '-')}"
        )
    _check_arguments(endpoint.url, arguments, ServerLayout.from_arguments(arguments))


def _check_arguments(where: str, arguments: dict[str, Any], layout: ServerLayout) -> None:
    for name, (enables, reason) in _UNSUPPORTED.items():
        if enables(arguments.get(name)):
            raise UserError(
                f"{where} has {name}={arguments[name]}, which {reason}: leave it out, or set "
                "rollout.routing_replay=false"
            )
    if layout.pipeline > 1:
        raise UserError(
            f"{where} has pipeline_parallel_size={layout.pipeline}, with which SGLang returns the routes of some "
            "layers only: use tensor_parallel_size, or set rollout.routing_replay=false"
        )
    if arguments.get(ARGUMENT) is False:
        raise UserError(f"{where} has {ARGUMENT}=false, but rollout.routing_replay needs routes: leave it out")
