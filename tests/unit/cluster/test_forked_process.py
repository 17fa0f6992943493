"""Results, errors and deadlines of work in a forked process."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import resource
import signal
import time

import pytest

from megatron_rlvr.cluster.forked_process import ForkedProcessError, fork
from megatron_rlvr.errors import UserError


def test_results_and_failures_of_forked_work() -> None:
    deadline = time.monotonic() + 200
    parent = os.getpid()
    assert fork(os.getpid).result(deadline) != parent

    def refuse() -> None:
        raise UserError("model.path is empty")

    with pytest.raises(UserError, match=r"^model\.path is empty$"):
        fork(refuse).result(deadline)
    with pytest.raises(ForkedProcessError, match="ZeroDivisionError: integer division"):
        fork(lambda: 1 // 0).result(deadline)
    with pytest.raises(ForkedProcessError, match="it died"):
        fork(lambda: os.kill(os.getpid(), signal.SIGKILL)).result(deadline)
    hung = fork(lambda: time.sleep(1000))
    with pytest.raises(ForkedProcessError, match="it did not end in time"):
        hung.result(time.monotonic() + 0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(hung.pid, 0)


def test_a_process_with_many_open_files_reads_the_result() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2048), hard))
    try:
        process = fork(lambda: "done")
        high = fcntl.fcntl(process.pipe, fcntl.F_DUPFD, 1024)
        os.close(process.pipe)
        assert dataclasses.replace(process, pipe=high).result(time.monotonic() + 200) == "done"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
