"""The optimizer state in a checkpoint, stored per parameter, so that another layout can load it.

megatron-core's distributed optimizer keeps its state in flat buffers, of which every data-parallel rank has a slice.
The ``fully_reshardable`` format stores the state per parameter instead. It has three bugs with torch's Adam, which
keeps a step count per parameter next to the moments: the state does not exist before the first step, the step count is
loaded as one tensor that all parameters share, and the step count is read as if it were a moment. `_create_state` and
`_load_over_torch` work around them, and `_check_loaded` verifies the result for any Adam.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.optimizer import chained_optimizers

_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Gather on the first data-parallel rank, in host memory, instead of on every rank through its GPU.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Whether the state is sharded over data-parallel ranks."""
    return any(isinstance(single, DistributedOptimizer) for single in chained_optimizers(optimizer))


def sharded_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], loading: bool) -> dict[str, Any]:
    """Return megatron-core's description of the state, for saving or loading. Collective over the job.

    Args:
        optimizer: the optimizer.
        model_state: sharded state dicts of the model chunks.
        loading: whether a checkpoint will be loaded into the state.
    """
    for single in chained_optimizers(optimizer):
        # A run may stop, and save, before its first update. megatron-core creates this state itself for other cases.
        if _is_over_torch(single) and (not loading or isinstance(single, DistributedOptimizer)):
            _create_state(single)
    return optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=_METADATA)


def load(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Load a state into the optimizer, even if it was saved from a different number of chained optimizers.

    Experts have a separate optimizer only if they are distributed over expert-parallel ranks. Tensors are named after
    their parameter, so they match in either case. Of the other entries, only the step count is used.

    Raises:
        UserError: if the state of a distributed optimizer differs from the loaded state afterwards.
    """
    chain = chained_optimizers(optimizer)
    for number, single in enumerate(chain):
        loaded = state[number] if len(chain) > 1 else {k: v for k, v in state.items() if not isinstance(k, int)}
        distributed = isinstance(single, DistributedOptimizer)
        inner = loaded.setdefault("optimizer", {}) if distributed or "optimizer" in loaded else loaded
        step = _first_value(state, "step" if distributed else "common_step")
        groups = [{k: v for k, v in group.items() if k != "params"} for group in single.optimizer.param_groups]
        for group, stored in zip(groups, inner.get("param_groups", [{}] * len(groups)), strict=False):
            group |= {"params": stored["params"]} if "params" in stored else {}
            group |= {"step": step} if distributed and step is not None else {}
        inner["param_groups"] = groups
        if not distributed and step is None and _is_over_torch(single):
            step = torch.tensor(0.0)  # megatron-core stores no step count of 0
        if not distributed and step is not None:
            inner["state"]["common_step"] = step
        if distributed and _is_over_torch(single):
            _load_over_torch(single, loaded)
        else:
            single.load_state_dict(loaded)
        if distributed:
            _check_loaded(single, loaded["param_state"], step)


def _load_over_torch(single: DistributedOptimizer, state: dict[Any, Any]) -> None:
    single.load_state_dict({key: value for key, value in state.items() if not key.startswith("param_state")})
    # This set all step counts to one tensor from the parameter groups, which each parameter would advance.
    # megatron-core reads everything in the state of a parameter as a moment, so the step counts are removed while it
    # loads moments, and restored as one tensor per parameter.
    steps = {parameter: slot.pop("step") for parameter, slot in single.optimizer.state.items()}
    single.load_parameter_state_from_fully_reshardable(state["param_state"])
    for parameter, count in steps.items():
        single.optimizer.state[parameter]["step"] = count.clone()


def _check_loaded(single: DistributedOptimizer, loaded: dict[int, dict[str, torch.Tensor]], step: Any) -> None:
    """Compare the state of the optimizer after loading with the checkpoint, element by element.

    megatron-core has separate code for the Adam of Transformer Engine, Apex and torch and for the offloaded Adam, and
    not all of it was correct: one resumed at step 0 without a warning.

    Raises:
        UserError: if step counts, moments or master weights differ from the checkpoint.
    """
    name = type(single.optimizer).__name__
    adams = getattr(single.optimizer, "sub_optimizers", [single.optimizer])  # the offloaded Adam has two, GPU and host
    counts = [slot["step"] for adam in adams for slot in adam.state.values() if "step" in slot]
    if len({id(count) for count in counts}) < len(counts):
        raise UserError(f"{name} would advance one step count for several parameters after this load: {_ADVICE}")
    counts += [group["step"] for adam in adams for group in adam.param_groups if group["params"] and "step" in group]
    steps = {int(count) for count in counts}
    if step is not None and steps != {int(step)}:
        raise UserError(f"{name} has taken {sorted(steps)} steps after loading a state of {int(step)}: {_ADVICE}")
    number = -1  # parameters are numbered through all buffers
    for buffer, ranges in zip(single.buffers, single.gbuf_ranges, strict=True):
        local_ranges = {
            parameter: range_map
            for bucket_ranges in ranges.values()
            for bucket in bucket_ranges
            for parameter, range_map in bucket["param_map"].items()
        }
        for parameter in buffer.param_index_map:
            number += 1
            if parameter not in local_ranges:
                continue
            present = single._get_main_param_and_optimizer_states(parameter)
            local_range = local_ranges[parameter]["param"]
            for key in ("param", "exp_avg", "exp_avg_sq"):
                stored = loaded[number]["fp32_param" if key == "param" and "param" not in loaded[number] else key]
                expected = stored.flatten()[local_range.start : local_range.end]
                if not torch.equal(present[key].detach().flatten().to(expected.device, expected.dtype), expected):
                    raise UserError(f"{name} holds another {key} than the checkpoint after loading it: {_ADVICE}")


_ADVICE = (
    "this state cannot be resumed with it; use the optimizer that wrote it, or start a new run from the checkpoint's "
    "weights (tools/convert_checkpoint.py)"
)


def _first_value(state: Any, name: str) -> Any:
    """Return the first value with this key at any depth of dicts and lists; None if there is none."""
    if isinstance(state, dict) and name in state:
        return state[name]
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return next((value for child in children if (value := _first_value(child, name)) is not None), None)


def _is_over_torch(single: MegatronOptimizer) -> bool:
    return type(single.optimizer).__module__.startswith("torch.")


def _create_state(single: MegatronOptimizer) -> None:
    """Create the state that torch's Adam otherwise creates in its first step."""
    for group in single.optimizer.param_groups:
        for parameter in group["params"]:
            if not single.optimizer.state[parameter]:
                single.optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
