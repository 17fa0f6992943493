"""Measures several implementations of one computation, which run in turn in every repetition.

Other work on the machine then affects all of them equally, so the ratio of their medians is meaningful. Peak memory is
the growth of the process's resident set during one call (Linux), or what torch allocated on a GPU during the call.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_rlvr import ops
from megatron_rlvr.errors import first_line

Clock = Callable[[], float]
Meter = Callable[["Contender"], tuple[float, int]]
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Contender:
    """One implementation and its measurements.

    Attributes:
        name: shown in the table.
        prepare: makes fresh inputs; not timed.
        run: the computation, timed; takes the inputs and returns what must stay allocated until the end of the call.
        seconds, peak_bytes: one number per repetition.
        error: text for the last column of the table.
        peer: the library that it comes from; if it fails to run, the contender is removed. None for this project and
            for torch, whose failures end the program.
    """

    name: str
    prepare: Callable[[], tuple]
    run: Callable[..., tuple]
    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    error: str = ""
    peer: str | None = None


def resident_bytes(name: str) -> int:
    """A field of /proc/self/status, such as VmRSS, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measured_on_cpu(contender: Contender, clock: Clock) -> tuple[float, int]:
    """Seconds and peak extra bytes of one call."""
    inputs = contender.prepare()
    CLEAR_REFS.write_text("5")  # resets the peak that the kernel remembers
    before = resident_bytes("VmRSS")
    start = clock()
    kept = contender.run(*inputs)
    seconds = clock() - start
    del kept
    return seconds, resident_bytes("VmHWM") - before


def measured_on_gpu(contender: Contender) -> tuple[float, int]:
    """Seconds between two events of the stream, and peak extra bytes, of one call."""
    inputs = contender.prepare()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda._sleep(20_000_000)  # about 10 ms, in which the host gets ahead: only the GPU's time is measured
    begin.record()
    kept = contender.run(*inputs)
    end.record()
    torch.cuda.synchronize()
    del kept
    return begin.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - before


def measure(contenders: list[Contender], repeats: int, meter: Meter) -> None:
    """Fill in the measurements. Peers that do not run on this machine are removed."""
    for contender in list(contenders):  # once without timing, because the first call also loads and compiles
        try:
            contender.run(*contender.prepare())
        except Exception as error:
            if contender.peer is None:
                raise
            print(f"{contender.peer}: does not run here ({type(error).__name__}: {first_line(error)})")
            contenders.remove(contender)
    for _ in range(repeats):
        for contender in contenders:
            seconds, peak = meter(contender)
            contender.seconds.append(seconds)
            contender.peak_bytes.append(peak)


def chosen(contenders: list[Contender], words: str) -> list[Contender]:
    """The first contender, which the others are compared with, and those whose name contains one of the words.

    `words` is comma-separated; an empty string selects all contenders.
    """
    return contenders[:1] + [c for c in contenders[1:] if any(word in c.name for word in words.split(","))]


def report(title: str, contenders: list[Contender], logits_bytes: int, error: str = "largest error") -> None:
    """Print the table; times are compared with the first contender, memory with the bytes of the logits."""
    first = statistics.median(contenders[0].seconds)
    device = torch.cuda.get_device_name() if ops.backend() == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"\n{title}; backend {ops.backend()}, {device}, torch {torch.__version__}\n")
    print(f"| | median ms | fastest ms | time / first | peak extra MiB | of the logits | {error} |")
    print("|---|---|---|---|---|---|---|")
    for c in contenders:
        middle, peak = statistics.median(c.seconds), statistics.median(c.peak_bytes)
        print(
            f"| {c.name} | {middle * 1e3:.2f} | {min(c.seconds) * 1e3:.2f} | {middle / first:.2f} "
            f"| {peak / 2**20:.1f} | {peak / logits_bytes:.1%} | {c.error} |"
        )
