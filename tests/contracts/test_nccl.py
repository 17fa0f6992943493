"""The locked NCCL is of the version that its header names, in the spelling in which the doctor compares versions."""

from __future__ import annotations

import re

import pytest

from megatron_rlvr import doctor
from tests.contracts.records import read_record


def test_the_lock_names_the_version_of_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    version = read_record("nccl")["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert version == doctor.pins("gpu")["nvidia-nccl-cu13"]
    numbers = tuple(int(part) for part in version.split("."))
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.nccl.version", lambda: numbers)
    (finding,) = doctor._nccl(None)
    assert finding.installed == finding.wanted == version and not finding.remedy
