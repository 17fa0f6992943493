"""Verifiers that do what the completion says, such as hang or crash. Worker processes import this module."""

import ctypes
import os
import pickle
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from megatron_rlvr.verifiers.channel import Reply, frame


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


class Command:
    """Unpickled, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def attack(completion, answer):
    """Attack the pool in the way that the completion says; other completions have the reward 1."""
    channel = int(sys.argv[1])
    if completion == "garbage":
        os.write(channel, b"hello")
    if completion == "oversized frame":
        os.write(channel, struct.pack("!Q", 1 << 60))
    if completion == "pickled command":
        payload = pickle.dumps(Command(answer))
        os.write(channel, struct.pack("!Q", len(payload)) + payload)
    if completion == "pickled tuple":
        payload = pickle.dumps((1.0,))
        os.write(channel, struct.pack("!Q", len(payload)) + payload)
    if completion == "later garbage":
        threading.Timer(0.2, os.write, (channel, b"x" * 100)).start()
    if completion == "later refusal":
        refusal = frame(Reply("refused", detail="end the run").encoded())
        threading.Timer(0.2, os.write, (channel, refusal)).start()
    if completion == "fork":
        os.fork()
    if completion == "forged reply":
        os.write(channel, frame(Reply("ok", 10**9, 1.0).encoded()))
    if completion == "fork and reply":
        if os.fork() == 0:
            os.write(channel, frame(Reply("ok", 10**9, 1.0).encoded()))
            os._exit(0)
        os.wait()
    if completion == "close the channel":
        os.close(channel)
    if completion == "close standard streams":
        for descriptor in range(3):
            os.close(descriptor)
    if completion == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if completion == "exit":
        sys.exit(0)
    if completion == "end by the timer":
        signal.raise_signal(signal.SIGALRM)
    if completion == "interrupt":
        raise KeyboardInterrupt
    if completion == "leave the group":
        subprocess.Popen(["sleep", str(answer)], start_new_session=True)
    if completion == "leave the group and die":
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(float(answer))
            os._exit(0)
        os.wait()
        os._exit(0)
    return 1.0


def score_with_an_answer(completion, answer):
    return {"score": 1.0, "answer": completion.lower()}


def score_in_a_dictionary(completion, answer):
    return {"score": 0.25, "length": len(completion)}


def score_of_another_kind(completion, answer):
    return {"none": None, "dictionary": {"accuracy": 1}, "large": 1e39, "text": "0.5", "truth": True}[completion]
