"""Functions that stand for a user's verifier: the completion says what to do. Imported by worker processes."""

import ctypes
import os
import subprocess
import time


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
    return float(completion == answer)


def process_id(completion, answer):
    return os.getpid()


def knows_torch(completion, answer):
    import sys

    return "torch" in sys.modules


def scaled(completion, answer, factor=1.0):
    return factor * (completion == answer)


class SlowToStart:
    """Needs a second once, as an import does."""

    def warm_up(self):
        if not hasattr(self, "warm"):
            time.sleep(1.0)
        self.warm = True

    def __call__(self, completion, answer):
        self.warm_up()
        return 1.0
