"""The SGLang servers that this process starts, watches, restarts and stops."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import device
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.launch_arguments import check_gpus
from megatron_rlvr.rollout.engines.sglang.server import Server, visible_gpus
from megatron_rlvr.rollout.engines.sglang.server_key import new_key

_WATCH_PERIOD_S = 0.5
_HEALTH_CHECK_PERIOD_S = 2.0
_MAX_FAILED_STARTS = 3
# SGLang looks every five seconds whether it was asked to end, and its workers may take as long again.
_GRACE_S = 20.0
_GRACE_OF_HUNG_SERVER_S = 8.0


class ServerPool:
    """Starts servers, and restarts servers that die or hang with the current weights.

    A thread watches the processes, so a server that dies is restarted even while its clients wait for it. It asks all
    servers at once and without holding a lock, so one that is silent delays neither the others nor an update of
    weights. A server that is ready need not generate anything for it; only one that starts must.

    Args:
        config: section ``rollout.sglang`` of the configuration.
        folder: Hugging Face folder of the first weights, which have version 0.
        dtype: dtype of the model, in SGLang's spelling.
        logs: folder of the log files, one per server.
        host_name, hide_other_gpus: see `Server`.
        key: the key that the servers demand; None means a new one.

    Attributes:
        servers: the servers, in the order of their GPUs.
        failure: the reason why a server will not come back; None while all of them may.

    Raises:
        UserError: on a GPU machine, if the servers need more GPUs than it has.
    """

    def __init__(
        self,
        config: SGLangConfig,
        folder: Path,
        dtype: str,
        logs: Path,
        host_name: str | None = None,
        hide_other_gpus: bool = False,
        key: str | None = None,
    ):
        self.config = config
        self.key = key or new_key()
        if device.on_gpu():
            check_gpus(config.server, config.servers, len(visible_gpus(config)), "this machine")
        logs.mkdir(parents=True, exist_ok=True)
        self.servers = [
            Server(config, dtype, logs / f"server_{number}.log", number, host_name, hide_other_gpus, self.key)
            for number in range(config.servers)
        ]
        self.failure: str | None = None
        self._start_weights: tuple[Path, int] = (folder, 0)
        self._health_checks = threading.RLock()
        self._interruptions = 0  # how often health checks were switched off
        self._probes = ThreadPoolExecutor(len(self.servers), "sglang-probe")
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="sglang-watcher", daemon=True)

    @property
    def urls(self) -> list[str]:
        """URLs of the servers."""
        return [server.url for server in self.servers]

    def __enter__(self) -> ServerPool:
        """Start the servers and wait until all of them are ready.

        Raises:
            UserError: if a server does not become ready; names its log and the error in it.
        """
        try:
            for server in self.servers:
                server.start(*self._start_weights)
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
        self._probes.shutdown(wait=False)
        self._end(self.servers, _GRACE_S)

    @contextmanager
    def without_health_checks(self) -> Iterator[None]:
        """Return a context in which no server is restarted, and after which no earlier check counts.

        Enter it while servers load weights or have released their memory, because they may not answer then. A thread
        may enter it more than once.
        """
        with self._health_checks:
            self._interruptions += 1
            yield

    def start_with(self, folder: Path, version: int) -> set[Path]:
        """Set the weights that servers start with from now on.

        Args:
            folder: Hugging Face folder of the weights.
            version: version of the weights.

        Returns:
            the folders from which starting servers still load their weights.
        """
        self._start_weights = (folder, version)
        return {server.folder for server in self.servers if server.folder is not None and not server.ready}

    def _wait_until_ready(self, server: Server) -> None:
        while not server.passes_health_check(self.config.health_timeout_seconds):
            if server.port_was_taken() and server.starts < _MAX_FAILED_STARTS:
                self._end([server], _GRACE_OF_HUNG_SERVER_S)
                server.start(*self._start_weights)
            self._check_start(server)
            time.sleep(_WATCH_PERIOD_S)
        server.became_ready()

    def _check_start(self, server: Server) -> None:
        assert server.process is not None
        status = server.process.poll()
        if status is not None:
            raise UserError(
                f"the SGLang server ended with status {status} before it was ready: {server.where_to_look()}"
            )
        if time.monotonic() - server.started_at > self.config.start_timeout_seconds:
            raise UserError(
                f"the SGLang server was not ready after rollout.sglang.start_timeout_seconds="
                f"{self.config.start_timeout_seconds:g}: {server.where_to_look()}"
            )

    def _watch(self) -> None:
        checked_at = 0.0
        while not self._stopping.wait(_WATCH_PERIOD_S):
            check_health = time.monotonic() - checked_at > _HEALTH_CHECK_PERIOD_S
            try:
                with self._health_checks:  # wait until they are on
                    interruptions = self._interruptions
                answers = list(self._probes.map(self._probe, self.servers, repeat(check_health)))
                with self._health_checks:
                    # A server that loads weights or has released its memory may have been asked, and need not answer.
                    if interruptions == self._interruptions and not self._stopping.is_set():
                        for server, answer in zip(self.servers, answers, strict=True):
                            self._supervise(server, answer)
            except Exception as error:  # nobody joins this thread, but whoever waits for a server reads `failure`
                self.failure = f"watching the SGLang servers failed: {error}"
                raise
            if check_health:
                checked_at = time.monotonic()

    def _probe(self, server: Server, check_health: bool) -> bool | None:
        """Ask a server that is ready for its state, and one that starts to generate; returns None if it was not
        asked."""
        process = server.process
        if process is None or process.poll() is not None:
            return None
        if server.ready:
            return server.answers(self.config.health_timeout_seconds) if check_health else None
        return server.passes_health_check(timeout=2.0)

    def _supervise(self, server: Server, answer: bool | None) -> None:
        """Restart a server that died or hangs, given what `_probe` returned."""
        if server.process is None:
            if server.died_at is not None:  # there was too little memory to restart it
                self._restart(server)
            return
        dead = server.process.poll() is not None
        if server.ready:
            if dead or answer is False:
                self._restart(server)
        elif dead or time.monotonic() - server.started_at > self.config.start_timeout_seconds:
            # If a signal killed the server, the next start may well succeed, so this does not count as a failed start.
            # Clients that wait for a server have their own deadline.
            killed = (server.process.returncode or 0) < 0
            server.failed_starts += 0 if killed else 1
            if server.failed_starts < _MAX_FAILED_STARTS:
                self._restart(server)
            else:
                self.failure = f"an SGLang server could not be started again: {server.where_to_look()}"
                server.kill()
        elif answer:
            server.became_ready()

    def _restart(self, server: Server) -> None:
        """Start a server again. If its GPUs have too little free memory, the next call of `_supervise` tries again."""
        self._end([server], _GRACE_OF_HUNG_SERVER_S)
        try:
            server.start(*self._start_weights)
            server.died_at = None
        except UserError as error:
            now = time.monotonic()
            server.died_at = server.died_at or now
            if now - server.died_at > self.config.start_timeout_seconds:
                self.failure, server.died_at = f"an SGLang server could not be started again: {error}", None

    def _end(self, servers: Sequence[Server], seconds: float) -> None:
        """End servers by themselves within `seconds`, or by SIGKILL then."""
        deadline = time.monotonic() + seconds
        for server in servers:
            server.ask_to_end()
        for server in servers:
            server.kill(deadline)
