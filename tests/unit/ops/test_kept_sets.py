"""The operators under kept sets compared with a softmax over the kept logits alone, in float64."""

import math

import pytest
import torch
from test_objective import PAPER

from megatron_rlvr import ops
from megatron_rlvr.ops.kept import check_kept

OPS = torch.ops.megatron_rlvr


def sets_with(sizes, width, seed):
    """Kept sets of these sizes, and a target of each row that is in its set."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    rows = [torch.randperm(width, generator=generator)[:size] for size in sizes]
    kept = ops.KeptSets.of(torch.tensor(sizes), torch.cat(rows))
    return kept, torch.stack([row[0] for row in rows])


def inputs(sizes, width, seed=0, scale=4.0, dtype=torch.float32):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    logits = (torch.randn(len(sizes), width, generator=generator) * scale).to(dtype)
    kept, targets = sets_with(sizes, width, seed)
    # The largest logit of a row is one that a cut policy would keep only by accident: here most rows do not keep it.
    g, h = torch.randn(2, len(sizes), generator=generator)
    return logits, targets, kept, g, h


def exact(logits, targets, kept, temperature=1.0):
    """(log-prob, entropy, sum p^2, sum p^2 ln p) of the renormalised softmax, row by row over the kept logits."""
    results = []
    for row, target in enumerate(targets.tolist()):
        ids = kept.ids[kept.offsets[row] : kept.offsets[row + 1]].long()
        logp = torch.log_softmax(logits[row, ids].double() / temperature, -1)
        p = logp.exp()
        picked = logp[ids == target].sum()
        results.append(torch.stack([picked, -(p * logp).sum(), p.square().sum(), (p.square() * logp).sum()]))
    return torch.stack(results).unbind(1)


SIZES = [([1] * 5, 17), ([1, 2, 3, 17, 5], 17), ([1, 40, 4095, 4096, 4097, 8999, 9001], 9001), ([70000, 3, 1], 70001)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sizes", "width"), SIZES)
def test_values_and_gradient_against_float64(sizes, width, dtype, seed):
    logits, targets, kept, g, h = inputs(sizes, width, seed, dtype=dtype)
    leaf = logits.double().requires_grad_()
    logprob, entropy, squared, squared_logprob = exact(leaf, targets, kept, 1.3)
    (g * logprob + h * entropy).sum().backward()
    for inplace in (False, True):
        found_leaf = logits.clone().requires_grad_()
        settings = {"temperature": 1.3, "inplace": inplace, "second_moments": True, "kept": kept}
        found = ops.token_statistics(found_leaf, targets, **settings)
        torch.testing.assert_close(found.logprob.double(), logprob.detach(), rtol=1e-7, atol=2e-6)
        torch.testing.assert_close(found.entropy.double(), entropy.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(found.sum_squared_prob.double(), squared.detach(), rtol=3e-6, atol=0)
        torch.testing.assert_close(
            found.sum_squared_prob_logprob.double(), squared_logprob.detach(), rtol=1e-5, atol=1e-9
        )
        torch.autograd.backward([found.logprob, found.entropy], [g, h])
        tolerance = 2e-6 if dtype == torch.float32 else 3e-3 if dtype == torch.float16 else 2e-2
        torch.testing.assert_close(found_leaf.grad.double(), leaf.grad, rtol=tolerance, atol=tolerance / 10)
        assert (found_leaf.grad[~kept.mask(0, width)] == 0).all()
        assert (found_leaf.grad.data_ptr() == found_leaf.data_ptr()) == inplace


def test_the_whole_vocabulary_kept_is_the_operator_without_kept_sets():
    logits, targets, kept, g, h = inputs([9001] * 4, 9001)
    assert (kept.ids.diff() != 1).sum() == 3  # consecutive, which the CPU kernels do not gather
    results = []
    for settings in ({}, {"kept": kept}):
        leaf = logits.clone().requires_grad_()
        found = ops.token_statistics(leaf, targets, second_moments=True, **settings)
        torch.autograd.backward([found.logprob, found.entropy], [g, h])
        results.append((found.logprob, found.entropy, found.sum_squared_prob, leaf.grad))
    for plain, of_sets in zip(*results, strict=True):
        torch.testing.assert_close(of_sets, plain, rtol=0, atol=1e-6 if logits.is_cuda else 0)


def test_a_token_alone_in_its_set_is_certain():
    logits, targets, kept, g, h = inputs([1, 1, 1], 50, scale=80.0)
    leaf = logits.clone().requires_grad_()
    found = ops.token_statistics(leaf, targets, kept=kept)
    torch.autograd.backward([found.logprob, found.entropy], [g, h])
    assert (found.logprob == 0).all() and (found.entropy == 0).all() and (leaf.grad == 0).all()


def test_what_is_not_kept_is_not_read():
    logits, targets, kept, g, h = inputs([3, 20, 50], 50)
    poisoned = logits.clone()
    poisoned[~kept.mask(0, 50)] = math.nan
    results = []
    for values in (logits, poisoned):
        leaf = values.clone().requires_grad_()
        found = ops.token_statistics(leaf, targets, kept=kept)
        torch.autograd.backward([found.logprob, found.entropy], [g, h])
        results.append((found.logprob, found.entropy, leaf.grad))
    if ops.backend() != "reference":  # the reference masks after a product, which a NaN survives
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_without_target_have_the_entropy_of_their_set():
    logits, targets, kept, g, h = inputs([3, 7, 50], 50)
    ignored = targets.clone()
    ignored[1] = -100
    leaf = logits.double().requires_grad_()
    logprob, entropy, *_ = exact(leaf, targets, kept)
    (g[[0, 2]] * logprob[[0, 2]]).sum().backward(retain_graph=True)
    (h * entropy).sum().backward()
    found_leaf = logits.clone().requires_grad_()
    found = ops.token_statistics(found_leaf, ignored, kept=kept)
    torch.autograd.backward([found.logprob, found.entropy], [g, h])
    assert found.logprob[1] == 0
    torch.testing.assert_close(found.entropy.double(), entropy.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found_leaf.grad.double(), leaf.grad, rtol=2e-6, atol=2e-7)


def test_kernels_equal_the_eager_reference():
    from megatron_rlvr.ops import statistics_operators as definitions

    logits, targets, kept, g, h = inputs([1, 6, 300, 299], 300, seed=3)
    logits[1, kept.ids[kept.offsets[1]].long()] = -math.inf
    arguments = (logits, targets, kept.ids, kept.offsets)
    for start, width in ((0, 300), (100, 100), (200, 100)):  # the whole vocabulary, and shards of it
        shard = logits[:, start : start + width].contiguous()
        partials = OPS.kept_row_statistics(shard, *arguments[1:], start, 300, 0.8, True)
        expected = definitions._kept_row_statistics(shard, *arguments[1:], start, 300, 0.8, True)
        has_sum = expected[:, 0] > -math.inf
        torch.testing.assert_close(partials[:, [0, 3]], expected[:, [0, 3]], rtol=0, atol=0)
        torch.testing.assert_close(partials[has_sum], expected[has_sum], rtol=1e-5, atol=1e-6)
        state = torch.tensor([[5.0, 1.0, 0.7, -1.2]]).repeat(4, 1)
        gradient = OPS.kept_logits_gradient(shard, *arguments[1:], state, g, h, start, 0.8)
        torch.testing.assert_close(
            gradient,
            definitions._kept_logits_gradient(shard, *arguments[1:], state, g, h, start, 0.8),
            rtol=1e-5,
            atol=1e-6,
        )


def test_fused_forms_equal_the_plain_one():
    torch.manual_seed(0)
    rows, width, size = 30, 70, 16
    hidden, weight = torch.randn(rows, size), torch.randn(width, size)
    kept, targets = sets_with([1 + 7 * i % width for i in range(rows)], width, 5)
    old, advantage = -torch.rand(rows) * 3, torch.randn(rows)
    mask = torch.rand(rows) > 0.2

    def leaves():
        return hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    h, w = leaves()
    plain = ops.token_statistics(h @ w.T, targets, temperature=0.9, kept=kept, second_moments=True)
    clipped = ops.clipped_objective(plain.logprob, old, advantage, PAPER, mask=mask)
    loss = -(clipped.objective + 0.3 * torch.where(mask, plain.entropy, 0)).sum()
    expected = torch.autograd.grad(loss, (h, w))
    settings = {"temperature": 0.9, "kept": kept, "chunk_bytes": 4 * width * 7}

    h, w = leaves()
    chunked = ops.fused_linear_token_statistics(h, w, targets, second_moments=True, **settings)
    scored = ops.fused_linear_statistics(h, w, targets, second_moments=True, **settings)
    for found in (chunked, scored):
        for name in ("logprob", "entropy", "sum_squared_prob", "sum_squared_prob_logprob"):
            torch.testing.assert_close(getattr(found, name), getattr(plain, name), rtol=1e-5, atol=1e-5)
    objective = ops.clipped_objective(chunked.logprob, old, advantage, PAPER, mask=mask).objective
    gradients = torch.autograd.grad(-(objective + 0.3 * torch.where(mask, chunked.entropy, 0)).sum(), (h, w))
    h, w = leaves()
    masked_target = torch.where(mask, targets, torch.full_like(targets, 3))  # not in the set, and outside the mask
    fused = ops.fused_linear_objective(
        h, w, masked_target, old, advantage, PAPER, mask=mask, entropy_coefficient=0.3, **settings
    )
    torch.testing.assert_close(fused.loss, loss, rtol=1e-5, atol=1e-5)
    for found in (gradients, torch.autograd.grad(fused.loss, (h, w))):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def kept_of(ids, offsets):
    return ops.KeptSets(torch.tensor(ids, dtype=torch.int32), torch.tensor(offsets))


@pytest.mark.usefixtures("values_are_read")
@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (([1, 2, 4], [0, 2, 3]), "the target of row 1, 5, is not in its kept set"),
        (([1, 2, 5], [0, 3, 3]), "offsets must rise by at least 1 per row"),
        (([1, 2, 5], [0, 2, 4]), "offsets must rise by at least 1 per row, from 0 to at most 3"),
        (([1, 2, 5], [-1, 2, 3]), "offsets must rise"),
        (([2, 1, 5], [0, 2, 3]), "must ascend strictly"),
        (([1, 1, 5], [0, 2, 3]), "must ascend strictly"),
        (([1, 10, 5], [0, 2, 3]), r"ids must be in \[0, 10\), found 1 to 10"),
        (([-1, 1, 5], [0, 2, 3]), r"ids must be in \[0, 10\)"),
        (([1, 2, 5], [0, 3]), r"offsets must be \[3\], found \[2\]"),
    ],
)
def test_sets_that_do_not_fit_are_refused(kept, message):
    logits, targets = torch.randn(2, 10), torch.tensor([1, 5])
    with pytest.raises(ValueError, match=f"kept: .*{message}"):
        ops.token_statistics(logits, targets, kept=kept_of(*kept))
    hidden, weight = torch.randn(2, 4), torch.randn(10, 4)
    with pytest.raises(ValueError, match=f"kept: .*{message}"):
        ops.fused_linear_objective(hidden, weight, targets, torch.zeros(2), torch.ones(2), PAPER, kept=kept_of(*kept))


def test_wrong_types_are_refused():
    targets = torch.tensor([1])
    with pytest.raises(ValueError, match="kept: ids must be int32"):
        check_kept(ops.KeptSets(torch.tensor([1]), torch.tensor([0, 1])), targets)


@pytest.mark.usefixtures("values_are_read")
def test_the_gradient_itself_never_leaves_its_tensors() -> None:
    """The statistics refuse such sets. A caller of torch.ops alone must not read or write elsewhere."""
    if ops.backend() == "reference":
        pytest.skip("eager torch checks its indices itself")
    logits, targets = torch.randn(3, 10), torch.tensor([1, 2, 3])
    for ids in ([9, 900000, -5, 4], [3, 2, 5, 4], [900000, 900001, 900002, 900003]):
        sets = (torch.tensor(ids, dtype=torch.int32), torch.tensor([-7, 3, 2, 90]))
        gradient = OPS.kept_logits_gradient(logits, targets, *sets, torch.zeros(3, 4), *torch.ones(2, 3), 0, 1.0)
        assert (gradient[:, [0, 1, 6, 7, 8]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    logits, targets, kept, g, h = inputs([1, 5, 50, 7], 50, dtype=dtype)
    sets = (targets, kept.ids, kept.offsets)
    partials = OPS.kept_row_statistics(logits, *sets, 0, 50, 1.25, True)
    state = OPS.combine_statistics(partials[None], targets, 50, 1.25)[2]
    torch.library.opcheck(OPS.kept_row_statistics, (logits, *sets, 0, 50, 1.25, True))
    torch.library.opcheck(
        OPS.kept_token_statistics, (logits.clone().requires_grad_(), *sets, partials[None], 0, 50, 1.25)
    )
    torch.library.opcheck(OPS.kept_logits_gradient, (logits, *sets, state, g, h, 0, 1.25))
    torch.library.opcheck(OPS.kept_logits_gradient_, (logits.clone(), *sets, state, g, h, 0, 1.25))


def test_under_torch_compile():
    logits, targets, kept, g, h = inputs([1, 5, 50, 7], 50)

    def loss(logits, ids, offsets):
        found = ops.token_statistics(logits, targets, kept=ops.KeptSets(ids, offsets), inplace=False)
        return (g * found.logprob + h * found.entropy).sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        function(leaf, kept.ids, kept.offsets).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_selected_rows():
    kept, _ = sets_with([1, 4, 9, 2], 30, 0)
    index = torch.tensor([2, 0, 2])
    assert torch.equal(kept.select(index).mask(0, 30), kept.mask(0, 30)[index])
    assert torch.equal(kept.rows(slice(1, 3)).mask(0, 30), kept.mask(0, 30)[1:3])
    assert len(kept.select(index)) == 3
