"""The loop for other trainers follows its curve, learns, and needs no more than its first lines say."""

import ast
import sys
from pathlib import Path

import grpo
import pytest
import torch

from megatron_rlvr.control import TargetEntropy

FILE = Path(grpo.__file__)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small products: a second thread would only wait for the first
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_entropy_is_within_a_tenth_of_the_curve_after_the_first_tenth_of_the_steps(seed):
    rows = grpo.train(seed, TargetEntropy(grpo.STEPS, curve=grpo.CURVE))
    assert len(rows) == grpo.STEPS
    start = rows[0]["entropy"]
    errors = {row["step"]: row["entropy"] / grpo.CURVE.value(row["step"] / grpo.STEPS, start) - 1.0 for row in rows}
    late = {step: error for step, error in errors.items() if step >= grpo.STEPS // 10}
    assert {step: error for step, error in late.items() if abs(error) > 0.1} == {}
    assert any(row["control/steering"] for row in rows)
    assert sum(row["reward"] for row in rows[-5:]) / 5 > rows[0]["reward"] + 0.3


def test_it_is_60_lines_of_torch_and_the_two_packages():
    text = FILE.read_text()
    assert len([line for line in text.splitlines() if line.strip()]) <= 60
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name for name in imported if name.startswith("megatron_rlvr")}
    assert {name for name in ours if not name.startswith(("megatron_rlvr.ops", "megatron_rlvr.control."))} == set()
    roots = {name.partition(".")[0] for name in imported}
    assert {root for root in roots if root not in sys.stdlib_module_names} == {"megatron_rlvr", "torch"}
