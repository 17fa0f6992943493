"""One SGLang server process: arguments, environment, start, health check and end."""

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
    """A server process in its own process group.

    On a GPU machine, server `number` uses the GPUs after those of the servers with lower numbers.

    Args:
        config: section ``rollout.sglang`` of the configuration.
        dtype: dtype of the model, in SGLang's spelling.
        log: file that the output is appended to.
        number: index of the server on this machine, from 0.
        host_name: name under which other machines reach this one; None means the name that the machine reports.
        hide_other_gpus: whether the process sees only its own GPUs. This must be False for servers that share memory
            with the trainer, because CUDA IPC names a GPU by its index.

    Attributes:
        arguments: arguments of ``sglang.launch_server``, without those that change from start to start.
        environment: environment variables of the process.
        url: URL under which the trainer reaches the server.
        process: the running process; None if it is not running.
        ready: whether it has passed a health check since it was last started.
        folder: folder of the weights that it was last started with.
        started_at: time of the last start, on the monotonic clock.
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
        # With these variables, a server would use the trainer's rendezvous.
        for name in list(self.environment):
            if name in _TRAINER_ONLY or name.startswith("TORCHELASTIC_"):
                del self.environment[name]
        # With this variable, log-probs would not include the temperature, but those of the trainer do.
        self.environment.pop("SGLANG_RETURN_ORIGINAL_LOGPROB", None)
        if not device.on_gpu():
            defaults |= {"device": "cpu", "attention_backend": "torch_native", "max_total_tokens": 65536}
            defaults["sleep_on_idle"] = True  # otherwise an idle server keeps a core busy
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
        """Start the process without waiting until it is ready.

        Args:
            folder: Hugging Face folder of the weights.
            version: version of the weights.

        Raises:
            UserError: if ``rollout.sglang.python`` is not a program.
        """
        python = shutil.which(self.config.python or sys.executable)
        if python is None:
            raise UserError(
                f"rollout.sglang.python={self.config.python} is not a program: set it to the path of a Python "
                "executable"
            )
        self.ready, self.folder, self.started_at = False, folder, time.monotonic()
        command = [python, "-m", "sglang.launch_server", "--model-path", str(folder), "--port", str(self.port)]
        command += ["--weight-version", str(version), "--skip-tokenizer-init", *command_line(self.arguments)]
        # A trainer that is killed with SIGKILL cannot stop its servers, so the kernel does. SGLang binds its workers to
        # the server in the same way, so all processes end.
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
        """Whether the server generates a token within `timeout` seconds."""
        try:
            reply = httpx.get(f"{self.url}/health_generate", timeout=timeout, trust_env=False, verify=False)
            return reply.status_code == 200
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        """Kill the process group and wait for its first process to end."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
        self.ready = False

    def where_to_look(self) -> str:
        """Return the end of an error message: the log file and the error in it."""
        return f"see {self.log}, which says: {last_error(self.log)}"


def visible_gpus(config: SGLangConfig) -> list[str]:
    """Return the GPUs that servers on this machine may use, in the notation of CUDA_VISIBLE_DEVICES."""
    visible = config.environment.get("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    return visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())]


def _free_port(host: str) -> int:
    # Below the range of ephemeral ports, so that no outgoing connection takes the port before a restart.
    for port in random.Random().sample(range(20000, 32000), 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("" if host == "0.0.0.0" else host, port))
            except OSError:
                continue
            return port
    raise UserError(
        f"no port between 20000 and 32000 can be used at {host} for an SGLang server: check rollout.sglang.server.host"
    )
