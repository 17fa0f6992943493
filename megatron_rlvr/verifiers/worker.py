"""The verifier worker process: ``python -m megatron_rlvr.verifiers.worker FD``, started by WorkerProcess.

It imports only what the verifier needs, and never torch, so that it starts quickly and needs little memory.
"""

import os
import pickle
import resource
import signal
import socket
import sys

from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers.channel import FrameReader, Reply, frame
from megatron_rlvr.verifiers.descendants import become_subreaper, kill_descendants
from megatron_rlvr.verifiers.source import VerifierSource
from megatron_rlvr.verifiers.verdict import describe, judge


def main(descriptor: int) -> None:
    """Read the setup, reply when ready, then verify requests (indices, items) with one reply per item.

    Args:
        descriptor: file descriptor of the socket to the pool.
    """
    os.set_inheritable(descriptor, False)
    become_subreaper()
    with socket.socket(fileno=descriptor) as connection:
        # A forked copy must not read requests, reply, or hold the socket open when the worker has died.
        os.register_at_fork(after_in_child=connection.close)
        try:
            _serve(connection)
        finally:
            # The pool is closed or was killed. A process that left this process's group would outlive it.
            kill_descendants(os.getpid())


def _serve(connection: socket.socket) -> None:
    reader = FrameReader(connection)
    frames: list[bytes] = []
    while not frames:
        if reader.ended:
            return
        frames = reader.read_available()
    memory_mb, timeout_s, source = pickle.loads(frames.pop(0))
    assert isinstance(source, VerifierSource)
    _set_limits(memory_mb)
    process_id = os.getpid()
    try:
        verifier = source.load()
        # One-time costs, such as a slow import, must not count against the time limit of the first completion.
        getattr(verifier, "warm_up", lambda: None)()
    except UserError as error:
        _reply(connection, Reply("refused", detail=str(error)))
        return
    except BaseException as error:  # such as SystemExit in a module of the user
        _reply(connection, Reply("refused", detail=f"a worker process cannot load the verifier: {describe(error)}"))
        return
    _reply(connection, Reply("ready"))
    traced = False
    while True:
        for request in frames:
            indices, items = pickle.loads(request)
            _reply(connection, Reply("accepted", indices[0]))
            for index, (completion, answer) in zip(indices, items, strict=True):
                # The pool enforces the time limit, to which it adds time without a processor. The timer covers the case
                # that the pool was killed while this item hangs: the signal's default action ends the process, even
                # inside C code.
                signal.setitimer(signal.ITIMER_REAL, 10 * timeout_s + 5)
                try:
                    verdict, traceback = judge(verifier, completion, answer)
                    reply = Reply(verdict.status, index, verdict.reward, verdict.detail, "" if traced else traceback)
                    traced = traced or bool(traceback)
                except UserError as error:
                    reply = Reply("refused", detail=str(error))
                if os.getpid() != process_id:
                    os._exit(1)  # the verifier forked, and the copy of this process returned too
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


def _reply(connection: socket.socket, reply: Reply) -> None:
    connection.sendall(frame(reply.encoded()))


if __name__ == "__main__":
    main(int(sys.argv[1]))
