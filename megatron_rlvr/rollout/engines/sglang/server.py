"""One SGLang server as a process: its arguments and environment, its start, its health check, its end."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
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

_TRAINER_ONLY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")


class Server:
    """A server process in a process group of its own.

    On a GPU machine, server `number` takes the GPUs after those of the servers with lower numbers.

    Args:
        config: of the engine.
        dtype: of the model, as SGLang calls it.
        log: file that the output is appended to.
        number: of the server on this machine, from 0.
        host_name: under which other machines reach this one; by default what the machine calls itself.
        hide_other_gpus: whether the process sees its own GPUs only. Not for servers that share memory with the trainer,
            because CUDA IPC names a GPU by its index.

    Attributes:
        arguments: of ``sglang.launch_server``, without those that change from start to start.
        environment: of the process.
        url: under which the trainer reaches it.
        process: while it runs.
        ready: whether it has passed a health check since it was last started.
        folder: of the weights that it was last started with.
        started_at: when that was, on the monotonic clock.
        starts: how many times it was started.
        failed_starts: how many times in a row it ended by itself, or hung, before it was ready.
    """

    def __init__(
        self,
        config: SGLangConfig,
        dtype: str,
        log: Path,
        number: int = 0,
        host_name: str | None = None,
        hide_other_gpus: bool = False,
    ):
        self.config, self.log = config, log
        defaults: dict[str, Any] = {"host": "127.0.0.1", "dtype": dtype}
        self.environment = dict(os.environ)
        # A server would take the trainer's rendezvous for its own.
        for name in list(self.environment):
            if name in _TRAINER_ONLY or name.startswith("TORCHELASTIC_"):
                del self.environment[name]
        # With it, log-probs would be those of the logits before the temperature divides them; the trainer's are not.
        self.environment.pop("SGLANG_RETURN_ORIGINAL_LOGPROB", None)
        if not device.on_gpu():
            defaults |= {"device": "cpu", "attention_backend": "torch_native", "max_total_tokens": 65536}
            defaults["sleep_on_idle"] = True  # otherwise an idle server takes a core from the trainer
            self.environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
        self.environment |= config.environment
        self.arguments = defaults | normalized(config.server)
        if device.on_gpu():
            count = ServerLayout.from_arguments(config.server).gpus
            first = int(self.arguments.get("base_gpu_id") or 0) + number * count
            if hide_other_gpus:
                self.environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible_gpus(config)[first : first + count])
                first = 0
            self.arguments["base_gpu_id"] = first
        self.host = str(self.arguments["host"])
        self.port = _free_port(self.host)
        reachable = (host_name or socket.gethostname()) if self.host == "0.0.0.0" else self.host
        self.url = f"http://{reachable}:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.ready = False
        self.folder: Path | None = None
        self.started_at = 0.0
        self.starts = 0
        self.failed_starts = 0

    def start(self, folder: Path, version: int) -> None:
        """Start the process with the weights of a Hugging Face folder, without waiting until it is ready.

        Raises:
            UserError: if ``rollout.sglang.python`` is not a program.
        """
        python = shutil.which(self.config.python or sys.executable)
        if python is None:
            raise UserError(f"rollout.sglang.python={self.config.python} is not a program: give the path of a Python")
        self.ready, self.folder, self.started_at = False, folder, time.monotonic()
        command = [python, "-m", "sglang.launch_server", "--model-path", str(folder), "--port", str(self.port)]
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

    def passes_health_check(self, timeout: float) -> bool:
        """Whether it generates a token within `timeout` seconds."""
        try:
            reply = httpx.get(f"{self.url}/health_generate", timeout=timeout, trust_env=False, verify=False)
            return reply.status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        """Kill the whole process group and wait for its first process."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
        self.ready = False

    def where_to_look(self) -> str:
        """The end of an error message: the log file, and the error in it."""
        return f"see {self.log}, which says: {last_error(self.log)}"


def visible_gpus(config: SGLangConfig) -> list[str]:
    """The GPUs that servers on this machine may take, as CUDA_VISIBLE_DEVICES names them."""
    named = config.environment.get("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    return named.split(",") if named else [str(gpu) for gpu in range(torch.cuda.device_count())]


def _free_port(host: str) -> int:
    # Below the range from which the system takes the ports of connections, so that none of these blocks a restart.
    for port in random.Random().sample(range(20000, 32000), 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("" if host == "0.0.0.0" else host, port))
            except OSError:
                continue
            return port
    raise UserError(f"no free port between 20000 and 32000 on {host} for an SGLang server")
