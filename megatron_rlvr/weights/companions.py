"""The files of a Hugging Face folder without which weights are no complete model: config, tokenizer, licence."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from megatron_rlvr.checked_input import parse_object, read_bytes
from megatron_rlvr.errors import UserError

_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "chat_template*",
    "additional_chat_templates",
    "added_tokens.json",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def copy_companions(
    source: Path, folder: Path, dtype: torch.dtype, quantization: Mapping[str, Any] | None = None
) -> None:
    """Copy config, generation config, tokenizer and licence, without which weights are no complete model.

    Args:
        source: folder to copy from.
        folder: folder of the weights.
        dtype: dtype of the weights; of a few that are always in float32, config.json says nothing. It names another one
            if the policy was trained in another precision than the model that it started from. transformers and SGLang
            would round the weights to it.
        quantization: ``quantization_config`` of config.json; None leaves it out.
    """
    for file in _companions(source):
        if file.is_dir():
            shutil.copytree(file, folder / file.name, dirs_exist_ok=True)
        else:
            shutil.copy2(file, folder)
    config = folder / "config.json"
    if not (source / "config.json").is_file():
        return
    shutil.copy2(source / "config.json", config)
    name = str(dtype).removeprefix("torch.")
    settings = parse_object(read_bytes(config))
    # `torch_dtype` is the name of the key before transformers 4.56
    found = {key: settings[key] for key in ("dtype", "torch_dtype") if key in settings}
    changes = dict.fromkeys(found or ("dtype",), name) | ({"quantization_config": quantization} if quantization else {})
    changed = {key: value for key, value in settings.items() if key != "quantization_config"} | changes
    if changed != settings:
        config.write_text(json.dumps(changed, indent=2) + "\n")


def check_companions(source: Path) -> None:
    """Check that `copy_companions` can copy every file: hours may lie between the start of a run and its export.

    Raises:
        UserError: for the first file that cannot be read, such as a link to a file that is not there.
    """
    for file in _companions(source):
        files = [Path(root) / name for root, _, names in os.walk(file) for name in names] if file.is_dir() else [file]
        for one in files:
            try:
                if not stat.S_ISREG(one.stat().st_mode):
                    raise OSError(errno.EINVAL, "not a regular file")
                one.open("rb").close()
            except OSError as error:
                target = f", a link to {one.readlink()}," if one.is_symlink() else ""
                raise UserError(
                    f"{one}{target} cannot be read ({error.strerror}), and an export of the model needs a copy: "
                    "download it again, or remove it"
                ) from error


def _companions(source: Path) -> list[Path]:
    """What a copy of a model needs besides weights and config.json; a link to a missing file is included."""
    files = sorted(source.iterdir()) if source.is_dir() else []
    return [file for file in files if any(fnmatchcase(file.name, pattern) for pattern in _COMPANIONS)]
