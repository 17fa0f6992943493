"""token_statistics over tensor-parallel groups of real gloo processes."""

import os
import tempfile
import time
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_rlvr import ops

ROWS, VOCABULARY = 12, 4096
TIMEOUT_S = 600


def start(rank, world, file, work, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(file, world), rank=rank, world_size=world)
    try:
        work(rank, world, *arguments)
    finally:
        dist.destroy_process_group()


def run(work, world, *arguments):
    """Run ``work(rank, world, *arguments)`` in ``world`` gloo processes; raises if any of them fails."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            start, args=(world, f"{folder}/store", work, arguments), nprocs=world, join=False, start_method="fork"
        )
        end = time.monotonic() + TIMEOUT_S
        while not context.join(timeout=1):
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{world} gloo processes did not finish in {TIMEOUT_S} s")


def make(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, VOCABULARY, generator=generator) * scale
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    eighth, half = VOCABULARY // 8, VOCABULARY // 2
    edges = torch.tensor([0, eighth - 1, eighth, half - 1, half, VOCABULARY - 1])
    targets[: len(edges)] = edges
    targets[6:8] = logits[6:8].argmax(-1)
    targets[8] = -100
    logits[9, : VOCABULARY // 2] = -torch.inf  # in this row, the first half of the ranks has no probability
    targets[9] = VOCABULARY - 3
    return logits, targets, torch.randn(ROWS, generator=generator), torch.randn(ROWS, generator=generator)


def statistics(logits, targets, g, h, group, **options):
    leaf = logits.clone().requires_grad_()
    found = ops.token_statistics(leaf, targets, group=group, temperature=0.9, second_moments=True, **options)
    torch.autograd.backward([found.logprob, found.entropy], [g, h])
    return found, leaf.grad


def check_agreement(rank, world, scale, seed, dtype):
    logits, targets, g, h = make(scale, seed)
    logits = logits.to(dtype)
    full, full_gradient = statistics(logits, targets, g, h, None)
    width = VOCABULARY // world
    part = slice(rank * width, (rank + 1) * width)
    calls = []
    original = dist.all_gather_into_tensor
    dist.all_gather_into_tensor = lambda *a, **k: (calls.append(a), original(*a, **k))[1]
    found, gradient = statistics(logits[:, part].contiguous(), targets, g, h, dist.group.WORLD)
    dist.all_gather_into_tensor = original
    assert len(calls) == 1, "one collective a call, none for the gradient"
    for name in ("logprob", "entropy", "sum_squared_prob", "sum_squared_prob_logprob"):
        local, reference = getattr(found, name), getattr(full, name)
        spacing = torch.finfo(torch.float32).eps * reference.abs()  # beyond 8 nats float32 is spaced by 1e-6 or more
        assert ((local - reference).abs() <= torch.maximum(spacing, torch.tensor(1e-6))).all(), name
        of_all_ranks = [torch.empty_like(local) for _ in range(world)]
        dist.all_gather(of_all_ranks, local.detach().contiguous())
        assert all(torch.equal(other, local) for other in of_all_ranks), "the same bits on every rank"
    if dtype == torch.float32:
        torch.testing.assert_close(gradient, full_gradient[:, part], rtol=1e-5, atol=1e-7)
    else:
        torch.testing.assert_close(gradient, full_gradient[:, part], rtol=2**-7, atol=1e-7)


def check_broken_shard(rank, world):
    """A NaN on a single rank and a target out of range raise on every rank, so that none waits for another."""
    logits, targets, *_ = make(1.0, 0)
    shard = logits.chunk(world, -1)[rank].contiguous()
    if rank == 1:
        shard[5, 3] = torch.nan
    with pytest.raises(RuntimeError, match="rows 5"):
        ops.token_statistics(shard, targets, group=dist.group.WORLD)
    targets[2] = VOCABULARY
    with pytest.raises((ValueError, RuntimeError), match=f"found {VOCABULARY} in row 2"):
        ops.token_statistics(shard, targets, group=dist.group.WORLD)


def check_unequal_shards(rank, world):
    """Shards of unequal width would be read as other tokens, so every rank raises an error with the widths of all."""
    targets = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"group: .*V/tp \[10, 12\]"):
        ops.token_statistics(torch.zeros(4, 10 + 2 * rank), targets, group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"1 / temperature \[1.0, 0.5\]"):
        ops.token_statistics(torch.zeros(4, 10), targets, group=dist.group.WORLD, temperature=1.0 + rank)


def check_unequal_tokens(rank, world):
    """With MEGATRON_RLVR_CHECK=1, ranks compare their numbers of tokens before the collective that would fail."""
    os.environ["MEGATRON_RLVR_CHECK"] = "1"
    tokens = 4 + 3 * rank
    with pytest.raises(ValueError, match=r"group: .*found T \[4, 7\], V/tp \[10, 10\]"):
        ops.token_statistics(torch.zeros(tokens, 10), torch.zeros(tokens, dtype=torch.int64), group=dist.group.WORLD)
    logits, targets = torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64)
    assert ops.token_statistics(logits, targets, group=dist.group.WORLD).entropy.allclose(torch.tensor(20.0).log())


def check_groups(rank, world):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    logits, targets, g, h = make(3.0, rank // 2)
    found, _ = statistics(logits.chunk(2, -1)[rank % 2].contiguous(), targets, g, h, groups[rank // 2])
    full, _ = statistics(logits, targets, g, h, None)
    torch.testing.assert_close(found.entropy, full.entropy, rtol=2e-7, atol=1e-6)
    with pytest.raises(ValueError, match=r"group: this process .* is not one of its members"):
        ops.token_statistics(logits, targets, group=groups[1 - rank // 2])


@dataclass
class Affine:
    intercept: float = 0.2
    slope: float = 0.0


@dataclass
class Thresholds:
    upper: Affine = field(default_factory=lambda: Affine(0.5, -0.25))
    lower: Affine = field(default_factory=lambda: Affine(0.3, -0.13))


def check_fused(rank, world, sequence_parallel, vocabulary):
    """The fused forms over shards equal the plain path over the full vocabulary, including gradients."""
    generator = torch.Generator().manual_seed(world)
    tokens, width = 32, 16
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * 0.5
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    advantage = torch.randn(tokens, generator=generator)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    full = ops.token_statistics(h @ w.T, targets)
    old = full.logprob.detach() + 0.4 * torch.randn(tokens, generator=generator)
    clipped = ops.clipped_objective(full.logprob, old, advantage, Thresholds())
    loss = -(clipped.objective + 0.1 * full.entropy).sum()
    loss.backward()
    rows = slice(rank * tokens // world, (rank + 1) * tokens // world) if sequence_parallel else slice(None)
    entries = -(-vocabulary // world)
    columns = slice(rank * entries, (rank + 1) * entries)  # the last one may be shorter
    shard_options = {"group": dist.group.WORLD, "vocabulary": vocabulary}
    options = {**shard_options, "sequence_parallel": sequence_parallel, "chunk_bytes": 4 * 240 * 5}
    logits = (hidden @ weight[columns].T).requires_grad_()
    plain = ops.token_statistics(logits, targets, **shard_options)
    torch.testing.assert_close(plain.logprob, full.logprob, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=rf"of {vocabulary + world} entries has \d+, found"):
        ops.token_statistics(logits, targets, **(shard_options | {"vocabulary": vocabulary + world}))
    for form in ("objective", "statistics"):
        local, shard = hidden[rows].clone().requires_grad_(), weight[columns].clone().requires_grad_()
        if form == "objective":
            fused = ops.fused_linear_objective(
                local, shard, targets, old, advantage, Thresholds(), entropy_coefficient=0.1, **options
            )
            found = fused.loss
        else:
            fused = ops.fused_linear_token_statistics(local, shard, targets, **options)
            again = ops.clipped_objective(fused.logprob, old, advantage, Thresholds())
            found = -(again.objective + 0.1 * fused.entropy).sum()
        found.backward()
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fused.logprob, full.logprob, rtol=1e-6, atol=1e-6)
        for gradient, expected in ((local.grad, h.grad[rows]), (shard.grad, w.grad[columns])):
            assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max(), form


@pytest.mark.parametrize("vocabulary", [240, 237])
@pytest.mark.parametrize(("world", "sequence_parallel"), [(2, False), (4, False), (2, True), (4, True)])
def test_fused_forms(world, sequence_parallel, vocabulary):
    run(check_fused, world, sequence_parallel, vocabulary)


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize(("scale", "dtype"), [(3.0, torch.float32), (100.0, torch.float32), (3.0, torch.bfloat16)])
def test_shards_agree_with_the_full_vocabulary(world, scale, dtype):
    run(check_agreement, world, scale, world, dtype)


def test_broken_shard_raises_everywhere():
    run(check_broken_shard, 2)


def test_unequal_shards_are_refused():
    run(check_unequal_shards, 2)


def test_unequal_tokens_are_refused_if_checks_are_on():
    run(check_unequal_tokens, 2)


def test_subgroups():
    run(check_groups, 4)
