import os
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_run import evaluations, records, write_run

from megatron_rlvr.control import AffineThreshold, ClipThresholds
from megatron_rlvr.telemetry.comparison import comparison_table, group_runs
from megatron_rlvr.telemetry.panels import curves, panels, phases
from megatron_rlvr.telemetry.plots import moving_mean, plot_groups, plot_run
from megatron_rlvr.telemetry.runs import RunGroup
from tests.processes import DEADLINE_SECONDS

ROOT = Path(__file__).resolve().parents[3]


def panel(groups, name):
    return next(p for p in panels(groups) if p.name == name)


def test_a_run_is_plotted_into_png_files(tmp_path):
    paths = plot_run(write_run(tmp_path / "run"), "study")
    assert [p.name for p in paths] == [
        "overview.png", "entropy.png", "reward.png", "heldout.png", "thresholds.png", "clip_fractions.png",
        "regions.png", "entropy_change.png", "length.png", "grad_norm.png", "kl_rollout.png",
    ]  # fmt: skip
    assert all(p.parent == tmp_path / "run" / "plots" and p.read_bytes()[:4] == b"\x89PNG" for p in paths)


def test_panels_without_values_are_left_out(tmp_path):
    bare = [{"step": step, "reward": 0.5, "entropy": 0.3} for step in range(3)]
    paths = plot_groups([RunGroup("bare", [bare], [[]])], "bare", tmp_path)
    assert [p.name for p in paths] == ["overview.png", "entropy.png", "reward.png"]


def test_clip_bounds_follow_the_closed_form():
    group = RunGroup("study", [records()], [evaluations()])
    bounds = {curve.series.label: curve for curve in curves(group, panel([group], "thresholds"))}
    # arXiv 2602.09782: 1.5 -> 1.2 at the full upper threshold, 0.70 -> 0.805 at the full lower one.
    assert bounds["upper, p = 0"].mean[0] == pytest.approx(1.5) and bounds["upper, p = 1"].mean[0] == pytest.approx(1.2)
    assert bounds["lower, p = 0"].mean[-1] == pytest.approx(0.7)
    assert bounds["lower, p = 1"].mean[-1] == pytest.approx(
        ClipThresholds(AffineThreshold(0.3, -0.13)).ratio_bounds(1)[0]
    )


def test_phases_follow_from_the_threshold_slopes():
    assert list(phases(records())) == [(0, 5, "upper relaxed"), (6, 11, "lower relaxed")]
    static = [{"step": s, "clip/upper_slope": 0.0, "clip/lower_slope": 0.0} for s in range(4)]
    assert list(phases(static)) == [(0, 3, "static")]


def test_predicted_entropy_change_is_scaled_and_keeps_its_sign():
    run = [
        {"step": s, "entropy_change/predicted": p, "entropy_change/measured": m}
        for s, (p, m) in enumerate([(-40.0, 0.03), (30.0, 0.04)])
    ]
    group = RunGroup("study", [run], [[]])
    predicted, measured = curves(group, panel([group], "entropy_change"))
    assert predicted.mean == pytest.approx([-0.04, 0.03]) and measured.mean == [0.03, 0.04]
    assert predicted.series.label == "predicted × 0.001"


def test_group_has_mean_and_range_over_the_steps_of_all_its_runs():
    runs = [[{"step": s, "entropy": value + s} for s in range(n)] for value, n in ((1.0, 4), (2.0, 4), (6.0, 3))]
    group = RunGroup("three", runs, [[], [], []])
    [curve] = curves(group, panel([group], "entropy"))
    assert (curve.steps, curve.mean, curve.low, curve.high) == ([0, 1, 2], [3, 4, 5], [1, 2, 3], [6, 7, 8])


def test_runs_are_grouped_by_seed_and_labelled_by_different_settings(tmp_path):
    directories = [write_run(tmp_path / f"{k}{s}", s, k) for k in ("id", "constant") for s in range(3)]
    groups = group_runs(directories)
    assert [g.label for g in groups] == ["study: schedule.name=id", "study: schedule.name=constant"]
    assert [len(g.runs) for g in groups] == [3, 3] and groups[0].runs[1] == records(1)
    other = group_runs([directories[0], write_run(tmp_path / "other", 0, "did", name="long")])
    assert [g.label for g in other] == ["study", "long"]


def test_comparison_table_has_mean_and_range(tmp_path):
    table = comparison_table(group_runs([write_run(tmp_path / str(s), s) for s in range(3)]))
    rows = {str(a): str(b) for a, b in zip(*(column.cells for column in table.columns), strict=True)}
    ends = [records(s)[-1]["entropy"] for s in range(3)]
    assert rows["entropy, end"] == f"{sum(ends) / 3:.4g} [{min(ends):.4g}, {max(ends):.4g}]"
    assert rows["pass@16, before"] == "0.86 [0.86, 0.86]"


def plot_run_tool(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "plot_run.py", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )


def test_tool_compares_runs(tmp_path):
    runs = [write_run(tmp_path / kind, 0, kind) for kind in ("id", "constant")]
    done = plot_run_tool(*runs, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "overview.png").is_file() and "entropy, end" in done.stdout


@pytest.mark.parametrize(
    "break_run, message",
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "no metrics at"),
        (lambda run: (run / "metrics.jsonl").write_text("{}\n"), "line 1"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "no step is recorded yet"),
        (lambda run: (run / "config.yaml").write_text("a: [1\n"), "is not a configuration"),
    ],
)
def test_user_errors_are_one_line_and_exit_status_2(tmp_path, break_run, message):
    run = write_run(tmp_path / "run")
    break_run(run)
    done = plot_run_tool(run)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr and done.stdout == ""


def test_rounding_noise_is_drawn_as_a_constant():
    noise = [{"step": step, "kl_rollout": 1e-13 * (-1) ** step, "grad_norm": 0.1 + 1e-14 * step} for step in range(5)]
    group = RunGroup("noise", [noise], [[]])
    [kl] = curves(group, panel([group], "kl_rollout"))
    [norm] = curves(group, panel([group], "grad_norm"))
    assert kl.mean == [0.0] * 5 and norm.mean == norm.low == norm.high == [0.1] * 5
    small = [{"step": step, "kl_rollout": 1e-9 * step} for step in range(5)]
    [kl] = curves(RunGroup("small", [small], [[]]), panel([group], "kl_rollout"))
    assert kl.mean == [1e-9 * step for step in range(5)]


def test_the_entropy_of_one_run_has_a_band_of_its_standard_error():
    run = [{"step": step, "entropy": 1.0 + step, "entropy_standard_error": 0.25} for step in range(3)]
    del run[2]["entropy_standard_error"]
    group = RunGroup("one", [run], [[]])
    [curve] = curves(group, panel([group], "entropy"))
    assert (curve.low, curve.mean, curve.high) == ([0.75, 1.75, 3.0], [1.0, 2.0, 3.0], [1.25, 2.25, 3.0])
    group = RunGroup("two", [run, run], [[], []])
    [curve] = curves(group, panel([group], "entropy"))
    assert curve.low == curve.mean == curve.high


def test_other_file_types_and_smoothing(tmp_path):
    run = [{"step": step, "reward": float(step % 2)} for step in range(6)]
    for file_type, start in (("pdf", b"%PDF"), ("svg", b"<?xml")):
        paths = plot_groups([RunGroup("run", [run], [[]])], "run", tmp_path, file_type, smooth=2)
        assert [p.name for p in paths] == [f"overview.{file_type}", f"reward.{file_type}"]
        assert all(p.read_bytes().startswith(start) for p in paths)
    assert moving_mean([0.0, 1.0, 0.0, 2.0], 2) == [0.0, 0.5, 0.5, 1.0]
    assert moving_mean([3.0, 1.0, 0.5], 1) == [3.0, 1.0, 0.5]
