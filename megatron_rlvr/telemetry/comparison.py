"""Comparison of runs: groups of runs that differ only in their seed, labelled by the settings in which they differ."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.table import Table
from rich.text import Text

from megatron_rlvr.checked_yaml import read_yaml
from megatron_rlvr.telemetry.metrics import Record
from megatron_rlvr.telemetry.runs import RunGroup, load_run

# Settings in which runs of one group may differ.
IGNORED_KEYS = ("seed", "name", "run_directory")


def group_runs(run_directories: Sequence[str | os.PathLike[str]]) -> list[RunGroup]:
    """Group runs whose configurations are equal except for seed, name and directory; groups in order of first runs.

    A group is labelled with the name of its first run. Groups with the same name are also labelled with the settings in
    which they differ.

    Raises:
        UserError: when a directory holds no metrics, or its configuration cannot be read.
    """
    directories_by_key: dict[str, list[Path]] = {}
    settings: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    for directory in map(Path, run_directories):
        config = _flat_config(directory)
        kept = {key: value for key, value in config.items() if key not in IGNORED_KEYS}
        # Whether a run without a configuration repeats another is unknown, so it is a group of its own.
        key = json.dumps(kept, sort_keys=True, default=str) if config else str(directory)
        directories_by_key.setdefault(key, []).append(directory)
        settings.setdefault(key, kept)
        names.setdefault(key, str(config.get("name") or directory.name))
    groups = []
    for key, directories in directories_by_key.items():
        label = names[key]
        namesakes = [settings[other] for other in directories_by_key if names[other] == label]
        if len(namesakes) > 1:
            changed = sorted(
                k for k in set().union(*namesakes) if any(n.get(k) != namesakes[0].get(k) for n in namesakes)
            )
            label += (
                ": " + ", ".join(f"{_short(k)}={settings[key].get(k)}" for k in changed) if changed else f" ({key})"
            )
        loaded = [load_run(directory) for directory in directories]
        groups.append(RunGroup(label, [records for records, _ in loaded], [evaluations for _, evaluations in loaded]))
    return groups


def comparison_table(groups: Sequence[RunGroup]) -> Table:
    """One row per result, one column per group: the mean over the runs and, in brackets, the lowest and highest."""
    table = Table(title=Text("Mean over runs [lowest, highest]"), title_justify="left", title_style="bold")
    table.add_column("")
    for group in groups:
        count = len(group.runs)
        table.add_column(Text(f"{group.label}\n{count} run{'s' if count > 1 else ''}"), justify="right")
    results = [[_results(*pair) for pair in _pairs(group)] for group in groups]
    for name in dict.fromkeys(name for group in results for run in group for name in run):
        table.add_row(Text(name), *(Text(_spread([run[name] for run in group if name in run])) for group in results))
    return table


def _results(records: list[Record], evaluations: list[Record]) -> dict[str, float]:
    """The results of a run by row label."""
    results: dict[str, float] = {"last step": records[-1]["step"]} if records else {}
    entropies = [record["entropy"] for record in records if "entropy" in record]
    if entropies:
        results |= {"entropy, start": entropies[0], "entropy, peak": max(entropies), "entropy, end": entropies[-1]}
    if evaluations:
        for name in sorted((n for n in evaluations[-1] if n.startswith("pass@")), key=lambda n: int(n[5:])):
            if len(evaluations) > 1 and name in evaluations[0]:
                results[f"{name}, before"] = evaluations[0][name]
            results[f"{name}, after"] = evaluations[-1][name]
    for name in ("clip/fraction_high", "clip/fraction_low", "time/step"):
        values = [record[name] for record in records if name in record]
        if values:
            results[f"{name}, mean"] = math.fsum(values) / len(values)
    return results


def _flat_config(run_directory: Path) -> dict[str, Any]:
    """The resolved configuration by dotted key. Empty when the directory has none."""
    file = run_directory / "config.yaml"
    if not file.is_file():
        return {}
    tree = OmegaConf.to_container(read_yaml(file))
    flat: dict[str, Any] = {}

    def flatten(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                flatten(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = value

    flatten("", tree)
    return flat


def _short(key: str) -> str:
    return ".".join(key.split(".")[-2:])


def _pairs(group: RunGroup) -> list[tuple[list[Record], list[Record]]]:
    return list(zip(group.runs, group.evaluations or [[] for _ in group.runs], strict=True))


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = f"{math.fsum(values) / len(values):.4g}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.4g}, {max(values):.4g}]"
