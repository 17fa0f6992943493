"""docs/real_model.md and its picture come from the archive of runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import archive
import figure
import measurements
import results_page
from authority_table import authority_section
from measurements import Measurement
from results import Run

from megatron_rlvr.config import load_config
from megatron_rlvr.control import build_schedule


def run(name: str, seed: int, steps: int = 16, error: float = 0.0) -> Run:
    """A run whose entropy lies above the drawn curve by a share of `error`; its other metrics depend on the seed."""
    config = load_config(Path(results_page.__file__).with_name("real_model.yaml"))
    curve = build_schedule(config.algorithm.schedule, steps).curve  # type: ignore[attr-defined]
    records = [
        {
            "step": step,
            "entropy": curve.value(step / steps, 4.0) * (1.0 + error * (step > 0)),
            "entropy_standard_error": 0.04,
            "reward": 0.25 + 0.01 * step + 0.1 * seed,
            "grad_norm": 1.0,
            "mixed_groups_fraction": 0.5,
            "lr": 1e-6,
            "clip/fraction_high": 0.1,
            "clip/fraction_low": 0.2,
            "entropy_change/predicted": float(step % 5),
            "entropy_change/measured": float(step % 5) * 2,
        }
        | ({"control/target": curve.value(step / steps, 4.0)} if name != figure.STATIC else {})
        for step in range(steps)
    ]
    scores = {"pass@1": 0.3, "pass@8": 0.9, "pass@16": 1.0, "distinct_solutions": 5.0 + seed}
    return Run(name, seed, records, [{"step": step, **scores} for step in (0, steps // 2, steps)])


def test_the_tables_show_every_seed(tmp_path: Path) -> None:
    runs = {
        figure.STATIC: {seed: run(figure.STATIC, seed, error=-0.3) for seed in (0, 1, 2)},
        figure.DRAWN: {seed: run(figure.DRAWN, seed, error=0.01 * (seed + 1)) for seed in (0, 1, 2)},
        "late-fall": {5: run("late-fall", 5, error=0.04)},
        f"beginnings: {figure.STATIC}": {3: run(figure.STATIC, 3, error=-0.2)},
        f"beginnings: {figure.DRAWN}": {3: run(figure.DRAWN, 3, error=0.07)},
        f"sums: {figure.STATIC}": {4: run(figure.STATIC, 4)},  # a task without its other run
    }
    for name, of_seed in runs.items():
        runs[name] = {seed: replace(each, strategy=name) for seed, each in of_seed.items()}
    archive.write(tmp_path / "runs.jsonl", runs, results_page.METRICS)
    text = results_page.tables(archive.read(tmp_path / "runs.jsonl"))
    assert "16 steps. Mean" in text and "| seeds | 0, 1, 2 | 0, 1, 2 |" in text
    assert "**1.0, 2.0, 3.0 %** under target entropy" in text and "30.0, 30.0, 30.0 %" in text
    assert "| reward at the start | 0.350 ± 0.100 | 0.350 ± 0.100 |" in text
    assert "| held-out distinct right answers of 16, end | 6.00 ± 1.00 | 6.00 ± 1.00 |" in text
    assert "| late-fall | 5 | 4.0 % |" in text
    assert f"| sums: {figure.STATIC} | 4 |  | 4.00 |" in text and "### On the task `sums`" not in text
    # Static clipping is compared with the curve of its own task.
    assert "### On the task `beginnings`" in text and "| seeds | 3 | 3 |" in text
    assert "**7.0 %** under target entropy. Static clipping is 20.0 % away from the curve." in text
    assert "correlation over steps | 1.00 ± 0.00 |" in text


def test_the_page_keeps_what_people_wrote() -> None:
    runs = {name: {0: run(name, 0)} for name in figure.NAMES}
    written = f"# Title\n\n{results_page.BEGIN}old\n{results_page.END}\n## After\n"
    once = results_page.page(written, runs)
    assert once.startswith("# Title\n") and once.endswith("\n## After\n") and "old" not in once
    assert results_page.page(once, runs) == once


def test_the_effects_of_thresholds_are_compared_state_by_state() -> None:
    added = {"static": 0.0, "upper": -0.03, "steep": -0.06, "lower": 0.002}
    rows = [
        Measurement(0, step, rewards, 2.5e-6, bound, 1, entropy, -0.01 + sign * added[bound], 0.07, 0.2)
        for step, entropy, sign in ((9, 1.0, -1.0), (1, 4.0, 1.0))
        for rewards in ("task", "coin")
        for bound in added
    ]
    lines = authority_section(rows[:-1])  # the last case is not complete: its row is left out
    assert "each of 2 saved states" in "\n".join(lines)
    assert lines[-4:-1] == [
        "| 4.00 | task | 1 | -1.0 | -3.0 | -6.0 | +0.2 | 7.0 %, 20.0 % |",
        "| 1.00 | coin | 1 | -1.0 | +3.0 | +6.0 | -0.2 | 7.0 %, 20.0 % |",
        "| 1.00 | task | 1 | -1.0 | +3.0 | +6.0 | -0.2 | 7.0 %, 20.0 % |",
    ]
    words = "with the task's rewards it raises entropy in 1 of 2 rows and lowers it in 1; with random ones"
    assert any(line.startswith("- *upper*: " + words) for line in lines)
    assert any("*lower*" in line and "raises entropy in 0 of 2 rows and lowers it in 0" in line for line in lines)
    assert authority_section([]) == []


def test_the_page_is_up_to_date() -> None:
    written = results_page.PAGE.read_text(encoding="utf-8")
    runs, measured = archive.read(results_page.ARCHIVE), measurements.read(results_page.AUTHORITY)
    assert results_page.page(written, runs, measured) == written, "run python examples/real_model/results_page.py"
