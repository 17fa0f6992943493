"""token_statistics compared with float64, for the installed backend and for the eager reference."""

import math

import pytest
import torch
import torch.utils.checkpoint

from megatron_rlvr import ops


def exact(logits, targets, temperature=1.0):
    """The definition, in float64, differentiable."""
    z = logits.double() / temperature
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    plogp = torch.where(p > 0, p * logp.masked_fill(p == 0, 0), 0)
    picked = logp.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    logprob = torch.where(targets >= 0, picked, torch.zeros_like(picked))
    moments = (p.square().sum(-1), (p * plogp).sum(-1))
    return logprob, -plogp.sum(-1), *moments


def exact_gradient(logits, targets, g, h, temperature=1.0):
    z = (logits.double() / temperature).requires_grad_()
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp.masked_fill(p == 0, 0), 0).sum(-1, keepdim=True).detach()
    g = torch.where(targets >= 0, g, 0).double()[:, None]
    one_hot = torch.zeros_like(p).scatter_(-1, targets.clamp(min=0)[:, None], 1.0)
    spread = torch.where(p > 0, p * (logp + entropy), 0)
    others = p.masked_fill(one_hot.bool(), 0).sum(-1, keepdim=True)  # 1 - p_target without cancellation
    gradient = torch.where(one_hot.bool(), others, -p) * g - h.double()[:, None] * spread
    size = p * (g.abs() + h.double()[:, None].abs() * (logp.masked_fill(p == 0, 0).abs() + entropy))
    size = torch.where(one_hot.bool(), g.abs() * others + h.double()[:, None].abs() * spread.abs(), size)
    return gradient.detach() / temperature, size.detach() / temperature


def make(rows, width, scale, seed, dtype=torch.float32, infinite=False):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    logits = torch.randn(rows, width, generator=generator) * scale
    if infinite:
        logits[torch.rand(rows, width, generator=generator) < 0.3] = -math.inf
    targets = torch.randint(0, width, (rows,), generator=generator)
    targets[0], targets[-1] = 0, width - 1
    best = logits.argmax(-1)
    targets[rows // 2 :] = best[rows // 2 :]  # almost certain tokens, where 1 - p cancels
    logits.scatter_(-1, best[:, None], logits.gather(-1, best[:, None]).clamp(min=0))
    g, h = torch.randn(rows, generator=generator), torch.randn(rows, generator=generator) * 0.1
    return logits.to(dtype), targets, g, h


def rounding_of_float32(value):
    """Half the spacing of float32 at ``value``: the error of correct rounding."""
    return 2.0 ** (value.abs().clamp(min=1e-30).log2().floor() - 24)


CASES = [
    (8, 17, 1.0, 1.0),
    (6, 1000, 30.0, 1.0),
    (5, 4099, 100.0, 0.7),
    (4, 32768, 3.0, 1.3),
    (2, 262144, 100.0, 1.0),
    (2, 262144, 1.0, 1.0),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize(("rows", "width", "scale", "temperature"), CASES)
def test_values_against_float64(rows, width, scale, temperature, infinite, seed):
    logits, targets, _, _ = make(rows, width, scale, seed, infinite=infinite)
    logprob, entropy, square, square_log = exact(logits, targets, temperature)
    found = ops.token_statistics(logits, targets, temperature=temperature, second_moments=True)
    finite = torch.isfinite(logprob)
    assert torch.equal(torch.isfinite(found.logprob), finite)
    error = (found.logprob.double() - logprob)[finite].abs()
    # 2e-6 up to 64 nats; beyond them the nearest float32 may be further away, and nothing but it will do
    allowed = torch.maximum(torch.tensor(2e-6), 1.01 * rounding_of_float32(logprob[finite]))
    assert (error <= allowed).all(), error.max()
    assert (found.entropy.double() - entropy).abs().max() <= 1e-5
    torch.testing.assert_close(found.sum_squared_prob.double(), square, rtol=3e-6, atol=0)
    torch.testing.assert_close(found.sum_squared_prob_logprob.double(), square_log, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("infinite", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("rows", "width", "scale", "temperature"), CASES)
def test_gradient_against_float64(rows, width, scale, temperature, infinite, seed, inplace):
    logits, targets, g, h = make(rows, width, scale, seed, infinite=infinite)
    g = torch.where(torch.isfinite(exact(logits, targets)[0]), g, 0)
    expected, size = exact_gradient(logits, targets, g, h, temperature)
    leaf = logits.clone().requires_grad_()
    found = ops.token_statistics(leaf, targets, temperature=temperature, inplace=inplace)
    torch.autograd.backward([found.logprob, found.entropy], [g, h])
    error = (leaf.grad.double() - expected).abs()
    # Relative to the terms of each element, because their sum can happen to be close to 0.
    assert (error <= 1e-5 * size + 1e-5 * expected.abs() + 1e-36).all(), (error / (size + 1e-30)).max()
    assert (leaf.data_ptr() == leaf.grad.data_ptr()) == inplace


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width", "scale", "temperature"), CASES)
def test_half_precision(rows, width, scale, temperature, dtype):
    logits, targets, g, h = make(rows, width, scale, 3, dtype)
    logprob, entropy, *_ = exact(logits, targets, temperature)
    leaf = logits.clone().requires_grad_()
    found = ops.token_statistics(leaf, targets, temperature=temperature)
    torch.testing.assert_close(found.logprob.double(), logprob, rtol=1.2e-7, atol=2e-6)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=0, atol=1e-5)
    torch.autograd.backward([found.logprob, found.entropy], [g, h])
    expected, size = exact_gradient(logits, targets, g, h, temperature)
    rounded = expected.to(dtype)
    binade = rounded.double().abs().clamp(min=torch.finfo(dtype).tiny).log2().floor()
    step = 2.0**binade * torch.finfo(dtype).eps
    excess = (leaf.grad.double() - rounded.double()).abs() - step - 2e-6 * size
    assert excess.max() <= 1e-36  # a GPU treats p < 1.2e-38 as 0


def test_log_prob_of_an_almost_certain_token_keeps_relative_accuracy():
    logits = torch.zeros(3, 1000)
    logits[:, 7] = torch.tensor([20.0, 25.0, 40.0])
    targets = torch.full((3,), 7)
    _, entropy, *_ = exact(logits, targets)
    exact_rest = torch.log1p(999 * torch.exp(-logits[:, 7].double()))
    found = ops.token_statistics(logits, targets)
    torch.testing.assert_close(found.logprob.double(), -exact_rest, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-4, atol=1e-13)


def test_row_stride_and_offset():
    logits, targets, g, h = make(6, 301, 5.0, 0)
    wide = torch.full((6, 400), 1e4)
    wide[:, 3:304] = logits
    wide = wide.requires_grad_()
    view = (wide * 1.0)[:, 3:304]
    found = ops.token_statistics(view, targets)
    torch.autograd.backward([found.logprob, found.entropy], [g, h])
    expected, _ = exact_gradient(logits, targets, g, h)
    torch.testing.assert_close(wide.grad[:, 3:304].double(), expected, rtol=1e-5, atol=1e-7)
    assert wide.grad[:, :3].abs().max() == 0
    assert wide.grad[:, 304:].abs().max() == 0


def test_strided_targets():
    logits, targets, *_ = make(6, 50, 2.0, 0)
    strided = torch.stack([targets, targets + 1], dim=1)[:, 0]
    assert torch.equal(ops.token_statistics(logits, strided).logprob, ops.token_statistics(logits, targets).logprob)


def test_row_without_target():
    logits, targets, g, h = make(4, 50, 2.0, 0)
    targets[1] = -100
    leaf = logits.clone().requires_grad_()
    found = ops.token_statistics(leaf, targets)
    assert found.logprob[1] == 0
    torch.testing.assert_close(found.entropy.double(), exact(logits, targets)[1], rtol=0, atol=1e-5)
    torch.autograd.backward([found.logprob, found.entropy], [g, h])
    torch.testing.assert_close(leaf.grad.double(), exact_gradient(logits, targets, g, h)[0], rtol=1e-5, atol=1e-7)


def test_no_rows():
    found = ops.token_statistics(torch.empty(0, 9), torch.empty(0, dtype=torch.int64), second_moments=True)
    assert found.logprob.shape == found.entropy.shape == found.sum_squared_prob.shape == (0,)


def test_second_backward_names_the_cause():
    logits, targets, *_ = make(4, 50, 2.0, 0)
    found = ops.token_statistics(logits.requires_grad_() * 1.0, targets)
    found.logprob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass over consumed logits"):
        found.entropy.sum().backward()


def test_second_backward_is_allowed_without_inplace():
    logits, targets, *_ = make(4, 50, 2.0, 0)
    leaf = logits.requires_grad_()
    found = ops.token_statistics(leaf * 1.0, targets, inplace=False)
    found.logprob.sum().backward(retain_graph=True)
    once = leaf.grad.clone()
    found.logprob.sum().backward()
    assert torch.equal(leaf.grad, 2 * once)


def test_another_node_that_saved_the_logits_raises():
    logits, targets, *_ = make(4, 50, 2.0, 0)
    shared = logits.requires_grad_() * 1.0
    other = torch.nn.functional.softplus(shared)  # saves its input
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (ops.token_statistics(shared, targets).logprob.sum() + other.sum()).backward()


@pytest.mark.parametrize(
    "producer",
    [
        torch.tanh,
        torch.nn.functional.relu,
        lambda logits: torch.log_softmax(logits, dim=-1),
        lambda logits: logits.clone().sigmoid_(),
        lambda logits: torch.tanh(logits).view(2, 2, 50).flatten(0, 1)[1:],
    ],
    ids=["tanh", "relu", "log_softmax", "sigmoid_", "view"],
)
def test_a_producer_that_saved_the_logits_names_the_remedy(producer):
    logits, targets, *_ = make(4, 50, 2.0, 0)
    leaf = logits.requires_grad_()
    targets = targets[-len(producer(leaf)) :]
    with pytest.raises(ValueError, match=r"logits: \w+Backward\d saved them .* pass inplace=False"):
        ops.token_statistics(producer(leaf), targets)
    # Under hooks for saved tensors torch does not notice the overwritten numbers.
    with pytest.raises(ValueError, match="pass inplace=False"):
        torch.utils.checkpoint.checkpoint(
            lambda x: ops.token_statistics(producer(x), targets).logprob, leaf, use_reentrant=False
        )
    with torch.no_grad():
        without_gradient = ops.token_statistics(producer(leaf), targets).logprob
    found = ops.token_statistics(producer(leaf), targets, inplace=False).logprob
    assert torch.equal(found, without_gradient)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    rows = torch.arange(len(targets))
    expected = torch.log_softmax(producer(leaf), dim=-1)[rows, targets].sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0], rtol=1e-4, atol=1e-5)


def test_soft_capping_that_saved_other_numbers_is_overwritten():
    logits, targets, *_ = make(4, 50, 2.0, 0)
    leaf = logits.requires_grad_()
    gradients = []
    for inplace in (True, False):
        found = ops.token_statistics(30.0 * torch.tanh(leaf / 30.0), targets, inplace=inplace)
        gradients += torch.autograd.grad(found.logprob.sum(), leaf)
    assert torch.equal(*gradients)


def test_two_in_place_calls_on_the_same_logits_raise():
    logits, targets, *_ = make(4, 50, 2.0, 0)
    shared = logits.requires_grad_() * 1.0
    first, second = ops.token_statistics(shared, targets), ops.token_statistics(shared, targets)
    with pytest.raises(RuntimeError, match="consumed by the backward pass of another"):
        (first.logprob.sum() + second.entropy.sum()).backward()


@pytest.mark.parametrize("inplace", [True, False])
def test_a_second_derivative_is_refused_and_not_left_out(inplace):
    logits, targets, *_ = make(4, 50, 2.0, 0)
    leaf = logits.requires_grad_()
    found = ops.token_statistics(leaf * 1.0, targets, inplace=inplace)
    with pytest.raises(RuntimeError, match="token_statistics: create_graph=True asks for a second derivative"):
        torch.autograd.grad(found.logprob.sum(), leaf, create_graph=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations(reentrant):
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    targets = torch.randint(0, 40, (6,))

    def loss(hidden, weight):
        found = ops.token_statistics(hidden @ weight.T, targets)
        return (found.logprob + 0.3 * found.entropy).sum()

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    torch.utils.checkpoint.checkpoint(loss, hidden, weight, use_reentrant=reentrant).backward()
    assert torch.equal(hidden.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])


def test_linear_layer_before_it_is_safe():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    targets = torch.randint(0, 40, (6,))
    for inplace in (True, False):
        found = ops.token_statistics(hidden @ weight.T, targets, inplace=inplace)
        (found.logprob.sum() + 0.3 * found.entropy.sum()).backward()
    logp = torch.log_softmax((hidden @ weight.T).double(), -1)
    loss = logp.gather(-1, targets[:, None]).sum() - 0.3 * (logp.exp() * logp).sum()
    expected = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(hidden.grad, 2 * expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, 2 * expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4, 9, dtype=torch.float64)}, "logits: must be float32, bfloat16 or float16"),
        ({"logits": torch.zeros(2, 4, 9)}, r"logits: must be \[T, V/tp\], found shape \[2, 4, 9\]"),
        ({"logits": torch.zeros(9, 4).T}, "column stride 1"),
        ({"targets": torch.zeros(4, dtype=torch.int32)}, "targets: must be int64, found torch.int32"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, r"T = 4 rows of logits, found \[5\]"),
        ({"targets": torch.zeros(4, dtype=torch.int64, device="meta")}, "targets: must be on the logits' device"),
        ({"temperature": 0.0}, "temperature: must be a positive finite number, found 0.0"),
        ({"temperature": math.nan}, "temperature"),
        ({"logits": torch.nn.Parameter(torch.zeros(4, 9))}, "logits: a parameter would be overwritten"),
    ],
)
def test_bad_arguments(change, message, placed):
    arguments = {"logits": torch.zeros(4, 9), "targets": torch.zeros(4, dtype=torch.int64), "temperature": 1.0}
    arguments |= placed(change)
    with pytest.raises(ValueError, match=message):
        ops.token_statistics(arguments["logits"], arguments["targets"], temperature=arguments["temperature"])


@pytest.mark.usefixtures("values_are_read")
@pytest.mark.parametrize(
    ("targets", "message"), [([0, 1, 9, 2], r"\[0, 9\).*found 9 in row 2"), ([0, -1, 3, 2], "found -1 in row 1")]
)
def test_targets_outside_the_vocabulary_are_named(targets, message):
    with pytest.raises(ValueError, match=f"targets: .*{message}"):
        ops.token_statistics(torch.zeros(4, 9), torch.tensor(targets))


@pytest.mark.usefixtures("values_are_read")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 11, 299])
def test_broken_rows_are_named(bad, position):
    logits = torch.randn(5, 300)
    logits[3, position] = bad
    with pytest.raises(RuntimeError, match=r"1 of 5 rows hold NaN or .inf.*rows 3"):
        ops.token_statistics(logits, torch.zeros(5, dtype=torch.int64))
    logits[3] = -math.inf
    with pytest.raises(RuntimeError, match="rows 3"):
        ops.token_statistics(logits, torch.zeros(5, dtype=torch.int64))
