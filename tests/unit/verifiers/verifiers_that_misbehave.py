"""Verifiers that do what the completion says, such as hang or crash. Worker processes import this module."""

import ctypes
import os
import subprocess
import time
from pathlib import Path


def score(completion, answer):
    if completion == "hang":
        while True:
            pass
    if completion == "hang with a child":
        subprocess.run(["sleep", str(answer)], check=True)
    if completion == "crash":
        ctypes.string_at(0)
    if completion == "leave":
        os._exit(0)
    if completion == "hog":
        return float(len(bytearray(8 << 30)))
    if completion == "raise":
        raise KeyError("no such thing")
    if completion == "return text":
        return "good"
    if completion == "return nan":
        return float("nan")
    if completion == "sleep":
        time.sleep(0.3)
    if completion == "meet":  # wait for a second worker that does the same
        Path(answer, str(os.getpid())).touch()
        while len(list(Path(answer).iterdir())) < 2:
            time.sleep(0.01)
        return 1.0
    return float(completion == answer)


def compute(completion, answer):
    """Use the processor for as many seconds as the completion says."""
    end = time.process_time() + float(completion)
    while time.process_time() < end:
        pass
    return 1.0


def process_id(completion, answer):
    return os.getpid()


def knows_torch(completion, answer):
    import sys

    return "torch" in sys.modules


class SlowToStart:
    """Takes three seconds to start, as a slow import does."""

    def warm_up(self):
        if not hasattr(self, "warm"):
            time.sleep(3.0)
        self.warm = True

    def __call__(self, completion, answer):
        self.warm_up()
        return 1.0
