"""What thresholds alone do to the entropy of one rollout of the real model: a section of docs/real_model.md."""

from __future__ import annotations

from collections.abc import Sequence

from measurements import OTHERS, Comparison, Measurement, compared  # examples/entropy_study

RESOLVED = 0.5  # percent: a smaller difference is not counted


def authority_section(measurements: Sequence[Measurement]) -> list[str]:
    """Return the section's lines, none if nothing was measured."""
    comparisons = compared(measurements)
    if not comparisons:
        return []
    states = len({(comparison.static.seed, comparison.static.step) for comparison in comparisons})
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
        *(f"- {effects(bound, comparisons)}" for bound in OTHERS),
        "",
        f"| entropy, nats | rewards | passes | static, % | {' | '.join(f'{b} − static' for b in OTHERS)} | clipped |",
        "| --- | --- | --- | --- |" + " --- |" * (len(OTHERS) + 1),
    ]
    for comparison in sorted(comparisons, key=lambda each: (-each.static.entropy, each.setting)):
        static = comparison.static
        added = " | ".join(f"{comparison.added(bound):+.1f}" for bound in OTHERS)
        clipped = f"{100 * static.clipped_high:.1f} %, {100 * static.clipped_low:.1f} %"
        before = f"| {static.entropy:.2f} | {static.rewards} | {static.passes} | {100 * static.shift:+.1f}"
        lines.append(f"{before} | {added} | {clipped} |")
    return [*lines, ""]


def effects(bound: str, comparisons: Sequence[Comparison]) -> str:
    """Return a sentence: in how many rows a threshold raises and lowers entropy, with each kind of rewards."""
    parts = []
    for rewards in dict.fromkeys(comparison.static.rewards for comparison in comparisons):
        added = [comparison.added(bound) for comparison in comparisons if comparison.static.rewards == rewards]
        raised, lowered = sum(x > RESOLVED for x in added), sum(x < -RESOLVED for x in added)
        name = "the task's rewards" if rewards == "task" else "random ones"
        parts.append(f"with {name} it raises entropy in {raised} of {len(added)} rows and lowers it in {lowered}")
    return f"*{bound}*: {'; '.join(parts)} (by more than {RESOLVED} %)."
