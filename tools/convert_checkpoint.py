"""Convert weights between a Hugging Face folder and a Megatron checkpoint (torch_dist), or to FP8 for servers.

    python tools/convert_checkpoint.py to-megatron models/Qwen2.5-7B checkpoints/qwen --verify
    python tools/convert_checkpoint.py to-huggingface runs/math/checkpoints/step_400 exported --model models/Qwen2.5-7B
    python tools/convert_checkpoint.py to-peft runs/lora/checkpoints/step_400 adapter --model models/Qwen2.5-7B
    python tools/convert_checkpoint.py to-fp8 models/Qwen2.5-7B models/Qwen2.5-7B-FP8
    python tools/convert_checkpoint.py from-fp8 models/DeepSeek-V3 models/DeepSeek-V3-bf16

A checkpoint of adapters (lora.rank > 0) becomes a complete model, merged with the weights of --model, or a folder in
PEFT's format with the adapters alone.

The conversion runs in one process. It holds one weight at a time, with the Hugging Face tensors that make it up, and
prints its peak memory and the size of the largest weight. It writes to OUTPUT.partial, which it renames at the end. If
it is killed, start it again: it continues after the files that are complete. `--verify` reads the output back and
compares every tensor bit for bit with the input, converted again: after the conversion to --dtype if that rounds, or to
FP8. An option that a direction does not take is refused. Config.json of an exported folder
names the dtype of its weights.

`to-fp8` writes the Hugging Face folder that SGLang servers start from under rollout.quantization=fp8. It holds one file
in memory, and starts anew if it is killed. `from-fp8` writes the folder that training needs from one that was published
in this form, such as those of DeepSeek-V3 and Kimi-K2, in bfloat16 unless --dtype names another dtype.

Checkpoints do not depend on the parallel layout that wrote them. Training reads them under any layout, so there is no
conversion between layouts.
"""

import argparse
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, user_errors_reported
from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.config import ModelConfig, ParallelConfig
from megatron_rlvr.megatron.huggingface_config import read_config
from megatron_rlvr.weights import conversion
from megatron_rlvr.weights.dequantization import dequantize_folder
from megatron_rlvr.weights.fp8_folder import quantize_folder
from megatron_rlvr.weights.huggingface_folder import tensor_files
from megatron_rlvr.weights.shape_checks import check_shapes

# What a direction takes besides input and output. Other options would have no effect and are refused.
OPTIONS = {
    "to-megatron": ("dtype", "verify"),
    "to-huggingface": ("model", "shard_gib", "dtype", "verify"),
    "to-peft": ("model", "verify"),
    "to-fp8": ("shard_gib", "verify"),
    "from-fp8": ("shard_gib", "dtype", "verify"),
}

warnings.simplefilter("ignore")


@user_errors_reported
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("direction", choices=OPTIONS)
    parser.add_argument("input", type=Path, help="Hugging Face folder, or checkpoint folder with run.json")
    parser.add_argument("output", type=Path, help="folder to write; must not exist")
    parser.add_argument("--model", type=Path, help="folder of the model, if the input is a checkpoint")
    parser.add_argument("--shard-gib", type=float, help="largest safetensors file; default: 4")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="dtype to write; default: one that holds every weight exactly"
    )
    parser.add_argument("--verify", action="store_true", help="read back and compare every tensor")
    options = parser.parse_args(arguments)
    began = time.perf_counter()

    def report(text: str) -> None:
        print(f"[{time.perf_counter() - began:6.1f} s] {text}", flush=True)

    takes = OPTIONS[options.direction]
    for name in ("model", "shard_gib", "dtype", "verify"):
        if getattr(options, name) and name not in takes:
            known = ", ".join(f"--{other.replace('_', '-')}" for other in takes)
            raise UserError(f"{options.direction} takes {known}, but not --{name.replace('_', '-')}: leave it out")
    if options.shard_gib is not None and not 0 < options.shard_gib < 1e6:
        raise UserError(f"--shard-gib must be greater than 0 and less than 1e6, found {options.shard_gib}")
    shard_bytes = int((options.shard_gib or 4.0) * 1024**3)
    if options.direction in ("to-huggingface", "to-peft") and options.model is None:
        raise UserError(f"{options.direction} needs --model FOLDER, the model that the checkpoint was trained from")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the conversion runs in one process: start it without torchrun")
    if options.direction == "to-fp8":
        count, compared = quantize_folder(options.input, options.output, shard_bytes, options.verify)
        if options.verify:
            report(f"all {compared} tensors are equal to those of {options.input}, quantized")
        report(f"{options.output} is complete; {count} tensors are in FP8")
        return EXIT_DONE
    if options.direction == "from-fp8":
        dtype = getattr(torch, options.dtype or "bfloat16")
        count, compared = dequantize_folder(options.input, options.output, report, shard_bytes, dtype, options.verify)
        if options.verify:
            report(f"all {compared} tensors are equal to those of {options.input}, dequantized")
        report(f"{options.output} is complete; {count} tensors were in FP8; peak memory {_peak_gib():.3f} GiB")
        return EXIT_DONE
    with parallel.parallel_groups(ParallelConfig(), seed=0):
        before = _peak_gib()
        if options.direction == "to-megatron":
            bridge = _bridge(options.input, options.dtype or _dtype_of_folder(options.input, report))
            dtype = str(bridge.dtype).removeprefix("torch.")
            compared = conversion.to_megatron(bridge, options.output, report, options.verify)
        elif options.direction == "to-peft":
            bridge = _bridge(options.model, conversion.checkpoint_dtype(options.input))
            count = conversion.to_peft(bridge, options.input, options.output, report, options.verify)
            if options.verify:
                report(f"all {count} tensors are equal")
            report(f"{options.output} is complete: {count} tensors of adapters")
            return EXIT_DONE
        else:
            bridge = _bridge(options.model, conversion.checkpoint_dtype(options.input))
            dtype = options.dtype or str(bridge.dtype).removeprefix("torch.")
            compared = conversion.to_huggingface(
                bridge, options.input, options.output, report, options.verify, shard_bytes, getattr(torch, dtype)
            )
        if options.verify:
            report(f"all {compared} tensors are equal, as {dtype}")
        memory = f"peak memory {_peak_gib():.3f} GiB, {before:.3f} GiB before the first weight"
        report(f"{options.output} is complete; {memory}")
    return EXIT_DONE


def _peak_gib() -> float:
    """The largest resident memory of this process so far, in GiB."""
    try:
        # getrusage also counts the process that this one was forked from.
        [line] = [text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith("VmHWM:")]
        return int(line.split()[1]) / 1024**2
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2


def _bridge(folder: Path, dtype: str) -> PolicyBridge:
    # Local layers also on a GPU: both kinds of layers have the same names in a checkpoint.
    return PolicyBridge(ModelConfig(path=str(folder), dtype=cast(Any, dtype), layer_spec="local"), ParallelConfig())


def _dtype_of_folder(folder: Path, report: Callable[[str], None]) -> str:
    """Return the dtype that holds every weight of a folder exactly, and report it if config.json names another."""
    config = read_config(folder)
    dtypes = check_shapes(tensor_files(folder), config).dtypes
    dtype = "bfloat16" if dtypes == {torch.bfloat16} else "float32"
    if (named := str(config.dtype or dtype).removeprefix("torch.")) != dtype:
        stored = " and ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        report(f"config.json says {named}, but the weights are {stored}: they are kept as {dtype}; see --dtype")
    return dtype


if __name__ == "__main__":
    sys.exit(main())
