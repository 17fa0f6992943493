"""The key of a run's SGLang servers, without which anyone who reaches a server could replace its weights.

A server refuses every request without the key, except health checks. The key travels in environment variables and in
the headers of requests. Other users of a machine can read neither, but they can read every process's command line.
"""

from __future__ import annotations

import os
import secrets

from megatron_rlvr.errors import UserError

KEY_VARIABLE = "RLVR_SGLANG_KEY"
"""Environment variable with the key of the servers that ``rollout.sglang.urls`` names."""


def new_key() -> str:
    """Return a random key of 256 bits."""
    return secrets.token_hex(32)


def key_from_environment() -> str | None:
    """Return the key that the user, or the job script, set for running servers; None if none is set.

    Raises:
        UserError: if a header cannot carry it.
    """
    key = os.environ.get(KEY_VARIABLE) or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(f"{KEY_VARIABLE} must hold printable ASCII without spaces: set it to the server's --api-key")
    return key


def headers(key: str | None) -> dict[str, str]:
    """Return the headers that carry the key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}
