"""The verifier worker process: ``python -m megatron_rlvr.verifiers.worker FD``, started by VerifierPool.

It must stay light: no torch, nothing that the verifier itself does not import.
"""

import pickle
import resource
import signal
import socket
import sys

from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers.channel import FrameReader, send_frame
from megatron_rlvr.verifiers.pool import judge


def main(descriptor: int) -> None:
    """Read the setup, answer "ready" (None), then judge chunks of (completion, answer), one reply an item."""
    with socket.socket(fileno=descriptor) as connection:
        reader = FrameReader(connection)
        frames: list[bytes] = []
        while not frames:
            if reader.ended:
                return
            frames = reader.read_available()
        memory_mb, timeout_s, pickled_verifier = pickle.loads(frames.pop(0))
        # Data, not address space: libraries mapped from files are shared and cost no memory of this process.
        limit = memory_mb << 20
        _, already = resource.getrlimit(resource.RLIMIT_DATA)
        if already != resource.RLIM_INFINITY:
            limit = min(limit, already)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        # A core file of every crash would fill a disk over a night.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            verifier = pickle.loads(pickled_verifier)
            # What a verifier needs once, such as a slow import, is not the first completion's to pay for.
            getattr(verifier, "warm_up", lambda: None)()
        except Exception as error:
            _reply(connection, UserError(f"a worker process cannot load the verifier: {type(error).__name__}: {error}"))
            return
        _reply(connection, None)
        while True:
            for frame in frames:
                for completion, answer in pickle.loads(frame):
                    # The pool keeps the time. This is for the day when the pool is gone, killed, and this item hangs:
                    # the default action of the signal ends the process, whatever it is busy with.
                    signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 5)
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


def _reply(connection: socket.socket, reply: object) -> None:
    send_frame(connection, pickle.dumps(reply))


if __name__ == "__main__":
    main(int(sys.argv[1]))
