"""Whether a server holds the model that is trained, and its weights: SGLang dies of other shapes, so ask before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def check_model(url: str, info: Mapping[str, Any], hf_config: Any) -> None:
    """Compare what ``/model_info`` says with the trained model: its architecture, and its sizes where they can be read.

    The sizes stand in config.json of the folder that the server was started from, if this machine sees it.

    Raises:
        UserError: naming the first difference.
    """
    ours = {"model_type": hf_config.model_type, "architectures": hf_config.architectures}
    theirs: dict[str, Any] = {name: info.get(name) for name in ours}
    file = Path(str(info.get("model_path"))) / "config.json"
    if file.is_absolute() and file.is_file():
        config = json.loads(file.read_text())
        for name in SIZES:
            ours[name], theirs[name] = getattr(hf_config, name, None), config.get(name)
    for name, value in ours.items():
        if theirs[name] != value:
            raise UserError(
                f"the server at {url} has another model than model.path: {name}={theirs[name]} instead of {value} "
                f"(it serves {info.get('model_path')}): start it with the model that is trained"
            )


def is_norm(name: str) -> bool:
    """Norms have the same name and shape on both sides, and every tensor-parallel rank of a server holds them whole."""
    return name.endswith("norm.weight")


def checksum(tensor: Tensor) -> str:
    """SGLang's checksum of a tensor on the CPU: the first 8 bytes of SHA-256 over its bytes, in hexadecimal."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()[:16]


async def check_sums(endpoint: Endpoint, sums: dict[str, str]) -> None:
    """Compare a server's own checksums with `sums`, by tensor name.

    Raises:
        UserError: naming the first tensor that differs or is not there.
    """
    seconds = endpoint.config.update_timeout_seconds
    reply = await endpoint.call("POST", "/weights_checker", seconds, {"action": "checksum"})
    try:
        ranks = reply.json()["ranks"]
        found = [rank["checksums"] for rank in ranks]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{endpoint.url} gave no checksums: it answered {reply.excerpt()}") from None
    for checksums in found:
        for name, expected in sums.items():
            if checksums.get(name) != expected:
                raise UserError(
                    f"{endpoint.url} holds another {name} than it was given (checksum {checksums.get(name)} instead "
                    f"of {expected}): weights are damaged on their way; set rollout.sglang.weight_sync=disk"
                )
