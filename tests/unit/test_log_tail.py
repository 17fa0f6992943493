"""The line of a log that says why a process ended."""

from __future__ import annotations

from pathlib import Path

from megatron_rlvr.log_tail import error_line, last_error


def test_the_last_error_is_preferred_to_the_last_line(tmp_path: Path) -> None:
    log = tmp_path / "rank_3.log"
    assert last_error(log) == "it left no log"
    log.write_text("\n \n")
    assert last_error(log) == "its log is empty"
    log.write_text("loading\nstep 1\n\n")
    assert last_error(log) == "step 1"
    log.write_text("KeyError: 'first'\nTraceback:\n  File x\ntorch.OutOfMemoryError: too much\n[W] a warning at exit\n")
    assert last_error(log) == "torch.OutOfMemoryError: too much"
    log.write_text("[rank3]: ValueError: too hot\nwarning: Error in a sentence\n")
    assert last_error(log) == "[rank3]: ValueError: too hot"
    log.write_text("error (rank 3): nothing to learn from\nbye\n")
    assert last_error(log) == "error (rank 3): nothing to learn from"


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"ValueError: long ago\n" + b"\xff progress\n" * 20_000 + b"the end\n")
    assert last_error(log) == "the end"


def test_what_a_program_printed_may_be_empty() -> None:
    assert error_line("") == error_line(" \n\n") == ""
    assert error_line("ImportError: no libcuda\nsee the manual\n") == "ImportError: no libcuda"
