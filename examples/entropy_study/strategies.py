"""What the study runs: every strategy as overrides of examples/quickstart/quickstart.yaml, and the curves to follow.

The names of strategies are those of the archived runs (docs/entropy_study/runs.jsonl), so they must not change.
"""

from __future__ import annotations

from megatron_rlvr.control import EntropyCurve
from megatron_rlvr.control.build import SCHEDULES

SCHEDULE = "algorithm.schedule"
TARGET = [f"{SCHEDULE}.name=target-entropy"]
RISE_FALL = [[0.0, 1.0], [0.4, 1.3], [0.6, 1.3], [1.0, 0.5]]
STEP = [[0.0, 1.0], [0.3, 1.0], [0.301, 0.6], [1.0, 0.6]]
SAW = [[0.0, 1.0], [0.2, 1.2], [0.22, 0.9], [0.42, 1.1], [0.44, 0.85], [0.66, 1.0], [0.68, 0.8], [1.0, 0.95]]
DRAWN = {
    "rise-fall": EntropyCurve("piecewise", points=RISE_FALL),
    "constant": EntropyCurve("constant"),
    "linear": EntropyCurve("linear", end=0.4),
    "step": EntropyCurve("piecewise", points=STEP),
    "saw": EntropyCurve("piecewise", points=SAW),
}


def _piecewise(points: list[list[float]]) -> list[str]:
    return [f"{SCHEDULE}.curve=piecewise", f"{SCHEDULE}.points={points}".replace(" ", "")]


DRAWN_OVERRIDES = {
    "rise-fall": _piecewise(RISE_FALL),
    "constant": [],
    "linear": [f"{SCHEDULE}.curve=linear", f"{SCHEDULE}.end=0.4"],
    "step": _piecewise(STEP),
    "saw": _piecewise(SAW),
}
# Other methods that follow a curve, on the same curves: schedule, then curve.
FOLLOWERS = ("entrocraft", "entropic")
FOLLOWER_RUNS = {
    f"{schedule}-{curve}": [f"{SCHEDULE}.name={schedule}", *overrides]
    for schedule in FOLLOWERS
    for curve, overrides in DRAWN_OVERRIDES.items()
}
CURVES = {f"{method}-{curve}": drawn for method in ("target", *FOLLOWERS) for curve, drawn in DRAWN.items()}
# Thresholds alone, chosen by the controller so that entropy follows the course of increase-then-decrease.
CLOSED = {"closed-id": [f"{SCHEDULE}.name=closed-increase-then-decrease"]}
CLOSED_CURVE = EntropyCurve("piecewise", points=SCHEDULES["closed-increase-then-decrease"][1]["points"])

OBJECTIVES = ("ce-gppo", "sapo", "dppo", "erc")
"""Other methods that change the objective."""
STRATEGIES: dict[str, list[str]] = {
    "grpo": [f"{SCHEDULE}.name=constant"],
    "clip-higher": [f"{SCHEDULE}.name=clip-higher"],
    "upper-only": [
        f"{SCHEDULE}.name=constant",
        f"{SCHEDULE}.upper_intercept=0.5",
        f"{SCHEDULE}.upper_slope=-0.25",
    ],
    "lower-only": [
        f"{SCHEDULE}.name=constant",
        f"{SCHEDULE}.lower_intercept=0.3",
        f"{SCHEDULE}.lower_slope=-0.13",
    ],
    "id": [f"{SCHEDULE}.name=increase-then-decrease"],
    "did": [f"{SCHEDULE}.name=decrease-increase-decrease"],
    "od": [f"{SCHEDULE}.name=oscillatory-decay"],
    **{f"target-{curve}": [*TARGET, *overrides] for curve, overrides in DRAWN_OVERRIDES.items()},
    "floor": [f"{SCHEDULE}.name=entropy-floor"],
    **{objective: [f"{SCHEDULE}.name=constant", f"algorithm.objective.name={objective}"] for objective in OBJECTIVES},
}
STEEP = [f"{SCHEDULE}.upper_intercept=3.0", f"{SCHEDULE}.upper_slope=-2.8"]
THRESHOLDS = {
    "static": STRATEGIES["grpo"],
    "upper": STRATEGIES["upper-only"],
    "steep": [f"{SCHEDULE}.name=constant", *STEEP],
    "lower": STRATEGIES["lower-only"],
    "id": STRATEGIES["id"],
    "id-steep": [*STRATEGIES["id"], *STEEP],
    **CLOSED,
}
# Settings in which thresholds act on more tokens: more updates per rollout, and rewards without a learning signal.
SETTINGS = {
    "4 passes": ["algorithm.epochs=4"],
    "coin, 4 passes": ["algorithm.epochs=4", "verifier.name=coin:toss", "data.heldout=null"],
}
# setting -> label of the thresholds -> strategy
REGIMES = {
    setting: {label: f"{setting.replace(', ', '-').replace(' ', '-')}-{label}" for label in THRESHOLDS}
    for setting in SETTINGS
}
REGIME_RUNS = {
    name: [*THRESHOLDS[label], *SETTINGS[setting]]
    for setting, names in REGIMES.items()
    for label, name in names.items()
}
OPEN_AND_CLOSED = {
    "2 passes": {"static": "grpo", "id": "id", "closed-id": "closed-id"},
    **{setting: {label: names[label] for label in ("static", "id", "closed-id")} for setting, names in REGIMES.items()},
}
"""setting -> label -> strategy: static clipping, the schedule in open loop, and the same in closed loop."""
# Each of these takes six times as long as a run of 32 steps.
LONG_STEPS = 200
LONG = {
    f"long-{name}": (STRATEGIES | FOLLOWER_RUNS)[name]
    for name in (
        *("grpo", "clip-higher", "upper-only", "lower-only", "id", "did", "od", "floor", "target-linear"),
        *OBJECTIVES,
        *(f"{method}-linear" for method in FOLLOWERS),
    )
}
CURVES |= {name: CURVES[base] for name in LONG if (base := name.removeprefix("long-")) in CURVES}
SPLITS = {f"id-split-{split}": [*STRATEGIES["id"], f"{SCHEDULE}.split={split}"] for split in (0.3, 0.4, 0.6)}
SPLIT_LABELS = {"0.3": "id-split-0.3", "0.4": "id-split-0.4", "0.5": "id", "0.6": "id-split-0.6"}
FAMILIES = (STRATEGIES, CLOSED, FOLLOWER_RUNS, SPLITS, REGIME_RUNS, LONG)
EVERYTHING = STRATEGIES | CLOSED | FOLLOWER_RUNS | SPLITS | REGIME_RUNS | LONG
COMMON = [
    "threads=1",
    "optimizer.learning_rate=1e-4",
    "model.path=examples/quickstart/base_model",
    "data.train=runs/study/data/train.jsonl",
    "data.heldout=runs/study/data/heldout.jsonl",
    "data.stratify_key=kind",
    "rollout.prompts_per_step=128",
    "rollout.samples_per_prompt=8",
    "algorithm.epochs=2",
    "evaluation.prompts=128",
    "evaluation.samples=64",
    "checkpoint.keep=4",
    "checkpoint.export_huggingface=false",
    "telemetry.plots=false",
    "telemetry.tensorboard=false",
]


def steps_of(name: str, steps: int) -> int:
    """The number of steps of a strategy's runs, in a study whose ordinary runs have ``steps``."""
    return LONG_STEPS if name in LONG else steps
