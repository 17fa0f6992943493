"""What a step measures per source of training problems, if ``data.train`` has several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_rlvr.data import MixtureSampler
from megatron_rlvr.rollout.groups import Group


class SourceMetrics:
    """Metrics ``source/<name>/*`` of a step, from sums over the groups of all ranks.

    Args:
        names: of the sources, in the order of their weights.
        sampler: draws the prompts of a step.
    """

    def __init__(self, names: Sequence[str], sampler: MixtureSampler) -> None:
        self._names, self._sampler = names, sampler

    def sums(self, groups: Sequence[Group]) -> dict[str, float]:
        """Return the sums over `groups`, with the same names on every process."""
        sums = {f"source/{name}/{what}": 0.0 for name in self._names for what in ("prompts", "reward", "tokens")}
        for group in groups:
            prefix = f"source/{self._names[self._sampler.source(group.example)]}"
            sums[f"{prefix}/prompts"] += 1
            sums[f"{prefix}/reward"] += sum(verdict.reward for verdict in group.verdicts)
            sums[f"{prefix}/tokens"] += sum(len(completion.token_ids) for completion in group.completions)
        return sums

    def metrics(self, step: int, total: Mapping[str, float], group_size: int) -> dict[str, float]:
        """Return the metrics of a step. A source without prompts in the step has no reward and no length.

        Args:
            step: training step, from 0.
            total: `sums`, added over all ranks.
            group_size: completions of a prompt.
        """
        prompts = sum(total[f"source/{name}/prompts"] for name in self._names)
        metrics: dict[str, float] = {}
        for name, epochs in zip(self._names, self._sampler.epochs(step + 1), strict=True):
            prefix = f"source/{name}"
            own = total[f"{prefix}/prompts"]
            metrics |= {f"{prefix}/prompts_fraction": own / prompts, f"{prefix}/epochs": epochs}
            if own:
                metrics[f"{prefix}/reward"] = total[f"{prefix}/reward"] / (own * group_size)
                metrics[f"{prefix}/response_length"] = total[f"{prefix}/tokens"] / (own * group_size)
        return metrics
