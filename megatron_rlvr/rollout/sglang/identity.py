"""Whether a server holds the model that is trained: SGLang dies of weights of another shape, so ask before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rlvr.errors import UserError

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
