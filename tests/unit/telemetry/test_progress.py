import io
import re

import pytest
from rich.console import Console
from synthetic_run import records

from megatron_rlvr.telemetry.progress import LiveProgress, PlainProgress, duration, open_progress, sparkline


def console(terminal: bool) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=110, color_system=None, _environ={"TERM": "xterm"}
    )


def shown(console: Console) -> str:
    return re.sub(r"\x1b\[[0-9?;]*[a-zA-Z]", "", console.file.getvalue())


@pytest.mark.parametrize(
    "values, line",
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([7, 0], "█▁"),
        ([0.3, 0.3, 0.3], "▄▄▄"),
        ([0.1, float("nan"), 0.2], "▁█"),
        ([], ""),
    ],
)
def test_sparkline(values, line):
    assert sparkline(values) == line


@pytest.mark.parametrize("count", [33, 64, 65, 1000])
def test_long_sparkline_is_averaged_to_its_width(count):
    line = sparkline([float(i) for i in range(count)], width=32)
    assert len(line) == 32 and line == "".join(sorted(line)) and line[0] == "▁" and line[-1] == "█"


@pytest.mark.parametrize("seconds, text", [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7325, "2:02:05")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_pipe_receives_one_line_per_step():
    out = console(terminal=False)
    with open_progress("study", 12, console=out) as progress:
        assert isinstance(progress, PlainProgress)
        for record in records()[:3]:
            progress.phase("rollout")
            progress.update(record)
    lines = out.file.getvalue().splitlines()
    assert len(lines) == 3 and max(map(len, lines)) > 110  # not wrapped at the width of the console
    assert lines[2].isascii() and lines[2].startswith("step  3/12  reward 0.2")
    for part in ("upper 0.500..0.250", "lower 0.200..0.200", "clipped 1.0%/3.1%", "length 15.5", "left 0:00"):
        assert part in lines[2]


def test_time_left_follows_the_recent_steps(monkeypatch):
    clock = iter([0.0, 100.0, *(100.0 + 2.0 * i for i in range(1, 11))])
    monkeypatch.setattr("megatron_rlvr.telemetry.time_left.time.monotonic", lambda: next(clock))
    out = console(terminal=False)
    progress = open_progress("study", 100, console=out)
    for step in range(11):
        progress.update({"step": step})
    lines = out.file.getvalue().splitlines()
    assert "100.0 s  left 2:45:00" in lines[0]
    # The slow first step is forgotten after ten more: 89 steps of 2 s.
    assert "2.0 s  left 2:58" in lines[-1] and "reward -" in lines[-1]


def test_panel_of_a_resumed_run_includes_earlier_steps():
    out = console(terminal=True)
    earlier, later = records()[:6], records()[6:]
    with open_progress("study", 12, earlier, out) as progress:
        assert isinstance(progress, LiveProgress)
        assert "step 6/12" in shown(out)
        progress.phase("verify")
        assert "verify" in shown(out)
        for record in later:
            progress.update(record)
    last = shown(out)[shown(out).rindex("step 12/12") :]
    assert "done" in last and "upper 0.200 → 0.200   lower 0.300 → 0.170" in last
    assert sparkline([r["entropy"] for r in records()]) in last
    ratio = records()[-1]["entropy"] / records()[0]["entropy"]
    assert f"{ratio:.2f} × start" in last


def test_failed_run_is_shown_as_stopped():
    out = console(terminal=True)
    with pytest.raises(RuntimeError), open_progress("study", 12, console=out):
        raise RuntimeError
    assert "stopped" in shown(out) and "done" not in shown(out)
