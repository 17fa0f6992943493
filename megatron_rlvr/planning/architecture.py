"""The config.json to plan with, where the model itself is not on this machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_rlvr.config import Config


def architecture_of(config: Path) -> Path:
    """Return where the config.json of a configuration's model is expected: architectures/NAME.json next to it."""
    return config.parent / "architectures" / f"{config.stem}.json"


@contextmanager
def model_described_by(architecture: Path, config: Config) -> Iterator[None]:
    """Let ``model.path`` of a configuration be a folder that holds only this config.json, until the block ends."""
    path = config.model.path
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(architecture, Path(folder) / "config.json")
        config.model.path = folder
        try:
            yield
        finally:
            config.model.path = path
