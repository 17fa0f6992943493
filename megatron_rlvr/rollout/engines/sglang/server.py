"""SGLang servers that the trainer starts, watches and stops."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import torch

from megatron_rlvr.bound_to_parent import bound_command
from megatron_rlvr.errors import UserError
from megatron_rlvr.log_tail import last_error
from megatron_rlvr.megatron import device
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.launch_arguments import ServerLayout, command_line, normalized

_WATCH_PERIOD_S = 0.5
_PROBE_PERIOD_S = 2.0
_FAILED_STARTS = 3
_OF_THE_TRAINER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")


class Server:
    """One server process in a process group of its own; its output goes to `log`.

    On a GPU machine the server of `number` n takes the GPUs after those of the n before it.
    """

    def __init__(self, config: SGLangConfig, dtype: str, log: Path, number: int = 0):
        self.config, self.log = config, log
        defaults: dict[str, Any] = {"host": "127.0.0.1", "dtype": dtype}
        self.environment = dict(os.environ)
        # The trainer's own rendezvous would be taken for the server's.
        for name in list(self.environment):
            if name in _OF_THE_TRAINER or name.startswith("TORCHELASTIC_"):
                del self.environment[name]
        # With it, log-probs are those of the undivided logits; the trainer's are those at the sampling temperature.
        self.environment.pop("SGLANG_RETURN_ORIGINAL_LOGPROB", None)
        if not device.on_gpu():
            defaults |= {"device": "cpu", "attention_backend": "torch_native", "max_total_tokens": 65536}
            defaults["sleep_on_idle"] = True  # else an idle server takes a core from the trainer
            self.environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
        self.environment |= config.environment
        self.arguments = defaults | normalized(config.server)
        if device.on_gpu():
            first = int(self.arguments.get("base_gpu_id") or 0)
            self.arguments["base_gpu_id"] = first + number * ServerLayout.from_arguments(config.server).gpus
        self.host = str(self.arguments["host"])
        self.port = _free_port(self.host)
        reachable = socket.gethostname() if self.host == "0.0.0.0" else self.host
        self.url = f"http://{reachable}:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False
        self.model: Path | None = None
        self.began = 0.0
        self.failed_starts = 0
        self.starts = 0

    def start(self, model: Path, version: int) -> None:
        """Start it on the weights of a Hugging Face folder, without waiting for it."""
        python = shutil.which(self.config.python or sys.executable)
        if python is None:
            raise UserError(f"rollout.sglang.python={self.config.python} is no program: give the path of a Python")
        self.ready, self.model, self.began = False, model, time.monotonic()
        command = [python, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(self.port)]
        command += ["--weight-version", str(version), "--skip-tokenizer-init", *command_line(self.arguments)]
        # A trainer that is killed with SIGKILL cannot stop its servers. SGLang's own workers are bound to the server in
        # the same way, so the whole tree ends.
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                bound_command(command, parent=os.getpid()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        self.starts += 1

    def answers(self, timeout: float) -> bool:
        """Whether it passes a health check, in which it generates a token."""
        try:
            reply = httpx.get(f"{self.url}/health_generate", timeout=timeout, trust_env=False, verify=False)
            return reply.status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        """End the whole process group at once and wait for its first process."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
        self.ready = False


class ServerPool:
    """Starts servers, and starts them again, with the current weights, when they die or hang.

    A thread watches the processes, so that one that dies while its clients wait comes back without them.

    Args:
        config: of the engine.
        model: Hugging Face folder of the weights to begin with, under version 0.
        dtype: of the model, as SGLang calls it.
        logs: folder of the log files, one a server.

    Raises:
        UserError: on a GPU machine, when the servers need more GPUs than it has.
    """

    def __init__(self, config: SGLangConfig, model: Path, dtype: str, logs: Path):
        self.config = config
        self.weights: tuple[Path, int] = (model, 0)
        _check_gpus(config)
        logs.mkdir(parents=True, exist_ok=True)
        self.servers = [Server(config, dtype, logs / f"server_{i}.log", i) for i in range(config.servers)]
        self.failure: str | None = None
        self._steady = threading.RLock()  # held while weights change: a server that loads them may not answer
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="sglang-watcher", daemon=True)

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]

    def __enter__(self) -> ServerPool:
        """Start the servers and wait until all answer.

        Raises:
            UserError: when one does not; names its log and the log's last line.
        """
        try:
            for server in self.servers:
                server.start(*self.weights)
            for server in self.servers:
                self._wait_until_ready(server)
        except BaseException:
            self.__exit__()
            raise
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self.failure = self.failure or "the run is over"
        if self._watcher.is_alive():
            self._watcher.join(timeout=self.config.health_timeout_seconds + 5.0)
        for server in self.servers:
            server.kill()

    def changing_weights(self) -> AbstractContextManager[object]:
        """Hold this while servers load new weights or have given up their memory: no health check then."""
        return self._steady

    def folders_in_use(self) -> set[Path]:
        """The folders that servers which are not ready yet read their weights from."""
        return {server.model for server in self.servers if server.model is not None and not server.ready}

    def _wait_until_ready(self, server: Server) -> None:
        while not server.answers(self.config.health_timeout_seconds):
            self._check_start(server)
            time.sleep(_WATCH_PERIOD_S)
        server.ready = True

    def _check_start(self, server: Server) -> None:
        assert server.process is not None
        status = server.process.poll()
        if status is not None:
            raise UserError(f"the SGLang server ended with status {status} before it was ready: {_pointer(server)}")
        if time.monotonic() - server.began > self.config.start_timeout_seconds:
            raise UserError(
                f"the SGLang server was not ready after rollout.sglang.start_timeout_seconds="
                f"{self.config.start_timeout_seconds:g}: {_pointer(server)}"
            )

    def _watch(self) -> None:
        probed = 0.0
        while not self._stopping.wait(_WATCH_PERIOD_S):
            probe = time.monotonic() - probed > _PROBE_PERIOD_S
            try:
                with self._steady:
                    for server in self.servers:
                        if not self._stopping.is_set():
                            self._tend(server, probe)
            except Exception as error:  # nobody would look at a thread that ended: whoever waits for a server does
                self.failure = f"watching the SGLang servers failed: {error}"
                raise
            if probe:
                probed = time.monotonic()

    def _tend(self, server: Server, probe: bool) -> None:
        if server.process is None:
            return
        dead = server.process.poll() is not None
        if server.ready:
            hung = not dead and probe and not server.answers(self.config.health_timeout_seconds)
            if dead or hung:
                self._restart(server)
        elif dead or time.monotonic() - server.began > self.config.start_timeout_seconds:
            # One that was killed by a signal, from outside, says nothing about the next; and whoever waits for a server
            # has a limit of its own.
            server.failed_starts += 0 if (server.process.returncode or 0) < 0 else 1
            if server.failed_starts < _FAILED_STARTS:
                self._restart(server)
            else:
                self.failure = f"an SGLang server could not be started again: {_pointer(server)}"
                server.kill()
        elif server.answers(timeout=2.0):
            server.ready, server.failed_starts = True, 0

    def _restart(self, server: Server) -> None:
        server.kill()
        server.start(*self.weights)


def visible_gpus(config: SGLangConfig) -> list[str]:
    """The GPUs that servers on this machine may take, as CUDA_VISIBLE_DEVICES names them."""
    named = config.environment.get("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    return named.split(",") if named else [str(gpu) for gpu in range(torch.cuda.device_count())]


def _check_gpus(config: SGLangConfig) -> None:
    each = ServerLayout.from_arguments(config.server).gpus
    if device.on_gpu() and (found := len(visible_gpus(config))) < each * config.servers:
        raise UserError(
            f"{config.servers} servers (rollout.sglang.servers) of {each} GPUs each need more than the {found} GPUs of "
            "this machine: start fewer, or spread each over fewer"
        )


def _pointer(server: Server) -> str:
    return f"see {server.log}, which says: {last_error(server.log)}"


def _free_port(host: str) -> int:
    # Below the ports that the system hands out to connections, so that none of those is in the way of a restart.
    for port in random.Random().sample(range(20000, 32000), 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("" if host == "0.0.0.0" else host, port))
            except OSError:
                continue
            return port
    raise UserError(f"no free port between 20000 and 32000 on {host} for an SGLang server")
