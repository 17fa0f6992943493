"""Every test of the operators runs on the CPU and, where there is one, on a GPU: tensors are made on that device."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(autouse=True, params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with torch.device(request.param):
        yield request.param


@pytest.fixture
def placed(device: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Moves the arguments of a case, which were created at collection, to the device; "meta" tensors stay."""

    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return value
        return torch.nn.Parameter(value.to(device)) if isinstance(value, torch.nn.Parameter) else value.to(device)

    return lambda arguments: {name: place(value) for name, value in arguments.items()}


@pytest.fixture
def values_are_read(device: str) -> None:
    """For tests of errors about values: on a GPU, values are not checked, because that would wait for the device."""
    if device == "cuda":
        pytest.skip("on a GPU the values of arguments are not read")
