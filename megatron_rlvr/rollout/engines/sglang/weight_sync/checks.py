"""Check that a server serves the trained model, and that its weights arrived undamaged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlvr.checked_input import InvalidInputError, field, read_json
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint

# SGLang crashes if it receives weights of other shapes, so these are compared first.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def check_model(url: str, info: Mapping[str, Any], hf_config: Any) -> None:
    """Compare the model of a server with the trained model: the architecture and, if known, the sizes.

    The sizes are read from config.json in the folder that the server was started from, if this machine sees it.

    Args:
        url: URL of the server, for the error.
        info: the server's answer to ``/model_info``.
        hf_config: transformers configuration of the trained model.

    Raises:
        UserError: for the first difference; names both values.
    """
    trained = {"model_type": hf_config.model_type, "architectures": hf_config.architectures}
    served: dict[str, Any] = {name: info.get(name) for name in trained}
    file = Path(str(info.get("model_path"))) / "config.json"
    if file.is_absolute() and file.is_file():
        config = read_json(file, remedy=f"the server at {url} was started from this folder; download the model again")
        for name in _SIZES:
            trained[name], served[name] = getattr(hf_config, name, None), config.get(name)
    for name, value in trained.items():
        if served[name] != value:
            raise UserError(
                f"the server at {url} serves a different model than model.path: {name}={served[name]} instead of "
                f"{value} (it serves {info.get('model_path')}): start it with the trained model"
            )


def is_norm(name: str) -> bool:
    """Whether the tensor is the weight of a norm.

    Norms have the same name and shape in the trainer and in SGLang, and every tensor-parallel rank holds all of them.
    """
    return name.endswith("norm.weight")


def checksum(tensor: Tensor) -> str:
    """Return SGLang's checksum of a CPU tensor: the first 8 bytes of the SHA-256 of its bytes, in hexadecimal."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()[:16]


async def check_checksums(endpoint: Endpoint, expected: Mapping[str, str]) -> None:
    """Compare the checksums that every rank of a server computes with the expected checksums.

    Args:
        endpoint: the server.
        expected: checksum by tensor name; the server may have more tensors.

    Raises:
        UserError: for the first tensor that differs or is missing.
        ServerLostError: if the server does not answer.
    """
    timeout = endpoint.config.update_timeout_seconds
    reply = await endpoint.request("POST", "/weights_checker", timeout, {"action": "checksum"})
    try:
        checksums_by_rank = [field(rank, "checksums", dict) for rank in field(reply.json(), "ranks", list)]
    except InvalidInputError:
        raise UserError(f"{endpoint.url} sent no checksums: it answered {reply.excerpt()}") from None
    for checksums in checksums_by_rank:
        for name, value in expected.items():
            if checksums.get(name) != value:
                raise UserError(
                    f"{endpoint.url} holds a different {name} than it was sent (checksum {checksums.get(name)} instead "
                    f"of {value}): weights are damaged in transit; set rollout.sglang.weight_sync=disk"
                )
