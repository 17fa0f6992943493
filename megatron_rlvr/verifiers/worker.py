"""The verifier worker process: ``python -m megatron_rlvr.verifiers.worker FD``, started by WorkerProcess.

It imports only what the verifier needs, and never torch, so that it starts quickly and needs little memory.
"""

import pickle
import resource
import signal
import socket
import sys

from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers.channel import FrameReader, send_frame
from megatron_rlvr.verifiers.verdict import judge


def main(descriptor: int) -> None:
    """Read the setup, reply None when ready, then verify lists of (completion, answer) with one reply per item.

    Args:
        descriptor: file descriptor of the socket to the pool.
    """
    with socket.socket(fileno=descriptor) as connection:
        reader = FrameReader(connection)
        frames: list[bytes] = []
        while not frames:
            if reader.ended:
                return
            frames = reader.read_available()
        memory_mb, timeout_s, pickled_verifier = pickle.loads(frames.pop(0))
        _set_limits(memory_mb)
        try:
            verifier = pickle.loads(pickled_verifier)
            # One-time costs, such as a slow import, must not count against the time limit of the first completion.
            getattr(verifier, "warm_up", lambda: None)()
        except Exception as error:
            _reply(connection, UserError(f"a worker process cannot load the verifier: {type(error).__name__}: {error}"))
            return
        _reply(connection, None)
        while True:
            for frame in frames:
                for completion, answer in pickle.loads(frame):
                    # The pool enforces the time limit, to which it adds time without a processor. The timer covers the
                    # case that the pool was killed while this item hangs: the signal's default action ends the process,
                    # even inside C code.
                    signal.setitimer(signal.ITIMER_REAL, 10 * timeout_s + 5)
                    try:
                        reply: tuple | UserError = tuple(judge(verifier, completion, answer))
                    except UserError as error:
                        reply = error
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    _reply(connection, reply)
            frames = []
            while not frames:
                if reader.ended:
                    return
                frames = reader.read_available()


def _set_limits(memory_mb: int) -> None:
    # RLIMIT_DATA rather than RLIMIT_AS: libraries mapped from files are shared and should not count.
    limit = memory_mb << 20
    _, hard_limit = resource.getrlimit(resource.RLIMIT_DATA)
    if hard_limit != resource.RLIM_INFINITY:
        limit = min(limit, hard_limit)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    # A core file per crash would fill the disk overnight.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _reply(connection: socket.socket, reply: object) -> None:
    send_frame(connection, pickle.dumps(reply))


if __name__ == "__main__":
    main(int(sys.argv[1]))
