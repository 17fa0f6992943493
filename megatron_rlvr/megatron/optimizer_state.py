"""The optimizer's state in a checkpoint, per whole parameter, so that another layout can load it.

megatron-core's distributed optimizer keeps its state in flat buffers, of which every data-parallel rank holds a slice.
The ``fully_reshardable`` format stores it per parameter instead. That format goes wrong in three places with torch's
Adam, which keeps a step count for each parameter next to its moments: the state does not exist before the first step,
the step count is loaded as one tensor that all parameters share, and the reader of moments takes the step count for a
moment. `_create_state` and `_load_over_torch` work around them, and `_check_loaded` verifies the result for any Adam.
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
    """megatron-core's description of the state, to save or to be filled by loading. Collective over the job."""
    if loading:
        for single in chained_optimizers(optimizer):
            if _is_distributed_over_torch(single):
                _create_state(single)
    return optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=_METADATA)


def load(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Put a loaded state into the optimizer, even if it was saved from another number of chained optimizers.

    Experts have an optimizer of their own only if expert-parallel ranks share them. Tensors are named after their
    parameter, so they fit in either case. From the rest of the state, only the step count is used.

    Raises:
        UserError: if a distributed optimizer does not hold the loaded state afterwards.
    """
    chain = chained_optimizers(optimizer)
    for number, single in enumerate(chain):
        own = state[number] if len(chain) > 1 else {k: v for k, v in state.items() if not isinstance(k, int)}
        distributed = isinstance(single, DistributedOptimizer)
        inner = own.setdefault("optimizer", {}) if distributed or "optimizer" in own else own
        step = _first_value(state, "step" if distributed else "common_step")
        groups = [{k: v for k, v in group.items() if k != "params"} for group in single.optimizer.param_groups]
        for group, stored in zip(groups, inner.get("param_groups", [{}] * len(groups)), strict=False):
            group |= {"params": stored["params"]} if "params" in stored else {}
            group |= {"step": step} if distributed and step is not None else {}
        inner["param_groups"] = groups
        if not distributed and step is not None:
            inner["state"]["common_step"] = step
        if _is_distributed_over_torch(single):
            _load_over_torch(single, own)
        else:
            single.load_state_dict(own)
        if distributed:
            _check_loaded(single, own["param_state"], step)


def _load_over_torch(single: DistributedOptimizer, state: dict[Any, Any]) -> None:
    single.load_state_dict({key: value for key, value in state.items() if not key.startswith("param_state")})
    # That set the step counts from the parameter groups, to one tensor that all parameters share: each of them would
    # advance it. megatron-core's reader of moments takes everything in a parameter's state for a moment, so the counts
    # are set aside while it runs, and come back as one tensor per parameter.
    steps = {parameter: slot.pop("step") for parameter, slot in single.optimizer.state.items()}
    single.load_parameter_state_from_fully_reshardable(state["param_state"])
    for parameter, count in steps.items():
        single.optimizer.state[parameter]["step"] = count.clone()


def _check_loaded(single: DistributedOptimizer, loaded: dict[int, dict[str, torch.Tensor]], step: Any) -> None:
    """Compare what the optimizer holds after loading with what was loaded, element by element.

    megatron-core has separate code for Transformer Engine's, Apex's, torch's and the offloaded Adam, and not all of it
    was right: one resumed at step 0 without a warning.

    Raises:
        UserError: if step counts, moments or master weights differ from the checkpoint's.
    """
    name = type(single.optimizer).__name__
    adams = getattr(single.optimizer, "sub_optimizers", [single.optimizer])  # the offloaded one has two: GPU and host
    counts = [slot["step"] for adam in adams for slot in adam.state.values() if "step" in slot]
    if len({id(count) for count in counts}) < len(counts):
        raise UserError(f"{name} would advance one step count for several parameters after this load: {_ADVICE}")
    counts += [group["step"] for adam in adams for group in adam.param_groups if group["params"] and "step" in group]
    found = {int(count) for count in counts}
    if step is not None and found != {int(step)}:
        raise UserError(f"{name} has taken {sorted(found)} steps after loading a state of {int(step)}: {_ADVICE}")
    number = -1  # parameters are numbered through all buffers
    for buffer, ranges in zip(single.buffers, single.gbuf_ranges, strict=True):
        own_ranges = {
            parameter: range_map
            for bucket_ranges in ranges.values()
            for bucket in bucket_ranges
            for parameter, range_map in bucket["param_map"].items()
        }
        for parameter in buffer.param_index_map:
            number += 1
            if parameter not in own_ranges:
                continue
            held = single._get_main_param_and_optimizer_states(parameter)
            own_range = own_ranges[parameter]["param"]
            for key in ("param", "exp_avg", "exp_avg_sq"):
                stored = loaded[number]["fp32_param" if key == "param" and "param" not in loaded[number] else key]
                expected = stored.flatten()[own_range.start : own_range.end]
                if not torch.equal(held[key].detach().flatten().to(expected.device, expected.dtype), expected):
                    raise UserError(f"{name} holds another {key} than the checkpoint after loading it: {_ADVICE}")


_ADVICE = (
    "this state cannot be resumed with it; use the optimizer that wrote it, or start a new run from the checkpoint's "
    "weights (tools/convert_checkpoint.py)"
)


def _first_value(state: Any, name: str) -> Any:
    """The first value with that key at any depth of dicts and lists; None if there is none."""
    if isinstance(state, dict) and name in state:
        return state[name]
    children = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return next((value for child in children if (value := _first_value(child, name)) is not None), None)


def _is_distributed_over_torch(single: MegatronOptimizer) -> bool:
    return isinstance(single, DistributedOptimizer) and type(single.optimizer).__module__.startswith("torch.")


def _create_state(single: DistributedOptimizer) -> None:
    """Give torch's Adam the state that it otherwise creates in its first step."""
    for group in single.optimizer.param_groups:
        for parameter in group["params"]:
            if not single.optimizer.state[parameter]:
                single.optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
