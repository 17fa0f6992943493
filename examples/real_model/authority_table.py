"""What thresholds alone do to the entropy of one rollout of the real model: a section of docs/real_model.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from measurements import BOUNDS, Measurement  # examples/entropy_study

OTHERS = tuple(bound for bound in BOUNDS if bound != "static")
RESOLVED = 0.5  # percent: a smaller difference is not counted

Case = tuple[int, int, str, int]
"""Seed, step, rewards, passes."""


def authority_section(measurements: Sequence[Measurement]) -> list[str]:
    """Return the section's lines, none if nothing was measured."""
    cases: dict[Case, dict[str, Measurement]] = defaultdict(dict)
    for m in measurements:
        cases[m.seed, m.step, m.rewards, m.passes][m.bound] = m
    complete = {case: of_bound for case, of_bound in cases.items() if of_bound.keys() == BOUNDS.keys()}
    if not complete:
        return []
    states = len({case[:2] for case in complete})
    lines = [
        "### What thresholds alone do to a step",
        "",
        f"From each of {states} saved states (weights and Adam's moments), one rollout is trained on under each of "
        "four constant thresholds, as in the "
        "[entropy study](entropy_study.md#what-thresholds-alone-can-do-to-a-step): static, the default dynamic *upper* "
        "and *lower* thresholds, and *steep* (slope −2.8, intercept 3.0). *static* is the change of ln entropy on the "
        "rollout's own tokens, in percent; the next columns are what the other thresholds add to it. With *coin* "
        "rewards, which are random, there is nothing to learn. *Clipped* is the share of tokens that static clipping "
        "clips at the upper and at the lower bound.",
        "",
        *(f"- {effects(bound, complete)}" for bound in OTHERS),
        "",
        f"| entropy, nats | rewards | passes | static, % | {' | '.join(f'{b} − static' for b in OTHERS)} | clipped |",
        "| --- | --- | --- | --- |" + " --- |" * (len(OTHERS) + 1),
    ]
    for case, of_bound in sorted(complete.items(), key=lambda item: (-item[1]["static"].entropy, item[0])):
        static = of_bound["static"]
        added = " | ".join(f"{difference(of_bound, bound):+.1f}" for bound in OTHERS)
        clipped = f"{100 * static.clipped_high:.1f} %, {100 * static.clipped_low:.1f} %"
        lines.append(
            f"| {static.entropy:.2f} | {case[2]} | {case[3]} | {100 * static.shift:+.1f} | {added} | {clipped} |"
        )
    return [*lines, ""]


def difference(of_bound: Mapping[str, Measurement], bound: str) -> float:
    """Return what a threshold adds to the change of ln entropy under static clipping, in percent."""
    return 100 * (of_bound[bound].shift - of_bound["static"].shift)


def effects(bound: str, cases: Mapping[Case, Mapping[str, Measurement]]) -> str:
    """Return a sentence: in how many cases a threshold raises and lowers entropy, with each kind of rewards."""
    parts = []
    for rewards in dict.fromkeys(case[2] for case in cases):
        added = [difference(of_bound, bound) for case, of_bound in cases.items() if case[2] == rewards]
        raised, lowered = sum(x > RESOLVED for x in added), sum(x < -RESOLVED for x in added)
        name = "the task's rewards" if rewards == "task" else "random ones"
        parts.append(f"with {name} it raises entropy in {raised} of {len(added)} rows and lowers it in {lowered}")
    return f"*{bound}*: {'; '.join(parts)} (by more than {RESOLVED} %)."
