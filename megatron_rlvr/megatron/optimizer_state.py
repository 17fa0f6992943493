"""The optimizer's state in a checkpoint, in terms of whole parameters, so that another layout can load it.

megatron-core keeps the state of its distributed optimizer in flat buffers of which every data-parallel rank has a
slice. Its ``fully_reshardable`` format cuts them into parameters again. Over torch's Adam, which keeps its step count
beside the moments of each parameter, that format reads wrongly in three places; `_prepare` and `load` go around them.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.optimizer import chained_optimizers

METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Gather on the first data-parallel rank, in the host's memory, instead of on every rank by way of its GPU.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


def is_distributed(optimizer: MegatronOptimizer) -> bool:
    """Whether the state is spread over data-parallel ranks."""
    return any(isinstance(part, DistributedOptimizer) for part in chained_optimizers(optimizer))


def sharded_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], loading: bool) -> dict[str, Any]:
    """megatron-core's description of the state, to be saved or to be filled by loading. Collective."""
    if loading:
        for part in chained_optimizers(optimizer):
            if _over_torch(part):
                _prepare(part)
    return optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=METADATA)


def load(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Take over a loaded state, of as many optimizers or of another number.

    Experts have an optimizer of their own only where expert-parallel ranks share them. Tensors are named by their
    parameter, so they find their place in any case; of the rest only the step count is read.
    """
    chain = chained_optimizers(optimizer)
    for number, part in enumerate(chain):
        own = state[number] if len(chain) > 1 else {k: v for k, v in state.items() if not isinstance(k, int)}
        distributed = isinstance(part, DistributedOptimizer)
        inner = own.setdefault("optimizer", {}) if distributed or "optimizer" in own else own
        step = _find(state, "step" if distributed else "common_step")
        groups = [{k: v for k, v in group.items() if k != "params"} for group in part.optimizer.param_groups]
        for group, given in zip(groups, inner.get("param_groups", [{}] * len(groups)), strict=False):
            group |= {"params": given["params"]} if "params" in given else {}
            group |= {"step": step} if distributed and step is not None else {}
        inner["param_groups"] = groups
        if not distributed and step is not None:
            inner["state"]["common_step"] = step
        if not _over_torch(part):
            part.load_state_dict(own)
            if distributed:
                _check(part, own["param_state"], step)
            continue
        part.load_state_dict({key: value for key, value in own.items() if not key.startswith("param_state")})
        # The step count came with the parameter groups, as one tensor that all parameters share: every one of them
        # would advance it. megatron-core's reader of moments takes whatever is there for a moment.
        steps = {parameter: slot.pop("step") for parameter, slot in part.optimizer.state.items()}
        part.load_parameter_state_from_fully_reshardable(own["param_state"])
        for parameter, count in steps.items():
            part.optimizer.state[parameter]["step"] = count.clone()
        _check(part, own["param_state"], step)


def _check(part: DistributedOptimizer, loaded: dict[int, dict[str, torch.Tensor]], step: Any) -> None:
    """Hold what the optimizer has after loading to what was loaded, element by element, whatever Adam it is.

    megatron-core has a path for each of Transformer Engine's, Apex's, torch's and the offloaded Adam, and not each of
    them was right: one resumed with step 0 and said nothing.

    Raises:
        UserError: when step counts, moments or master weights are not those of the checkpoint.
    """
    name = type(part.optimizer).__name__
    inner = getattr(part.optimizer, "sub_optimizers", [part.optimizer])  # of the offloaded one: on GPU and host
    counts = [slot["step"] for one in inner for slot in one.state.values() if "step" in slot]
    if len({id(count) for count in counts}) < len(counts):
        raise UserError(f"{name} would advance one step count for several parameters after this load: {_ADVICE}")
    counts += [group["step"] for one in inner for group in one.param_groups if group["params"] and "step" in group]
    found = {int(count) for count in counts}
    if step is not None and found != {int(step)}:
        raise UserError(f"{name} has taken {sorted(found)} steps after loading a state of {int(step)}: {_ADVICE}")
    number = -1
    for buffer, ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
        mine = {
            parameter: where for by in ranges.values() for one in by for parameter, where in one["param_map"].items()
        }
        for parameter in buffer.param_index_map:
            number += 1
            if parameter not in mine:
                continue
            own = part._get_main_param_and_optimizer_states(parameter)
            where = mine[parameter]["param"]
            for key in ("param", "exp_avg", "exp_avg_sq"):
                whole = loaded[number]["fp32_param" if key == "param" and "param" not in loaded[number] else key]
                given = whole.flatten()[where.start : where.end]
                if not torch.equal(own[key].detach().flatten().to(given.device, given.dtype), given):
                    raise UserError(f"{name} holds another {key} than the checkpoint after loading it: {_ADVICE}")


_ADVICE = (
    "this state cannot be resumed with it; use the optimizer that wrote it, or go on from the checkpoint's weights "
    "(tools/convert_checkpoint.py) in a new run"
)


def _find(state: Any, name: str) -> Any:
    """The first value under that key, at any depth; None where there is none."""
    if isinstance(state, dict) and name in state:
        return state[name]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return next((found for part in inner if (found := _find(part, name)) is not None), None)


def _over_torch(part: MegatronOptimizer) -> bool:
    return isinstance(part, DistributedOptimizer) and type(part.optimizer).__module__.startswith("torch.")


def _prepare(part: DistributedOptimizer) -> None:
    """Give torch's Adam the state that it otherwise has after its first step only."""
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            if not part.optimizer.state[parameter]:
                part.optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
