"""The study's figures, as small PNG files."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from measurements import OTHERS, PASSES, RATES, REWARDS, Measurement, by_setting
from results import KS, Run, Runs

from megatron_rlvr.control import EntropyCurve
from megatron_rlvr.telemetry.plots import COLOURS, STYLES

DOTS_PER_INCH = 75
MARKS = "os^DvP"  # one for every seven strategies of the frontier


def tracking(runs: Runs, curves: dict[str, EntropyCurve], path: Path) -> None:
    """Entropy relative to step 0, with the target curve and GRPO; mean and range over seeds."""
    figure, axes = plt.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.2), sharey=True, squeeze=False)
    for ax, name in zip(axes[0], curves, strict=True):
        for label, colour in (("grpo", COLOURS[6]), (name, COLOURS[0])):
            _band(ax, list(runs.get(label, {}).values()), label, colour, "entropy", relative=True)
        total = len(next(iter(runs[name].values())).steps)
        x = range(total)
        target = [curves[name].value(k / total, 1.0) for k in x]
        ax.plot(x, target, color=COLOURS[1], linestyle="--", label="target")
        ax.set_title(name)
        ax.set_xlabel("step")
        ax.legend(fontsize=8)
    axes[0][0].set_ylabel("entropy / entropy at step 0")
    _save(figure, path)


def courses(runs: Runs, strategies: Sequence[str], path: Path) -> None:
    """Entropy, reward and gradient norm of every strategy; mean over seeds."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6))
    panels = (("entropy", "entropy, nats per token"), ("reward", "reward"), ("grad_norm", "gradient norm"))
    for ax, (metric, title) in zip(axes, panels, strict=True):
        for i, name in enumerate(s for s in strategies if runs.get(s)):
            colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS)]
            _band(ax, list(runs[name].values()), name, colour, metric, style=style, band=False)
        ax.set_title(title)
        ax.set_xlabel("step")
    axes[0].legend(fontsize=7, ncols=2)
    _save(figure, path)


def pass_at_k(runs: Runs, strategies: Sequence[str], steps: Sequence[int], path: Path) -> None:
    """pass@k over k after each of ``steps``; mean over seeds."""
    figure, axes = plt.subplots(1, len(steps), figsize=(5 * len(steps), 3.6), sharey=True)
    for ax, step in zip(axes, steps, strict=True):
        for i, name in enumerate(s for s in strategies if runs.get(s)):
            means = [statistics.mean(run.pass_at(k, step) for run in runs[name].values()) for k in KS]
            ax.plot(KS, means, color=COLOURS[i % 7], linestyle=STYLES[i // 7], marker=".", label=name)
        ax.set_xscale("log", base=2)
        ax.set_title(f"after step {step}")
        ax.set_xlabel("k")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("pass@k, held-out")
    axes[0].legend(fontsize=7, ncols=2)
    _save(figure, path)


def frontier(runs: Runs, strategies: Sequence[str], total: int, path: Path) -> None:
    """pass@16 against pass@1 at the end, mean and standard deviation over seeds, with GRPO's course to its end."""
    figure, ax = plt.subplots(figsize=(8, 4.6))
    if runs.get("grpo"):
        course = [_point(list(runs["grpo"].values()), step) for step in (0, total // 2, total)]
        ax.plot([p[0] for p in course], [p[1] for p in course], color=COLOURS[6], linestyle=":", label="grpo's course")
    for i, name in enumerate(s for s in strategies if runs.get(s)):
        mean1, mean16, spread1, spread16 = _point(list(runs[name].values()), total)
        ax.errorbar(mean1, mean16, spread16, spread1, fmt=MARKS[i // 7], color=COLOURS[i % 7], label=name, capsize=2)
    ax.set_xlabel("pass@1 at the end")
    ax.set_ylabel("pass@16 at the end")
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    ax.grid(alpha=0.3)
    _save(figure, path)


def authority(measurements: Sequence[Measurement], path: Path) -> None:
    """Entropy change under each threshold minus that under static clipping, by passes; mean over states."""
    figure, axes = plt.subplots(1, len(REWARDS), figsize=(5 * len(REWARDS), 3.4), sharey=True)
    settings = by_setting(measurements)
    for ax, rewards in zip(axes, REWARDS, strict=True):
        for i, bound in enumerate(OTHERS):
            for style, rate in zip(STYLES, RATES, strict=False):
                each = [[c.added(bound) for c in settings[rewards, rate, passes]] for passes in PASSES]
                means = list(map(statistics.mean, each))
                ax.plot(PASSES, means, color=COLOURS[i], linestyle=style, marker=".", label=f"{bound}, {rate:g}")
        ax.axhline(0.0, color="black", linewidth=0.6)
        ax.set_xscale("log", base=2)
        ax.set_xlabel("passes over the rollout")
        ax.set_title("rewards of the task" if rewards == "task" else "random rewards (coin)")
    axes[0].set_ylabel("entropy change minus static clipping's, %")
    axes[0].legend(fontsize=7)
    _save(figure, path)


def _band(
    ax: Any, runs: Sequence[Run], label: str, colour: str, metric: str, *, relative=False, style="-", band=True
) -> None:
    if not runs:
        return
    each = [[r[metric] / (run.steps[0][metric] if relative else 1.0) for r in run.steps] for run in runs]
    columns = list(zip(*each, strict=False))
    ax.plot([statistics.mean(c) for c in columns], color=colour, linestyle=style, label=label, linewidth=1.4)
    if band:
        ax.fill_between(
            range(len(columns)), [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2
        )


def _point(runs: Sequence[Run], step: int) -> tuple[float, float, float, float]:
    values = {k: [run.pass_at(k, step) for run in runs] for k in (1, 16)}
    deviation = {k: statistics.stdev(v) if len(v) > 1 else 0.0 for k, v in values.items()}
    return statistics.mean(values[1]), statistics.mean(values[16]), deviation[1], deviation[16]


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
    plt.close(figure)
