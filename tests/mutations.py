"""Seeded mutations of JSON values, of text and of bytes, for tests of hostile input."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from typing import Any

COUNT = int(os.environ.get("MUTATIONS", "40"))
"""Mutations per surface; `make fuzz` sets 500."""

HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3.5, -0.0, "", " ", "x", [], {}, [[]], {"a": 1}, [None], "null", "0x10", "1e9"),
    *(2**31, 2**31 - 1, 2**63, -(2**63), 2**64, 10**30, 10**400, 1e308, -1e308, 5e-324, 1e-320, 65536, 10**9),
    *(
        float("nan"),
        float("inf"),
        float("-inf"),
        "nan",
        ".inf",
        "-1",
        "1_000",
        "٣",
        "½",
        "\ud800",
        "\x00",
        "\n",
        "a\nb",
    ),
    *(
        "é" * 3000,
        "../../etc/passwd",
        "/dev/zero",
        "/dev/null",
        "${seed}",
        "${oc.env:HOME}",
        "%s%n",
        "{{ x }}",
        "<eos>",
    ),
    *(
        [1] * 5000,
        [float("nan")],
        [10**400],
        ["\ud800"],
        {"": ""},
        {"type": "stop"},
        "9" * 5000,
        b"\xff".decode("latin-1"),
    ),
    json.loads("[" * 60 + "]" * 60),
]


def seeds(surface: str, count: int = COUNT) -> Iterator[random.Random]:
    """Yield one generator per mutation of a surface."""
    for number in range(count):
        yield random.Random(f"{surface}/{number}")


def mutated(value: Any, rng: random.Random) -> Any:
    """Return a copy of a JSON value in which one to three places are replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return rng.choice(HOSTILE)
        container, key = rng.choice(places)
        action = rng.randrange(8)
        if action <= 4:
            container[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif action == 5:
            del container[key]
        elif action == 6 and isinstance(container, dict):
            container[rng.choice(("", "x", f"{key} ", str(key).upper()))] = container.pop(key)
        elif isinstance(container, list):
            container.insert(rng.randrange(len(container) + 1), copy.deepcopy(container[key]))
        elif isinstance(container[key], int | float) and not isinstance(container[key], bool):
            container[key] = rng.choice(
                (-container[key], container[key] + 1, container[key] * 1000, str(container[key]))
            )
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (container, key) of every value inside a list or an object; of long lists only some."""
    if isinstance(value, dict | list):
        keys = list(value) if isinstance(value, dict) else [*range(min(len(value), 6)), *range(6, len(value), 97)]
        for key in keys:
            yield value, key
            yield from _places(value[key])


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return bytes with one to three changes: flips, cuts, repetitions, insertions and overwritten ranges."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 1, 4, 64))
        action = rng.randrange(6)
        if action == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif action == 1:
            del changed[place:]
        elif action == 2:
            del changed[place : place + length]
        elif action == 3:
            changed[place:place] = changed[place : place + length]
        elif action == 4:
            changed[place:place] = rng.choice(
                (b"\x00", b"\xff\xfe", b"[" * 3000, b"9" * 5000, b'"', b"\\ud800", b"NaN", b"\n")
            )
        else:
            changed[place : place + length] = rng.randbytes(length)
    return bytes(changed)
