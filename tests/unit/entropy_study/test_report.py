"""The study's report on synthetic runs: its numbers, its verdicts, and that every section is written."""

import csv
import math
import random
from dataclasses import asdict
from pathlib import Path

import archive
import measurements
import pytest
import report
import results
import strategies
import study
from coin import toss

from megatron_rlvr.config import load_config

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart" / "quickstart.yaml"
TOTAL = 20


def synthetic_run(strategy, seed, *, final=0.5, mid64=0.8, noise=0.001):
    """A run whose entropy falls linearly to ``final`` times its start."""
    rng = random.Random(f"{strategy} {seed}")
    steps = [
        {
            "step": k,
            "entropy": 0.4 * (1 + (final - 1) * k / TOTAL) + rng.gauss(0, noise),
            "entropy_standard_error": 0.004,
            "reward": 0.3,
            "grad_norm": 0.2,
            "clip/fraction_high": 0.01,
            "clip/fraction_low": 0.02,
            "entropy_change/predicted": -0.1 * k,
            "entropy_change/measured": -0.05 * k + rng.gauss(0, 0.01),
            "lr": 1e-4,
        }
        for k in range(TOTAL)
    ]
    at = {0: (0.3, 0.9), TOTAL // 2: (0.4, mid64 + rng.gauss(0, noise)), TOTAL: (0.5, 0.7 + rng.gauss(0, noise))}
    evaluations = [
        {"step": step, **{f"pass@{k}": low + (high - low) * math.log2(k) / 6 for k in results.KS}}
        for step, (low, high) in at.items()
    ]
    return results.Run(strategy, seed, steps, evaluations)


def synthetic_measurements():
    """Three states in which an upper bound raises entropy by about 1 % per pass, and a lower bound does nothing."""
    change_per_pass = {"static": 0.0, "upper": 0.01, "steep": 0.02, "lower": 0.0}
    return [
        measurements.Measurement(seed, 8, rewards, rate, bound, passes, 0.3, shift, 0.01, 0.02)
        for seed in range(3)
        for rewards in measurements.REWARDS
        for rate in measurements.RATES
        for passes in measurements.PASSES
        for bound in measurements.BOUNDS
        for shift in [-0.1 * seed + change_per_pass[bound] * passes + 1e-4 * (seed - 1) * (bound != "static")]
    ]


def test_numbers_of_a_run():
    run = synthetic_run("grpo", 0, noise=0.0)
    assert run.tracking_error(results.EntropyCurve("linear", end=0.5)) == pytest.approx(0.0, abs=1e-12)
    # After the first tenth: steps 2 to 19 against a constant, 0.5 k / 20 below it.
    expected = math.sqrt(sum((0.5 * k / 20) ** 2 for k in range(2, 20)) / 18)
    assert run.tracking_error(results.EntropyCurve()) == pytest.approx(expected)
    assert run.entropy_kept == pytest.approx(1 - 0.5 * 18 / 20)
    assert run.pass_at(1, TOTAL) == 0.5
    assert math.isnan(run.pass_at(1, 3))


def test_differences_are_paired_and_judged():
    runs = {
        "grpo": {s: synthetic_run("grpo", s) for s in range(5)},
        "id": {s: synthetic_run("id", s, mid64=0.85) for s in range(4)},
        "did": {s: synthetic_run("did", s) for s in range(5)},
    }
    above = results.difference(runs, "id", "grpo", lambda run: run.pass_at(64, TOTAL // 2))
    assert (above.seeds, above.sign) == (4, 1)
    assert above.mean == pytest.approx(0.05, abs=0.005)
    same = results.difference(runs, "did", "grpo", lambda run: run.pass_at(64, TOTAL // 2))
    assert same.sign == 0
    assert report._verdict(above, 1) == "confirmed"
    assert report._verdict(above, -1) == "contradicted"
    assert report._verdict(same, 1) == "not resolved"
    assert results.Difference(0.5, math.nan, 1).sign == 0  # one seed shows nothing
    assert report._verdict(results.Difference(0.5, math.nan, 1), 1) == "too few seeds (1)"
    assert results.Difference(0.5, 1e-9, 2).sign == 0  # nor do two that happen to agree
    assert results.Difference(0.1, 0.04, 5).sign == 0  # 2.5 standard errors of 5 seeds are within 95 percent


def test_height_above_a_course():
    course = [(0.3, 0.9), (0.4, 0.8), (0.5, 0.7)]
    run = synthetic_run("floor", 0, noise=0.0)
    for at, height, expected in ((0.35, 0.85, 0.0), (0.45, 0.8, 0.05), (0.6, 0.65, -0.05), (0.2, 0.95, 0.05)):
        run.evaluations[-1].update({"pass@1": at, "pass@16": height})
        assert results.above_course(run, course, TOTAL) == pytest.approx(expected)


def test_every_section_of_the_report_is_written(tmp_path):
    everything = strategies.EVERYTHING
    runs = {name: {s: synthetic_run(name, s) for s in range(3)} for name in everything}
    runs["target-linear"] = {s: synthetic_run("t", s, final=0.4) for s in range(3)}
    runs["entrocraft-linear"] = {s: synthetic_run("e", s, final=0.7) for s in range(3)}
    runs["entropic-linear"] = {s: synthetic_run("e", s, final=0.6) for s in range(3)}
    runs["coin-4-passes-closed-id"] = {s: synthetic_run("c", s, final=1.4) for s in range(3)}
    for run in runs["long-floor"].values():
        run.evaluations[-1]["pass@16"] += 0.1
    document = tmp_path / "study.md"
    measured = synthetic_measurements()
    report.write_report(runs, measured, TOTAL, document)
    text = document.read_text()
    assert "nan" not in text
    assert "Not run yet" not in text
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in reversed(text.splitlines())}
    assert rows["target-linear"].endswith("| 3 of 3 seeds |")
    assert rows["target-constant"].endswith("| 0 of 3 seeds |")
    assert "long-target-linear follows its curve with a root mean square error of" in text
    assert "long-sapo, long-dppo, long-erc, long-entrocraft-linear and long-entropic-linear: long-floor.**" in text
    rise = "risen with coin, 4 passes (to 1.20 of its start, under static clipping to 0.75); not with 2 passes and 4"
    assert rise in text
    # On every other curve, all three methods made the same runs.
    assert "at most half of theirs on 1 of 5 curves; not on rise-fall (1." in text
    linear = next(line for line in text.splitlines() if line.startswith("| linear |"))
    assert linear.count(" % (3) |") == 3
    assert float(linear.split(" | ")[-1].removesuffix(" |")) < 0.1
    assert "5 % or less from target-linear, on every seed; further from target-" in text
    assert text.index("## Longer runs") < text.index("## Appendix") < text.index("### The strategies")
    # Static clipping of the three states: 0, -10 and -20 %; the upper bound adds 4 % in four passes, a tenth in 2.5.
    assert "| coin | 0.0001 | 4 | -10.0 ± 10.0 | **+4.00 ± 0.01** | **+8.00 ± 0.01** |" in text
    assert "| 1.0 %, 2.0 % | 2 |" in text
    sections = ("Following a curve", "Against GRPO", "Diversity against accuracy", "thresholds alone")
    for heading in (*sections, "thresholds separate", "is split", "Longer"):
        assert heading in text
    for figure in ("tracking", "tracking_sharp", "courses", "pass_at_k", "frontier", "authority", "long"):
        assert f"(study/{figure}.png)" in text
        assert (tmp_path / "study" / f"{figure}.png").stat().st_size < 150_000
    lines = (tmp_path / "study" / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * len(everything)
    # A subset of the runs is enough.
    report.write_report({"grpo": {0: runs["grpo"][0]}}, measured, TOTAL, document)
    assert "1 seeds per strategy" in document.read_text()
    assert "id-split-0.3" in document.read_text().split("## Not run yet")[1]


def test_the_committed_report_is_that_of_the_archive(tmp_path):
    """If this fails, run ``python examples/entropy_study/study.py report`` and commit what it writes."""
    table = measurements.read(study.REPORT.with_suffix("") / "authority.csv")
    report.write_report(archive.read(study.ARCHIVE), table, 32, tmp_path / study.REPORT.name)
    assert (tmp_path / study.REPORT.name).read_text() == study.REPORT.read_text()
    results_csv = Path(study.REPORT.stem) / "results.csv"
    assert (tmp_path / results_csv).read_text() == (study.REPORT.parent / results_csv).read_text()


def test_every_strategy_is_a_valid_configuration(tmp_path):
    for overrides in strategies.EVERYTHING.values():
        load_config(QUICKSTART, [f"run_directory={tmp_path}", *strategies.COMMON, *overrides])


def test_measurements_are_read_back(tmp_path):
    rows = synthetic_measurements()
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    assert measurements.read(tmp_path / "table.csv") == rows
    assert measurements.read(tmp_path / "none.csv") == []


def test_archived_runs_are_not_repeated(tmp_path, monkeypatch):
    short = {"grpo": {s: synthetic_run("grpo", s) for s in range(2)}, "id": {3: synthetic_run("id", 3)}}
    archive.write(tmp_path / "runs.jsonl", short)
    again = archive.read(tmp_path / "runs.jsonl")
    assert {name: sorted(of_seed) for name, of_seed in again.items()} == {"grpo": [0, 1], "id": [3]}
    for name, of_seed in short.items():
        for seed, run in of_seed.items():
            assert again[name][seed].entropy_kept == pytest.approx(run.entropy_kept, rel=1e-5)
            assert again[name][seed].prediction_correlation == pytest.approx(run.prediction_correlation, rel=1e-4)
            assert again[name][seed].pass_at(64, TOTAL) == pytest.approx(run.pass_at(64, TOTAL), rel=1e-5)
    archive.write(tmp_path / "twice.jsonl", again)
    assert (tmp_path / "twice.jsonl").read_text() == (tmp_path / "runs.jsonl").read_text()

    monkeypatch.setattr(study, "ARCHIVE", tmp_path / "runs.jsonl")
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    started = []

    class Done:
        returncode = 0

        def poll(self):
            return 0

    def start(name, seed, steps):
        started.append((name, seed))
        return Done()

    monkeypatch.setattr(study, "_start", start)
    assert study.run(["grpo", "id"], seeds=4, steps=TOTAL, jobs=1, hours=1.0) == 0
    assert started == [("id", 0), ("id", 1), ("grpo", 2), ("id", 2), ("grpo", 3)]
    started.clear()
    study.run(["grpo"], seeds=2, steps=2 * TOTAL, jobs=1, hours=1.0)  # archived runs are of another length
    assert started == [("grpo", 0), ("grpo", 1)]


def test_a_coin_is_fair_and_the_same_for_the_same_answer():
    tosses = [toss(f"{i}*2={2 * i}", {"numbers": [1, 2]}) for i in range(2000)]
    assert set(tosses) == {0.0, 1.0}
    assert abs(sum(tosses) / 2000 - 0.5) < 3 * 0.5 / math.sqrt(2000)
    assert toss("1*2=2", {"numbers": [1, 2]}) == tosses[1]
