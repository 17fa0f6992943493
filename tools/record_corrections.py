"""Record what verl, TRL and AReaL compute as corrections: tools/record_corrections.py [--wheels FOLDER].

Runs the functions in the wheels of these packages on small batches of log-probs, and writes the weights of every token
to tests/unit/objectives/peer_corrections.json, next to the name of the same correction here. The tests compare. The
packages are not installed: their functions are taken out of the modules and run with torch alone. With ``--wheels``,
the wheels are read from a folder; otherwise pip downloads them.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import math
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch
from torch import Tensor
from wheels import Wheel, wheels_of

from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, user_errors_reported

FILE = Path(__file__).resolve().parents[1] / "tests" / "unit" / "objectives" / "peer_corrections.json"
VERSIONS = {"verl": "0.9.1", "trl": "1.16.0", "areal": "1.0.4"}
SEEDS = (1, 2, 3)
NOISE = (0.0004, 0.002, 0.03, 0.1, 0.4, 2.0, 0.2)
"""Standard deviation of ln r in each sequence of a batch: presets keep some of them and leave others out."""

BAND = f"geometric(floor={1 / 1.001!r}, cap={1 / 0.999!r})"  # verl bounds pi_rollout / pi_old
BY_SUM = f"k3(measure=k1, level=sequence, floor={math.log(0.5)!r}, cap={math.log(2.0)!r})"
OF_VERL = {
    "decoupled_token_is": "tis",
    "decoupled_seq_is": "sequence-tis",
    "decoupled_token_icepop": "icepop",
    "decoupled_seq_is_rs": f"{BY_SUM} + sequence-tis",
    "decoupled_geo_rs": BAND,
    "decoupled_geo_rs_seq_tis": f"{BAND} + sequence-tis",
    "decoupled_geo_rs_token_tis": f"{BAND} + tis",
    "decoupled_k3_rs": "k3",
    "decoupled_k3_rs_seq_tis": "k3 + sequence-tis",
    "decoupled_k3_rs_token_tis": "k3 + tis",
}
"""The correction here for each decoupled preset of verl."""
OF_TRL = {
    ("sequence_mask", None, 3.0): "mis",
    ("sequence_mask", 0.5, 3.0): "mis(floor=0.5)",
    ("token_truncate", None, 3.0): "tis(cap=3)",
    ("token_mask", 0.5, 3.0): "icepop(cap=3)",
    ("sequence_truncate", 0.5, 3.0): "sequence-tis(floor=0.5, cap=3)",
}
"""The correction here for modes of TRL's ``vllm_importance_sampling_mode``, with their bounds."""
OF_AREAL = {
    ("token", "mask", "ratio", None, 5.0): "decoupled",
    ("token", "mask", "ratio", 0.5, 5.0): "icepop",
    ("token", "clamp", "ratio", 0.5, 2.0): "tis(floor=0.5)",
}
"""The correction here for AReaL's rejection sampling: level, action, metric and bounds."""
OPSM, M2PO = (0.5, 0.05), (0.04, 0.1)


def definitions(wheel: Wheel, module: str, *names: str, **namespace: Any) -> SimpleNamespace:
    """Run the definitions of a module, found by name in it or in its classes, in a namespace of their own."""
    tree = wheel.module(module)
    if tree is None:
        raise UserError(f"the wheel has no {module}: it has moved, correct tools/record_corrections.py")
    found = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{module} has no {missing[0]}: it has moved, correct tools/record_corrections.py")
    chosen: list[ast.stmt] = [found[name] for name in names]
    for node in chosen:  # decorators for profiling, which the namespace lacks
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    scope = {"__name__": module, "torch": torch, "math": math, "Any": Any, "Optional": Optional, **namespace}
    exec(compile(ast.Module(chosen, []), module, "exec", dont_inherit=True), scope)
    return SimpleNamespace(**scope)


def verl(wheel: Wheel, batch: dict[str, Tensor]) -> list[tuple[str, str, Tensor]]:
    """Every decoupled preset of verl."""
    sums = definitions(wheel, "verl.utils.torch_functional", "masked_sum", "masked_mean")
    module = "verl.trainer.ppo.rollout_corr_helper"
    tree = wheel.module(module)
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)] if tree else []
    text = wheel.text(module.replace(".", "/") + ".py")
    constants: dict[str, Any] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            exec(compile(ast.Module([node], []), module, "exec"), {"math": math}, constants)
    proto = type("DataProto", (), {"from_dict": staticmethod(lambda tensors: SimpleNamespace(batch=tensors))})
    types = dict.fromkeys(("RolloutCorrectionConfig", "PolicyLossConfig"), object)
    helper = definitions(wheel, module, *functions, verl_F=sums, DataProto=proto, **constants, **types)
    config = definitions(
        wheel,
        "verl.trainer.config.algorithm",
        "RolloutCorrectionConfig",
        dataclass=dataclasses.dataclass,
        field=dataclasses.field,
        BaseConfig=object,
    ).RolloutCorrectionConfig
    presets = {name for name in vars(config) if name.startswith("decoupled_")}
    if presets != set(OF_VERL):
        raise UserError(f"verl's presets are {', '.join(sorted(presets))}: correct OF_VERL")
    found = []
    for name, ours in OF_VERL.items():
        preset = getattr(config, name)()
        weights, mask, _ = helper.compute_rollout_correction_and_rejection_mask(
            batch["old"],
            batch["rollout"],
            batch["mask"],
            rollout_is=preset.rollout_is,
            rollout_is_threshold=preset.rollout_is_threshold,
            rollout_rs=preset.rollout_rs,
            rollout_rs_threshold=preset.rollout_rs_threshold,
        )
        found.append((f"verl {name}", ours, (weights.batch["rollout_is_weights"] if weights else 1.0) * mask))
    return found


def trl(wheel: Wheel, batch: dict[str, Tensor]) -> list[tuple[str, str, Tensor]]:
    """TRL's importance sampling, a block of a longer method, and its off-policy mask."""
    module = "trl.trainer.grpo_trainer"
    lines = wheel.text(module.replace(".", "/") + ".py").split("\n")
    first = [i for i, line in enumerate(lines) if "per_token_logps_diff = (old_per_token_logps - sampling" in line]
    last = [i for i, line in enumerate(lines) if "# Compute the per-token log probabilities for the reference" in line]
    if not first or not last:
        raise UserError(f"{module} does not hold the block of importance sampling: correct tools/record_corrections.py")
    block = compile(textwrap.dedent("\n".join(lines[first[0] : last[0]])), module, "exec")
    found = []
    for (mode, low, high), ours in OF_TRL.items():
        settings = {"mode": mode, "clip_min": low, "clip_max": high}
        scope: dict[str, Any] = {
            **{"torch": torch, "math": math, "mask": batch["mask"]},
            **{"old_per_token_logps": batch["old"], "sampling_per_token_logps": batch["rollout"]},
            "self": SimpleNamespace(**{f"vllm_importance_sampling_{name}": value for name, value in settings.items()}),
        }
        exec(block, scope)
        found.append((f"TRL {mode} {low} to {high}", ours, scope["vllm_importance_sampling_ratio"] * batch["mask"]))
    mask = definitions(wheel, module, "get_off_policy_mask").get_off_policy_mask
    for threshold in OPSM:
        kept = mask(batch["advantage"][:, None], batch["current"], batch["rollout"], batch["mask"], threshold)
        found.append((f"TRL off_policy_mask_threshold {threshold}", f"opsm(cap={threshold})", kept * batch["mask"]))
    return found


def areal(wheel: Wheel, batch: dict[str, Tensor]) -> list[tuple[str, str, Tensor]]:
    """AReaL's rejection sampling by token, and its M2PO, which compares all tokens."""
    functional = definitions(
        wheel,
        "areal.utils.functional.functional",
        *("RejectionSamplingResult", "_check_bounds", "apply_rejection_sampling"),
        dataclass=dataclasses.dataclass,
        RejectionSamplingConfig=object,
    )
    found = []
    for (level, action, metric, low, high), ours in OF_AREAL.items():
        config = SimpleNamespace(level=level, action=action, metric=metric, lower=low, upper=high, agg="mean")
        result = functional.apply_rejection_sampling(batch["old"], batch["rollout"], batch["mask"], None, config)
        weights = result.behave_imp_weight * result.loss_mask
        found.append((f"AReaL {action} {low} to {high}", ours, weights))
    second_moment = definitions(wheel, "areal.trainer.ppo.actor", "_apply_m2po_masking", "_get_m2po_loss_mask")
    for threshold in M2PO:
        kept = second_moment._apply_m2po_masking(batch["rollout"], batch["old"], batch["mask"].bool(), threshold)
        ratio = (batch["old"] - batch["rollout"]).exp()
        found.append((f"AReaL m2_threshold {threshold}", f"m2po(cap={threshold})", ratio * kept))
    return found


def batch_of(seed: int) -> dict[str, Tensor]:
    """Log-probs of some sequences, padded: float64 [N, T], with a mask and an advantage per sequence."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 8, (len(NOISE),), generator=generator)
    lengths[4] = 1
    shape = (len(NOISE), int(lengths.max()))

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = (torch.arange(shape[1]) < lengths[:, None]).double()
    old = -(2 * torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1)
    noise = torch.tensor(NOISE, dtype=torch.float64)[:, None]
    rollout, current = (old + noise * normal()).clamp(max=0), (old + 0.3 * normal()).clamp(max=0)
    advantage = torch.randn(len(NOISE), generator=generator, dtype=torch.float64)
    columns = {"old": old, "rollout": rollout, "current": current, "advantage": advantage}
    return {name: (values * 1e5).round() / 1e5 for name, values in columns.items()} | {"mask": mask}


@user_errors_reported
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of downloaded wheels")
    options = parser.parse_args(arguments)
    with wheels_of(VERSIONS, options.wheels) as wheels:
        batches = []
        for batch in map(batch_of, SEEDS):
            chosen = batch["mask"].bool()
            peers = [*verl(wheels["verl"], batch), *trl(wheels["trl"], batch), *areal(wheels["areal"], batch)]
            weights = [
                {"peer": peer, "importance": ours, "weights": _numbers(found.expand_as(chosen)[chosen])}
                for peer, ours, found in peers
            ]
            columns = {name: _numbers(batch[name][chosen]) for name in ("old", "rollout", "current")}
            lengths = chosen.sum(1).tolist()
            batches.append({"lengths": lengths, "advantage": _numbers(batch["advantage"]), **columns, "peers": weights})
    text = json.dumps({"versions": VERSIONS, "batches": batches}, indent=1)
    FILE.write_text(_short(text) + "\n")
    print(f"wrote {FILE}")
    return EXIT_DONE


def _numbers(values: Tensor) -> list[float]:
    return [float(f"{value:.8g}") for value in values.double().tolist()]


def _short(text: str) -> str:
    """JSON with every list of numbers on one line."""
    return re.sub(r"\[[-+.\de,\s]+\]", lambda match: "[" + " ".join(match[0][1:-1].split()) + "]", text)


if __name__ == "__main__":
    sys.exit(main())
