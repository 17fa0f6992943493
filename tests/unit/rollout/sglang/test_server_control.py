"""Commands to all servers, with fake servers."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from fake_sglang import FakeServer, fake_server

from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.server_control import ServerControl


class Busy:
    """The commands of a server that is busy for some attempts to flush its cache; releasing memory earlier kills it."""

    def __init__(self, fake: FakeServer, flushes: int):
        self.commands: list[str] = []
        self.flushes, self.fake = flushes, fake
        fake.control = self.answer

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.commands.append(path + (f" {body['mode']}" if "mode" in body else ""))
        if path == "/flush_cache":
            self.flushes -= 1
            return (200, "Cache flushed.") if self.flushes < 0 else (400, "Flush cache failed.")
        if path == "/release_memory_occupation" and self.flushes >= 0:
            self.fake.dead = True  # AssertionError in its scheduler
        return 200, {}


def test_busy_server_is_asked_to_release_its_memory_when_it_is_idle() -> None:
    with fake_server() as busy, fake_server() as idle:
        commands = [Busy(busy, flushes=3), Busy(idle, flushes=0)]
        asyncio.run(ServerControl([busy.url, idle.url], SGLangConfig()).release_memory())
        flush = "/flush_cache"
        before, after = "/pause_generation abort", "/release_memory_occupation"
        assert commands[0].commands == [before, *[flush] * 4, after]
        assert commands[1].commands == [before, flush, after]
        assert not busy.dead


def test_server_that_stays_busy_is_named() -> None:
    with fake_server() as busy:
        commands = Busy(busy, flushes=10**9)
        control = ServerControl([busy.url], SGLangConfig(update_timeout_seconds=0.3))
        expected = rf"{busy.url} is still busy after rollout.sglang.update_timeout_seconds=0.3"
        with pytest.raises(UserError, match=expected):
            asyncio.run(control.release_memory())
        assert "/release_memory_occupation" not in commands.commands


def test_a_server_that_flushes_slowly_releases_its_memory_too() -> None:
    """It answers when it has been asked for its state, so later than the time limit of a health check."""
    probed = threading.Event()
    with fake_server() as slow:
        commands = Busy(slow, flushes=0)

        def control(path: str, body: dict[str, Any]) -> tuple[int, Any]:
            assert path != "/flush_cache" or probed.wait(200)
            return commands.answer(path, body)

        def reply(path: str, body: dict[str, Any]) -> tuple[int, Any]:
            if path == "/model_info":
                probed.set()
            return answer(path, body)

        slow.control, answer, slow.reply = control, slow.reply, reply  # type: ignore[method-assign]
        config = SGLangConfig(update_timeout_seconds=200.0, health_timeout_seconds=200.0)
        asyncio.run(ServerControl([slow.url], config).release_memory())
        assert probed.is_set() and commands.commands[-1] == "/release_memory_occupation"


def test_lost_server_does_not_keep_others_from_releasing_their_memory() -> None:
    with fake_server() as lost, fake_server() as idle:
        lost.dead = True
        commands = Busy(idle, flushes=1)
        asyncio.run(ServerControl([lost.url, idle.url], SGLangConfig()).release_memory())
        assert commands.commands[-1] == "/release_memory_occupation"
