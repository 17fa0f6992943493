"""Convert weights between a Hugging Face folder and a Megatron checkpoint (torch_dist), in both directions.

    python tools/convert_checkpoint.py to-megatron models/Qwen2.5-7B checkpoints/qwen --verify
    python tools/convert_checkpoint.py to-huggingface runs/math/checkpoints/step_400 exported --model models/Qwen2.5-7B
    torchrun --nproc-per-node 8 tools/convert_checkpoint.py to-megatron models/Llama-3.3-70B checkpoints/llama \
        --tensor 4 --pipeline 2

A checkpoint is of no layout: it is read under any, so one conversion serves all. One process holds the whole model;
under torchrun each of tensor x pipeline processes holds its part. Beside it a process holds one tensor of the Hugging
Face folder that it reads, or one shard of the one that it writes; the peak is printed at the end.
The outputs are written beside and renamed when whole. `--verify` reads back what was written and compares every tensor
bit for bit.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_rlvr.backend import device, parallel
from megatron_rlvr.config import ModelConfig, ParallelConfig
from megatron_rlvr.errors import UserError

warnings.simplefilter("ignore")
device.install()  # before anything imports megatron.core

from megatron_rlvr.backend import conversion  # noqa: E402
from megatron_rlvr.backend.huggingface import PolicyBridge, read_config  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit status 0, or 2 after one line that says what to mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=("to-megatron", "to-huggingface"))
    parser.add_argument("input", type=Path, help="Hugging Face folder, or checkpoint folder with run.json")
    parser.add_argument("output", type=Path, help="folder to write; must not exist")
    parser.add_argument("--model", type=Path, help="to-huggingface: folder that config and tokenizer come from")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel processes of the conversion")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages of the conversion")
    parser.add_argument("--shard-gib", type=float, default=4.0, help="largest safetensors file")
    parser.add_argument("--verify", action="store_true", help="read back and compare every tensor")
    options = parser.parse_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    began = time.perf_counter()

    def say(text: str) -> None:
        if rank == 0:
            print(f"[{time.perf_counter() - began:6.1f} s] {text}", flush=True)

    try:
        layout = ParallelConfig(tensor=options.tensor, pipeline=options.pipeline)
        with parallel.parallel_groups(layout, seed=0) as here:
            if here.world_size != options.tensor * options.pipeline:
                raise UserError(
                    f"{here.world_size} processes for --tensor {options.tensor} --pipeline {options.pipeline}: start "
                    f"exactly {options.tensor * options.pipeline}, more would repeat the work"
                )
            if options.direction == "to-megatron":
                bridge = PolicyBridge(options.input, ModelConfig(dtype=_dtype_of_folder(options.input)), layout)
                compared = conversion.to_megatron(bridge, options.output, here.is_main, say, options.verify)
            else:
                if options.model is None:
                    raise UserError("to-huggingface needs --model: the folder that config and tokenizer come from")
                bridge = PolicyBridge(options.model, ModelConfig(dtype=_dtype_of_checkpoint(options.input)), layout)
                compared = conversion.to_huggingface(
                    bridge,
                    options.input,
                    options.output,
                    here.is_main,
                    say,
                    options.verify,
                    int(options.shard_gib * 1024**3),
                )
            if options.verify:
                say(f"all {compared} tensors are equal")
            peak = parallel.max_over_job({"peak": conversion.peak_gib()})["peak"]
            say(f"{options.output} is complete; peak memory of a process {peak:.2f} GiB")
    except UserError as error:
        print(f"error: {error}" if rank == 0 else f"error (rank {rank}): {error}", file=sys.stderr)
        return 2
    return 0


def _dtype_of_folder(folder: Path) -> str:
    found = str(read_config(folder).dtype or "torch.float32").removeprefix("torch.")
    if found not in ("float32", "bfloat16"):
        raise UserError(f"{folder}/config.json: dtype {found} is not supported: float32 or bfloat16")
    return found


def _dtype_of_checkpoint(folder: Path) -> str:
    try:
        return json.loads((folder / "run.json").read_text())["model"]["dtype"].removeprefix("torch.")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} is no whole checkpoint ({error}): give a folder with run.json, such as RUN/checkpoints/step_100"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
