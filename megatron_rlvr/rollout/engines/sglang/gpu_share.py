"""The share of a GPU's memory that a server takes, at its first start and after a restart.

SGLang's ``mem_fraction_static`` is a fraction of the memory that is *free when the server starts*: weights and
key/value cache get ``fraction * free - what else is allocated meanwhile``
(`KVCacheConfigurator._profile_available_bytes` of SGLang 0.5.23, ``available - pre_model_load_memory * (1 -
fraction)``). At its first start a colocated server finds the GPU empty. When it is restarted, the trainer holds most of
the rest, so the same fraction would leave it a smaller cache, or none.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from megatron_rlvr.errors import UserError

# SGLang needs some memory besides weights and cache, so a larger fraction of what is free cannot work.
_LARGEST_FRACTION = 0.97
_QUERY_TIMEOUT_S = 60.0


def free_gib(gpus: Sequence[str]) -> float:
    """Return the free memory of the fullest of these GPUs, in GiB.

    This asks the driver through nvidia-smi, because a CUDA context would occupy memory on each of them.

    Args:
        gpus: indices or UUIDs, as in CUDA_VISIBLE_DEVICES.

    Raises:
        UserError: if nvidia-smi does not answer.
    """
    command = ["nvidia-smi", f"--id={','.join(gpus)}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True).stdout
        return min(float(line) for line in answer.split()) / 1024
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise UserError(
            f"nvidia-smi does not report the free memory of GPU {', '.join(gpus)} ({error}), which a restarted SGLang "
            "server needs to know: check the driver of this machine"
        ) from error


def fraction_after_restart(fraction: float, first_free: float, free: float) -> float:
    """Return the ``mem_fraction_static`` that gives a restarted server the memory of its first start.

    Args:
        fraction: ``mem_fraction_static`` of the first start.
        first_free: memory that was free before the first start, in GiB.
        free: memory that is free now, in GiB.

    Raises:
        UserError: if too little is free.
    """
    needed = fraction * first_free
    if needed > _LARGEST_FRACTION * free:
        raise UserError(
            f"an SGLang server needs {needed:.1f} GiB of each of its GPUs (mem_fraction_static={fraction:g} of the "
            f"{first_free:.1f} GiB that were free at its first start), but only {free:.1f} GiB are free: lower "
            "rollout.sglang.server.mem_fraction_static, so that the trainer leaves enough for a restart"
        )
    return round(needed / free, 4)
