"""The recorded signatures of dependencies that only a GPU node has; tools/record_contracts.py writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_rlvr.doctor import pins


def read_record(name: str) -> dict[str, Any]:
    """Return a record. Fails if it is of another version than the GPU recipe's."""
    record = json.loads((Path(__file__).parent / f"{name}.json").read_text())
    package, version = record["package"], record["version"]
    assert pins("gpu")[package] == version, f"{package} {version} is recorded: run tools/record_contracts.py"
    return record
