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
from megatron_rlvr.rollout.engines.sglang.gpu_share import fraction_after_restart, free_gib
from megatron_rlvr.rollout.engines.sglang.launch_arguments import ServerLayout, command_line, normalized
from megatron_rlvr.rollout.engines.sglang.server_files import ServerFiles
from megatron_rlvr.rollout.engines.sglang.server_key import KEY_VARIABLE, headers

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
ROUTES_ARGUMENT = "enable_return_routed_experts"
"""SGLang's name of the argument that makes a server record routes."""
_CPU_ROUTES = Path(__file__).with_name("cpu_routes")
_END_PERIOD_S = 0.05
_PROGRAM = Path(__file__).with_name("launch_with_key.py")
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
        key: the key that the server demands; None if it demands none.

    Attributes:
        arguments: arguments of ``sglang.launch_server``, without those that change from start to start.
        environment: environment variables of the process.
        gpus: the GPUs that the process uses, in the notation of CUDA_VISIBLE_DEVICES; empty on the CPU.
        url: URL under which the trainer reaches the server.
        process: the running process; None if it is not running.
        ready: whether it has passed a health check since it was last started.
        folder: folder of the weights that it was last started with.
        started_at: time of the last start, on the monotonic clock.
        starts: how many times it was started.
        failed_starts: how many times in a row it ended by itself, or hung, before it was ready.
        died_at: since when it could not be started again, on the monotonic clock; None if it could.
    """

    def __init__(
        self,
        config: SGLangConfig,
        dtype: str,
        log: Path,
        number: int = 0,
        host_name: str | None = None,
        hide_other_gpus: bool = False,
        key: str | None = None,
    ):
        self.config, self.log, self._key = config, log, key
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
            if normalized(config.server).get(ROUTES_ARGUMENT):
                self.environment["PYTHONPATH"] = str(_CPU_ROUTES)
        without_expandable_segments(self.environment)
        self.environment.pop(KEY_VARIABLE, None)
        self.environment |= config.environment | ({KEY_VARIABLE: key} if key else {})
        self.arguments = defaults | normalized(config.server)
        self.gpus: list[str] = []
        if device.on_gpu():
            count = ServerLayout.from_arguments(config.server).gpus
            first = int(self.arguments.get("base_gpu_id") or 0) + number * count
            self.gpus = visible_gpus(config)[first : first + count]
            if hide_other_gpus:
                self.environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
                first = 0
            self.arguments["base_gpu_id"] = first
        self.host = str(self.arguments["host"])
        self.port = _free_port(self.host)
        reachable = (host_name or socket.gethostname()) if self.host == "0.0.0.0" else self.host
        self.url = f"http://{reachable}:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self._files: ServerFiles | None = None
        self.ready = False
        self.folder: Path | None = None
        self.started_at = 0.0
        self.starts = 0
        self.failed_starts = 0
        self.died_at: float | None = None
        self._first_free_gib: float | None = None
        self._memory_fraction: float | None = None

    def start(self, folder: Path, version: int) -> None:
        """Start the process without waiting until it is ready.

        Args:
            folder: Hugging Face folder of the weights.
            version: version of the weights.

        Raises:
            UserError: if ``rollout.sglang.python`` is not a program, or a restarted server would find too little
            memory.
        """
        python = shutil.which(self.config.python or sys.executable)
        if python is None:
            raise UserError(
                f"rollout.sglang.python={self.config.python} is not a program: set it to the path of a Python "
                "executable"
            )
        self.ready, self.folder, self.started_at = False, folder, time.monotonic()
        command = [python, str(_PROGRAM), "--model-path", str(folder), "--port", str(self.port)]
        command += [
            "--weight-version",
            str(version),
            "--skip-tokenizer-init",
            *command_line(self.arguments | self._memory_share()),
        ]
        # A trainer that is killed with SIGKILL cannot stop its servers, so the kernel does. SGLang binds its workers to
        # the server in the same way, so all processes end.
        self._files = ServerFiles(self.environment)
        # The log is for this user alone, like the server.
        with open(self.log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
            self.process = subprocess.Popen(
                bound_command(command, parent=os.getpid()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment | {"TMPDIR": str(self._files.temporary)},
                start_new_session=True,
            )
        self.starts += 1

    def _memory_share(self) -> dict[str, Any]:
        """Return the arguments that give a restarted server the GPU memory that it had after its first start."""
        if not self.gpus:
            return {}
        free = free_gib(self.gpus)
        if self._first_free_gib is None:
            self._first_free_gib = free
        if self._memory_fraction is None:
            return {}
        return {"mem_fraction_static": fraction_after_restart(self._memory_fraction, self._first_free_gib, free)}

    def became_ready(self) -> None:
        """Note that the server passed a health check after a start, and the share of memory that SGLang chose."""
        self.ready, self.failed_starts, self.died_at = True, 0, None
        self._note_files()
        if self.gpus and self._memory_fraction is None:
            reply = self._get("/server_info", 60.0)
            self._memory_fraction = float(reply.json()["mem_fraction_static"])

    def answers(self, timeout: float) -> bool:
        """Whether the server's scheduler reports its state within `timeout` seconds.

        This generates nothing, so it costs a GPU that the server shares with the trainer nothing either.
        """
        return self._gets("/server_info", timeout)

    def passes_health_check(self, timeout: float) -> bool:
        """Whether the server generates a token within `timeout` seconds."""
        return self._gets("/health_generate", timeout)

    def _get(self, path: str, timeout: float) -> httpx.Response:
        own = headers(self._key)
        return httpx.get(f"{self.url}{path}", timeout=timeout, headers=own, trust_env=False, verify=False)

    def _gets(self, path: str, timeout: float) -> bool:
        try:
            reply = self._get(path, timeout)
            return reply.status_code == 200
        except httpx.HTTPError:
            return False

    def _note_files(self) -> None:
        if self.process is not None and self._files is not None:
            self._files.note_shared_memory(self.process.pid)

    def ask_to_end(self) -> None:
        """Send SIGTERM, on which SGLang ends its workers."""
        if self.process is not None:
            self._note_files()
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def kill(self, deadline: float | None = None) -> None:
        """Kill the process group, and wait for its first process to end.

        Args:
            deadline: how long a server that was asked to end may take, on the monotonic clock. None means no longer.
        """
        if self.process is not None:
            # Not reaped before its group is killed, so that the group's id cannot belong to others by then.
            unreaped = os.WEXITED | os.WNOWAIT | os.WNOHANG
            while deadline is not None and time.monotonic() < deadline and self.process.returncode is None:
                if os.waitid(os.P_PID, self.process.pid, unreaped) is not None:
                    break
                time.sleep(_END_PERIOD_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
        if self._files is not None:
            self._files.remove()
            self._files = None
        self.ready = False

    def port_was_taken(self) -> bool:
        """Return whether the process ended because another one had taken a port of its own.

        SGLang chooses a port for torch.distributed when it starts, and listens there later, on a busy machine minutes
        later. At the next start it chooses another one.
        """
        ended = self.process is not None and self.process.poll() is not None
        return ended and "address already in use" in last_error(self.log).lower()

    def where_to_look(self) -> str:
        """Return the end of an error message: the log file and the error in it."""
        return f"see {self.log}, which says: {last_error(self.log)}"


def visible_gpus(config: SGLangConfig) -> list[str]:
    """Return the GPUs that servers on this machine may use, in the notation of CUDA_VISIBLE_DEVICES."""
    visible = config.environment.get("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES"))
    return visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())]


def without_expandable_segments(environment: dict[str, str]) -> None:
    """Remove ``expandable_segments`` from the settings of torch's allocator, which servers inherit from the trainer.

    With it, torch_memory_saver switches itself off (version 0.0.10: ``TorchMemorySaver is disabled``), so a server
    would answer that it has released its memory and keep it.
    """
    for name in ALLOCATOR_VARIABLES:
        if name in environment:
            settings = environment[name].split(",")
            kept = [setting for setting in settings if setting.partition(":")[0].strip() != "expandable_segments"]
            environment[name] = ",".join(kept)
            if not kept:
                del environment[name]


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
