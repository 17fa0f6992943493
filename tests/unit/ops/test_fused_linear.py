"""The fused projection, chunk by chunk, compared with the unfused operators."""

import pytest
import torch
from test_objective import PAPER, STATIC

from megatron_rlvr import ops

TOKENS, HIDDEN, VOCABULARY = 37, 24, 211


def make(seed=0, dtype=torch.float32):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.nn.Parameter((torch.randn(VOCABULARY, HIDDEN, generator=generator) * 0.4).to(dtype))
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    old = ops.token_statistics((hidden @ weight.T).detach(), targets).logprob
    old = old + 0.4 * torch.randn(TOKENS, generator=generator)
    advantage = torch.randn(TOKENS, generator=generator)
    mask = torch.rand(TOKENS, generator=generator) < 0.8
    token_weight = torch.rand(TOKENS, generator=generator) / TOKENS
    return hidden, weight, targets, old, advantage, mask, token_weight


def plain(hidden, weight, targets, old, advantage, thresholds, mask, token_weight, coefficient, temperature):
    found = ops.token_statistics(hidden @ weight.T, targets, temperature=temperature)
    clipped = ops.clipped_objective(
        found.logprob, old, advantage, thresholds, mask=mask, entropy=found.entropy.detach()
    )
    loss = -(token_weight * (clipped.objective + coefficient * found.entropy * mask)).sum()
    return loss, found, clipped


def assert_gradients_equal(found, expected, rtol=1e-5):
    for mine, reference in zip(found, expected, strict=True):
        assert (mine - reference).abs().max() <= rtol * reference.abs().max()


@pytest.mark.parametrize("chunk_bytes", [1, 5 * VOCABULARY * 4, 2**30])
@pytest.mark.parametrize(("thresholds", "coefficient", "temperature"), [(PAPER, 0.01, 0.8), (STATIC, 0.0, 1.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_objective_equals_the_plain_path(chunk_bytes, thresholds, coefficient, temperature, seed):
    hidden, weight, targets, old, advantage, mask, token_weight = make(seed)
    loss, statistics, clipped = plain(
        hidden, weight, targets, old, advantage, thresholds, mask, token_weight, coefficient, temperature
    )
    expected = torch.autograd.grad(loss * 3.0, (hidden, weight))
    fused = ops.fused_linear_objective(
        hidden,
        weight,
        targets,
        old,
        advantage,
        thresholds,
        mask=mask,
        token_weight=token_weight,
        temperature=temperature,
        entropy_coefficient=coefficient,
        chunk_bytes=chunk_bytes,
    )
    torch.testing.assert_close(fused.loss, loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(fused.logprob, statistics.logprob, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(fused.entropy, statistics.entropy, rtol=1e-6, atol=2e-6)
    assert (fused.clip_high, fused.clip_low) == (clipped.clip_high, clipped.clip_low)
    assert torch.equal(fused.region_counts, clipped.region_counts)
    assert fused.clip_high + fused.clip_low > 0
    assert_gradients_equal(torch.autograd.grad(fused.loss * 3.0, (hidden, weight)), expected)


@pytest.mark.parametrize("chunk_bytes", [1, 5 * VOCABULARY * 4, 2**30])
def test_statistics_are_differentiable(chunk_bytes):
    hidden, weight, targets, *_ = make()
    g, h = torch.randn(TOKENS), torch.randn(TOKENS)

    def gradients(found):
        return torch.autograd.grad((found.logprob * g + found.entropy * h).sum(), (hidden, weight))

    expected = ops.token_statistics(hidden @ weight.T, targets, temperature=0.7, second_moments=True)
    found = ops.fused_linear_token_statistics(
        hidden, weight, targets, temperature=0.7, second_moments=True, chunk_bytes=chunk_bytes
    )
    for name in ("logprob", "entropy", "sum_squared_prob", "sum_squared_prob_logprob"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=2e-6)
    assert_gradients_equal(gradients(found), gradients(expected))
    detached = ops.fused_linear_statistics(hidden, weight, targets, temperature=0.7, chunk_bytes=chunk_bytes)
    assert torch.equal(detached.logprob, found.logprob)
    assert not detached.logprob.requires_grad


@pytest.mark.parametrize("loss_scale", [None, 0.25])
def test_weight_gradient_goes_into_main_grad(loss_scale):
    hidden, weight, targets, old, advantage, *_ = make()
    arguments = (targets, old, advantage, PAPER)
    fused = ops.fused_linear_objective(hidden, weight, *arguments, chunk_bytes=4000)
    expected = torch.autograd.grad(0.25 * fused.loss, (hidden, weight))
    weight.main_grad = torch.ones_like(weight)
    fused = ops.fused_linear_objective(hidden, weight, *arguments, chunk_bytes=4000, loss_scale=loss_scale)
    (0.25 * fused.loss).backward()
    assert weight.grad is None
    assert_gradients_equal((hidden.grad, weight.main_grad - 1), expected, rtol=2e-5)
    weight.main_grad.fill_(1)
    hidden.grad = None
    weight.grad_added_to_main_grad = False
    statistics = ops.fused_linear_token_statistics(hidden, weight, targets, chunk_bytes=4000)
    clipped = ops.clipped_objective(statistics.logprob, old, advantage, PAPER)
    (-0.25 * clipped.objective.sum()).backward()
    assert weight.grad_added_to_main_grad
    assert_gradients_equal((hidden.grad, weight.main_grad - 1), expected, rtol=2e-5)


@pytest.mark.usefixtures("values_are_read")
def test_a_broken_promise_about_the_loss_scale_raises():
    hidden, weight, targets, old, advantage, *_ = make()
    weight.main_grad = torch.zeros_like(weight)
    fused = ops.fused_linear_objective(hidden, weight, targets, old, advantage, PAPER, loss_scale=0.25)
    with pytest.raises(RuntimeError, match=r"loss_scale=0.25 was promised.*: 0.5"):
        (0.5 * fused.loss).backward()


def test_second_backward_raises():
    hidden, weight, targets, old, advantage, *_ = make()
    fused = ops.fused_linear_objective(hidden, weight, targets, old, advantage, PAPER)
    fused.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass"):
        fused.loss.backward()


def test_weight_gradient_is_summed_in_float32():
    hidden, weight, targets, old, advantage, *_ = make(dtype=torch.bfloat16)
    weight.main_grad = torch.zeros(weight.shape)
    fused = ops.fused_linear_objective(
        hidden, weight, targets, old, advantage, PAPER, chunk_bytes=2 * VOCABULARY * 2, loss_scale=1.0
    )
    fused.loss.backward()
    leaf = (hidden @ weight.T).detach().requires_grad_()
    found = ops.token_statistics(leaf, targets)
    (-ops.clipped_objective(found.logprob, old, advantage, PAPER).objective.sum()).backward()
    expected = leaf.grad.double().T @ hidden.double()
    assert (weight.main_grad.double() - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert hidden.grad.dtype == torch.bfloat16


def test_frozen_weight_and_no_gradient():
    hidden, weight, targets, old, advantage, *_ = make()
    weight.requires_grad_(False)
    fused = ops.fused_linear_objective(hidden, weight, targets, old, advantage, PAPER)
    fused.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        again = ops.fused_linear_objective(hidden, weight, targets, old, advantage, PAPER)
    assert torch.equal(again.loss, fused.loss.detach())


@pytest.mark.parametrize("how", ["masked, whatever its target", "without target"])
def test_a_token_that_is_not_counted_has_no_effect(how):
    hidden, weight, targets, old, advantage, mask, token_weight = make()
    mask[5], coefficient = False, 0.1
    rest = torch.arange(TOKENS) != 5

    def run(keep, targets, mask):
        found = ops.fused_linear_objective(
            hidden[keep],
            weight,
            targets[keep],
            old[keep],
            advantage[keep],
            PAPER,
            mask=None if mask is None else mask[keep],
            token_weight=token_weight[keep],
            entropy_coefficient=coefficient,
        )
        return found, torch.autograd.grad(found.loss, (hidden, weight))

    if how == "without target":
        targets[5], mask = -100, None
    else:
        targets[5] = VOCABULARY + 3
    found, gradients = run(slice(None), targets, mask)
    expected, expected_gradients = run(rest, targets, mask)
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.objective[5] == 0
    assert torch.equal(found.region_counts, expected.region_counts)
    assert (found.clip_high, found.clip_low) == (expected.clip_high, expected.clip_low)
    assert_gradients_equal(gradients, expected_gradients)


def test_no_tokens():
    _, weight, *_ = make()
    none = torch.zeros(0)
    fused = ops.fused_linear_objective(
        torch.zeros(0, HIDDEN, requires_grad=True), weight, torch.zeros(0, dtype=torch.int64), none, none, PAPER
    )
    fused.loss.backward()
    assert weight.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(TOKENS, HIDDEN + 1)}, r"found \[37, 25\] and \[211, 24\]"),
        ({"weight": torch.zeros(VOCABULARY, HIDDEN, dtype=torch.bfloat16)}, "must be of one type"),
        ({"hidden": torch.zeros(TOKENS, HIDDEN).bfloat16()}, r"of one type .*; pass weight.to\(hidden.dtype\)"),
        ({"old": torch.zeros(TOKENS).bfloat16()}, r"old_logprob: must be float32 .*; call .float\(\)"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets: must be int64 \[37\], found torch.int64 \[3\]"),
        ({"advantage": torch.zeros(3)}, r"advantage: must be \[T\] with T = 37 tokens, found \[3\]"),
        ({"old": torch.zeros(TOKENS, dtype=torch.int64)}, "old_logprob: must be float32"),
        ({"weight": torch.zeros(0, HIDDEN)}, r"weight: must be \[V/tp, h\] with V/tp > 0, found \[0, 24\]"),
        ({"chunk_bytes": 0}, "chunk_bytes: must be positive, found 0"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_bad_arguments(change, message, placed):
    hidden, weight, targets, old, advantage, *_ = make()
    a = {"hidden": hidden, "weight": weight, "targets": targets, "old": old, "advantage": advantage}
    a |= placed(change)
    keywords = {name: a.pop(name) for name in ("chunk_bytes", "temperature") if name in a}
    with pytest.raises(ValueError, match=message):
        ops.fused_linear_objective(*a.values(), PAPER, **keywords)


@pytest.mark.usefixtures("values_are_read")
def test_a_target_outside_the_vocabulary_is_named():
    hidden, weight, _, old, advantage, *_ = make()
    with pytest.raises(ValueError, match=r"targets: .*found 211 in row 0"):
        ops.fused_linear_objective(hidden, weight, torch.full((TOKENS,), VOCABULARY), old, advantage, PAPER)


def test_autocast_needs_the_weight_in_the_type_of_the_hidden_states(device):
    _, weight, targets, old, advantage, *_ = make()
    layer, leaf = torch.nn.Linear(HIDDEN, HIDDEN), weight.detach().clone().requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        hidden = layer(torch.ones(TOKENS, HIDDEN))
        with pytest.raises(ValueError, match=r"found torch.bfloat16, torch.float32; pass weight.to\(hidden.dtype\)"):
            ops.fused_linear_objective(hidden, leaf, targets, old, advantage, PAPER)
        fused = ops.fused_linear_objective(hidden, leaf.to(hidden.dtype), targets, old, advantage, PAPER)
    fused.loss.backward()
    assert leaf.grad.dtype == torch.float32
    assert leaf.grad.isfinite().all()
    assert leaf.grad.abs().max() > 0
