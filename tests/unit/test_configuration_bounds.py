"""Every number of the configuration has bounds, so that no absurd value reaches a timer, a tensor or a library."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_rlvr.config import Config
from megatron_rlvr.config_reader import read
from megatron_rlvr.config_schema import KeyType, check_values, key_types
from megatron_rlvr.errors import UserError

INFINITY_ALLOWED = {"optimizer.clip_grad", "rollout.mismatch_alarm"}
"""Keys of which infinity disables something."""
DENORMAL, HUGE = 5e-324, [1e308, -1e308, 1e30, -1e30]


def numbers(section: type, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any], KeyType]]:
    """Yield (path, the values that select the section, type) of every number; for lists, the type of their elements."""
    for name, expected in key_types(section).items():
        path = (*prefix, name)
        if expected.by_name is not None:
            for choice, chosen in expected.by_name.items():
                for inner, _, number in numbers(chosen, path):
                    yield inner, {"name": choice}, number
        elif expected.is_section:
            yield from numbers(expected.type, path)
        else:
            while expected.element is not None:
                expected = expected.element
            if expected.type in (int, float):
                yield path, {}, expected


NUMBERS = list(numbers(Config))


def test_the_numbers_were_found() -> None:
    keys = {".".join(path) for path, _, _ in NUMBERS}
    assert {"steps", "rollout.sglang.attempts", "algorithm.schedule.points", "algorithm.objective.dual_clip"} <= keys
    assert len(keys) > 90


BY_KEY = {".".join(path): number for path, _, number in NUMBERS}


@pytest.mark.parametrize("key", BY_KEY)
def test_every_number_has_bounds(key: str) -> None:
    number = BY_KEY[key]
    assert number.limits is not None, f"{key} has no bounds: annotate it with Bounds, or with Within in control"
    refused = [*HUGE, math.nan, -math.inf] + ([2**63, -(2**63)] if number.type is int else [])
    for value in refused if key != "seed" else [math.nan, -1, 2**63]:
        assert not number.limits.allow(value), f"{key} allows {value}"
    assert number.limits.allow(math.inf) == (key in INFINITY_ALLOWED)


def test_absurd_values_are_refused_in_one_line() -> None:
    absurd = ["1e308", "-1e308", "nan", "-inf", 2**63, -(2**63), 10**400, -1.0, 0, DENORMAL, True, [], "0x" + "9" * 9]
    absurd.append(int("9" * 4000) ** 2)  # repr() refuses integers of this length
    refused = 0
    for path, chosen, number in NUMBERS:
        if path[-1] == "points":
            continue
        for value in absurd:
            values: Any = {**chosen, path[-1]: value}
            for name in reversed(path[:-1]):
                values = {name: values}
            values.setdefault("run_directory", "x")
            values["model"] = {"path": "x", **values.get("model", {})}
            values["data"] = {"train": "x", **values.get("data", {})}
            try:
                config = read(Config, values)
                check_values(config)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 700 and path[-1] in str(error), (path, value)
                refused += 1
            else:
                assert number.limits is not None and number.limits.allow(value), (path, value)
                assert value in (0, DENORMAL, -1.0) or path[-1] == "clip_grad"
    assert refused > 9 * len(NUMBERS)


def test_defaults_are_within_their_bounds() -> None:
    config = Config(run_directory="x")
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, path="x"), data=dataclasses.replace(config.data, train="x")
    )
    check_values(config)
