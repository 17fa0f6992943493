"""The layout of a single process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_rlvr.megatron import parallel
from megatron_rlvr.megatron.config import ParallelConfig


@pytest.fixture(scope="module")
def layout() -> Iterator[parallel.Layout]:
    with parallel.parallel_groups(ParallelConfig(), seed=0) as layout:
        yield layout
