"""The optimizer state in a checkpoint, stored per parameter, so that another layout can load it.

megatron-core's distributed optimizer keeps its state in flat buffers, of which every data-parallel rank has a slice.
megatron-core has two checkpoint formats for it. ``fully_reshardable`` gathers the state of a data-parallel group on
one rank to save it, and needs as much memory on every rank to load it. ``dp_reshardable`` gathers nothing, but cannot
be loaded with other tensor, pipeline or expert sizes. Here every rank writes and reads its own slices
(`flat_slices.py`) of the tensors that ``fully_reshardable`` stores: nothing is gathered, and any layout can load them.

megatron-core has bugs with torch's Adam, which keeps a step count per parameter next to the moments: the state does not
exist before the first step, the step count is loaded as one tensor that all parameters share, and it is taken for a
moment. `_create_state` and `_load_distributed` work around them, and `_check_loaded` verifies the result for any Adam.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.flat_slices import FlatSlice, slices_of
from megatron_rlvr.megatron.optimizer import chained_optimizers

_METADATA = {"chained_optim_avoid_prefix": True}
_MOMENTS_AND_WEIGHT = ("param", "exp_avg", "exp_avg_sq")

Slots = list[dict[str, Tensor]]
"""Float32 master weight and moments [n] of each parameter of which a rank has a slice, in the order of its buffers."""


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Whether the state is sharded over data-parallel ranks."""
    return any(isinstance(single, DistributedOptimizer) for single in chained_optimizers(optimizer))


def sharded_state(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], loading: bool
) -> tuple[dict[Any, Any], list[Slots], list[FlatSlice]]:
    """Return a description of the state, for saving or loading.

    Args:
        optimizer: the optimizer.
        model_state: sharded state dicts of the model chunks.
        loading: whether a checkpoint will be loaded into the state.

    Returns:
        megatron-core's description of all but the slots; the slots of this rank, by chained optimizer; and the slices
        of stored tensors that they consist of. There are slots only if the optimizer is distributed. For loading, they
        are new tensors in host memory, of the size of this rank's state.
    """
    chain = _with_parameters(optimizer)
    for single in chain.values():
        # A run may stop, and save, before its first update. megatron-core creates this state itself for other cases.
        if _is_over_torch(single) and (not loading or isinstance(single, DistributedOptimizer)):
            _create_state(single)
    if len(chain) > 1:
        optimizer._synchronize_steps()
    if not is_distributed(optimizer):
        states = {
            number: single.sharded_state_dict(model_state, is_loading=loading, metadata=_METADATA)
            for number, single in chain.items()
        }
        return _numbered(optimizer, states), [], []
    described, _ = extract_sharded_tensors_and_factories(model_state)
    entries = {entry.data: entry for entry in nested_values(described)}
    slots: list[Slots] = []
    slices: list[FlatSlice] = []
    for single in chain.values():
        if loading:
            single.load_state_dict(single.state_dict())  # allocates the state of Adams other than torch's
        slots.append([])
        for parameter, start, end in _local_ranges(single):
            slot = {
                name: torch.zeros(end - start) if loading else present[name].detach().flatten().float()
                for present in [single._get_main_param_and_optimizer_states(parameter)]
                for name in _MOMENTS_AND_WEIGHT
            }
            slots[-1].append(slot)
            slices += _slices(entries[parameter], start, slot)
    states = {number: single.state_dict() for number, single in chain.items()}
    return _numbered(optimizer, states), slots, slices


def _with_parameters(optimizer: MegatronOptimizer) -> dict[int, MegatronOptimizer]:
    """Return the chained optimizers by their number. Of frozen parameters, megatron-core makes one without state."""
    chain = enumerate(chained_optimizers(optimizer))
    return {number: single for number, single in chain if not single.is_stub_optimizer}


def _numbered(optimizer: MegatronOptimizer, states: dict[Any, Any]) -> dict[Any, Any]:
    """Return the states of chained optimizers by number, or that of the only one."""
    return states if len(chained_optimizers(optimizer)) > 1 else states[0]


def _slices(entry: ShardedTensor | ShardedTensorFactory, start: int, slot: dict[str, Tensor]) -> Iterator[FlatSlice]:
    for name, data in slot.items():
        yield from slices_of(entry, f"optimizer.state.{name}.{entry.key}", start, data)


def _local_ranges(single: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Yield the parameters of which this rank has a slice, and where it begins and ends in the flattened parameter."""
    for ranges in single.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, maps in bucket["param_map"].items():
                    yield parameter, maps["param"].start, maps["param"].end


def load(optimizer: MegatronOptimizer, state: dict[Any, Any], slots: list[Slots]) -> None:
    """Load a state into the optimizer, even if it was saved from a different number of chained optimizers.

    Experts have a separate optimizer only if they are distributed over expert-parallel ranks. Tensors are named after
    their parameter, so they match in either case. Of the other entries, only the step count is used.

    Args:
        optimizer: the optimizer.
        state: the loaded description.
        slots: the slots that `sharded_state` returned, filled from the checkpoint.

    Raises:
        UserError: if the state of a distributed optimizer differs from the loaded state afterwards.
    """
    several = len(chained_optimizers(optimizer)) > 1
    for position, (number, single) in enumerate(_with_parameters(optimizer).items()):
        whole = {key: value for key, value in state.items() if not isinstance(key, int)}
        loaded = state.get(number, {}) if several else whole
        distributed = isinstance(single, DistributedOptimizer)
        inner = loaded.setdefault("optimizer", {}) if distributed or "optimizer" in loaded else loaded
        step = _first_value(state, "step" if distributed else "common_step")
        groups = [{k: v for k, v in group.items() if k != "params"} for group in single.optimizer.param_groups]
        for group, stored in zip(groups, inner.get("param_groups", [{}] * len(groups)), strict=False):
            group |= {"params": stored["params"]} if "params" in stored else {}
            group |= {"step": step} if distributed and step is not None else {}
        inner["param_groups"] = groups
        if distributed:
            _load_distributed(single, loaded, slots[position])
            _check_loaded(single, slots[position], step)
            continue
        if step is None and _is_over_torch(single):
            step = torch.tensor(0.0)  # megatron-core stores no step count of 0
        if step is not None:
            inner["state"]["common_step"] = step
        single.load_state_dict(loaded)


def _load_distributed(single: DistributedOptimizer, state: dict[Any, Any], slots: Slots) -> None:
    single.load_state_dict({key: value for key, value in state.items() if not str(key).startswith("param_state")})
    # With torch's Adam, this set all step counts to one tensor from the parameter groups, which each parameter would
    # advance. megatron-core reads everything in the state of a parameter as a moment, so the step counts are removed
    # while it loads moments, and restored as one tensor per parameter.
    steps = {}
    if _is_over_torch(single):
        steps = {parameter: slot.pop("step") for parameter, slot in single.optimizer.state.items()}
    single.load_parameter_state_from_fs_model_space(dict(enumerate(slots)))
    for parameter, count in steps.items():
        single.optimizer.state[parameter]["step"] = count.clone()


def _check_loaded(single: DistributedOptimizer, slots: Slots, step: Any) -> None:
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
    for (parameter, _, _), slot in zip(_local_ranges(single), slots, strict=True):
        present = single._get_main_param_and_optimizer_states(parameter)
        for key, expected in slot.items():
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
