"""Arguments of ``sglang.launch_server``: their spelling, their command line, and the GPUs that a server needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.server_arguments import recorded


def normalized(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments with underscores in their names, so that ``tp-size`` and ``tp_size`` are the same."""
    return {name.replace("-", "_"): value for name, value in arguments.items()}


def command_line(arguments: Mapping[str, Any]) -> list[str]:
    """Return the arguments as words of a command line: True is a bare flag; None omits the argument.

    False omits it, too, unless SGLang has a flag ``no_NAME``. Then NAME is on by default.
    """
    known = recorded()[1]
    words = []
    for name, value in normalized(arguments).items():
        if value is False and f"no_{name}" in known:
            name, value = f"no_{name}", True
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if isinstance(value, list):
            words += [str(item) for item in value]
        elif isinstance(value, dict):
            words.append(json.dumps(value))
        elif value is not True:
            words.append(str(value))
    return words


@dataclass(frozen=True)
class ServerLayout:
    """How a server distributes its model over GPUs.

    Attributes:
        tensor: tensor-parallel size of one replica of the model.
        pipeline: pipeline-parallel size of one replica.
        replicas: copies of the model in the server. Attention data parallelism adds none: its ranks share the GPUs of
            the tensor-parallel group.
        attention_groups: groups of attention data parallelism that the tensor-parallel group is divided into.
    """

    tensor: int = 1
    pipeline: int = 1
    replicas: int = 1
    attention_groups: int = 1

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> ServerLayout:
        """Read the layout from server arguments, under any of SGLang's names for each size.

        Raises:
            UserError: if a size is not a positive whole number, or is set under two names.
        """
        values = normalized(arguments)

        def size(*names: str) -> int:
            given = [name for name in names if values.get(name) is not None and values[name] is not False]
            if not given:
                return 1
            name = given[0]
            if len(given) > 1:
                raise UserError(
                    f"rollout.sglang.server.{given[1]} is another name of {name}, which is set, too: leave one out"
                )
            text = str(values[name])
            if not text.isdecimal() or int(text) < 1:
                raise UserError(f"rollout.sglang.server.{name}={text} is not a number of GPUs: set it to 1 or more")
            return int(text)

        data = size("data_parallel_size", "dp_size", "dp")
        attention = size("attention_data_parallel_size", "attn_dp_size")
        return cls(
            tensor=size("tensor_parallel_size", "tp_size", "tp"),
            pipeline=size("pipeline_parallel_size", "pp_size", "pp"),
            replicas=1 if values.get("enable_dp_attention") else data,
            attention_groups=data if values.get("enable_dp_attention") else attention,
        )

    @property
    def gpus_per_replica(self) -> int:
        """Number of GPUs that one copy of the model is distributed over."""
        return self.tensor * self.pipeline

    @property
    def gpus(self) -> int:
        """Number of GPUs of the server."""
        return self.gpus_per_replica * self.replicas


def check_gpus(arguments: Mapping[str, Any], servers: int, gpus: int, where: str) -> None:
    """Refuse servers that need more GPUs than there are.

    Args:
        arguments: arguments of each server.
        servers: number of servers.
        gpus: number of GPUs of the machine that they run on.
        where: the machine, for the error.
    """
    each, first = ServerLayout.from_arguments(arguments).gpus, int(normalized(arguments).get("base_gpu_id") or 0)
    if gpus < first + each * servers:
        after = f" after base_gpu_id={first}" if first else ""
        raise UserError(
            f"{servers} servers (rollout.sglang.servers) of {each} GPUs each{after} need more than the {gpus} GPUs of "
            f"{where}: start fewer servers, or use fewer GPUs per server"
        )
