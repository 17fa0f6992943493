"""Every objective against its paper's formula, written here token by token in plain float64 Python.

``formula(r, A, p_old, ...)`` returns (value, d value / d ln pi), both by hand, so that no autograd rule is trusted.
"""

import math

import pytest
import torch

from megatron_rlvr.control import AffineThreshold, ClipThresholds
from megatron_rlvr.objectives import OBJECTIVES, TokenInputs, build_objective

THRESHOLDS = {
    "static": ClipThresholds(),
    "clip-higher": ClipThresholds(upper=AffineThreshold(0.28)),
    "dynamic": ClipThresholds(AffineThreshold(0.3, -0.13), AffineThreshold(0.5, -0.25)),
    "steep": ClipThresholds(upper=AffineThreshold(3.0, -2.8)),
}
SEEDS = range(4)


def tokens(seed, count=300, sequences=12, thresholds=THRESHOLDS["dynamic"], spread=0.5, dtype=torch.float64):
    """Tokens with ratios on both sides of every bound, and one advantage per sequence."""
    generator = torch.Generator().manual_seed(seed)

    def normal(n):
        return torch.randn(n, generator=generator, dtype=torch.float64)

    index = torch.randint(sequences, (count,), generator=generator).sort().values
    old = -torch.rand(count, generator=generator, dtype=torch.float64).mul(4).add(0.01)
    old = old.to(dtype)
    logprob = (old + spread * normal(count)).clamp(max=-1e-3).to(dtype).requires_grad_()
    advantage = normal(sequences).to(dtype)
    advantage[0] = 0.0
    entropy = torch.rand(count, generator=generator, dtype=dtype)
    moved = torch.linspace(0.85, 1.15, count, dtype=torch.float64).to(dtype)
    return TokenInputs(
        logprob=logprob,
        entropy=entropy.clone().requires_grad_(),
        old_entropy=entropy / moved,
        old_logprob=old,
        advantage=advantage[index],
        sequence_index=index,
        sequence_count=sequences,
        thresholds=thresholds,
        rollout_logprob=(old + 0.4 * normal(count)).to(dtype),
    )


def rows(inputs):
    """(ratio, advantage, old probability) of every token, as floats."""
    ratio = [math.exp(a - b) for a, b in zip(inputs.logprob.tolist(), inputs.old_logprob.tolist(), strict=True)]
    prob = [math.exp(b) for b in inputs.old_logprob.tolist()]
    return list(zip(ratio, inputs.advantage.tolist(), prob, strict=True))


def bounds(thresholds, p):
    lower, upper = thresholds.lower, thresholds.upper
    return (1 - lower.intercept) / (1 + lower.slope * p), (1 + upper.intercept) / (1 - upper.slope * p)


def ppo(r, A, low, high):
    if A > 0 and r > high:
        return high * A, 0.0
    if A < 0 and r < low:
        return low * A, 0.0
    return r * A, r * A


def check(inputs, outputs, expected):
    """``expected``: (value, gradient) of every token; the sum's gradient is each token's own."""
    (gradient,) = torch.autograd.grad(outputs.objective.sum(), inputs.logprob)
    value, slope = (torch.tensor(column, dtype=torch.float64) for column in zip(*expected, strict=True))
    tolerance = 1e-12 if outputs.objective.dtype == torch.float64 else 2e-6  # the operator of "clip" is float32
    torch.testing.assert_close(outputs.objective.detach().double(), value, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(gradient.double(), slope, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("thresholds", THRESHOLDS.values(), ids=THRESHOLDS.keys())
def test_clip(seed, thresholds):
    inputs = tokens(seed, thresholds=thresholds, dtype=torch.float32)
    outputs = build_objective("clip")(inputs)
    sides = [(r, A, *bounds(thresholds, p)) for r, A, p in rows(inputs)]
    check(inputs, outputs, [ppo(*side) for side in sides])
    assert outputs.clipped_high.tolist() == [A > 0 and r > high for r, A, low, high in sides]
    assert outputs.clipped_low.tolist() == [A < 0 and r < low for r, A, low, high in sides]
    assert outputs.clipped_high.any()
    assert outputs.clipped_low.any()


@pytest.mark.parametrize("seed", SEEDS)
def test_dual_clip(seed):
    inputs = tokens(seed, spread=1.0, dtype=torch.float32)

    def formula(r, A, p):
        value, slope = ppo(r, A, *bounds(inputs.thresholds, p))
        return (3.0 * A, 0.0) if A < 0 and value < 3.0 * A else (value, slope)

    expected = [formula(*row) for row in rows(inputs)]
    assert sum(r > 3 and A < 0 for r, A, _ in rows(inputs)) > 0
    check(inputs, build_objective("dual-clip")(inputs), expected)
    check(inputs, build_objective("clip", dual_clip=3.0)(inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", SEEDS)
def test_dcpo(seed, dtype):
    inputs = tokens(seed, spread=1.0, dtype=dtype)

    def formula(r, A, q):
        low = 0.5 + 0.5 * math.sqrt(max(1 - 4 * 0.16 / q, 0))
        high = min(0.5 + 0.5 * math.sqrt(1 + 4 * 0.2 / q), 10.0)
        # Where they exist, the bounds are |r - 1| p = eps at the current probability p = r q.
        assert (high - 1) * high * q == pytest.approx(0.2) or high == 10.0
        assert q < 4 * 0.16 or (1 - low) * low * q == pytest.approx(0.16)
        return ppo(r, A, low, high)

    check(inputs, build_objective("dcpo")(inputs), [formula(*row) for row in rows(inputs)])


def test_dcpo_has_the_bounds_that_its_authors_print():
    """The table in the README of github.com/lime-RL/DCPO: low and high p for q = 0.9 and 0.01, eps 0.16 and 0.2."""
    low, high = build_objective("dcpo").token_objective.bounds(torch.tensor([0.9, 0.01]))
    assert (low * torch.tensor([0.9, 0.01])).tolist() == pytest.approx([0.69, 0.005], abs=3e-3)
    assert (high * torch.tensor([0.9, 0.01])).tolist() == pytest.approx([1.06, 0.05], abs=1e-2)
    assert build_objective("dcpo").token_objective.bounds(torch.tensor([1e-6]))[1].item() == 10.0  # their clip_ratio_c


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("beta_low", "beta_high"), [(0.75, 1.0), (0.5, 0.25), (0.0, 0.0)])
def test_ce_gppo(seed, beta_low, beta_high, dtype):
    inputs = tokens(seed, dtype=dtype)

    def formula(r, A, p):
        low, high = bounds(inputs.thresholds, p)
        if A > 0 and r > high:
            return beta_high * high * A, beta_high * high * A
        if A < 0 and r < low:
            return beta_low * low * A, beta_low * low * A
        return r * A, r * A

    outputs = build_objective("ce-gppo", beta_low=beta_low, beta_high=beta_high)(inputs)
    check(inputs, outputs, [formula(*row) for row in rows(inputs)])
    assert outputs.clipped_high.any()
    assert outputs.clipped_low.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("clip_low", [False, True])
def test_cispo(seed, clip_low, dtype):
    inputs = tokens(seed, dtype=dtype)

    def formula(row, logprob):
        r, A, p = row
        low, high = bounds(inputs.thresholds, p)
        weight = max(min(r, high), low) if clip_low else min(r, high)
        return weight * A * logprob, weight * A

    expected = [formula(*pair) for pair in zip(rows(inputs), inputs.logprob.tolist(), strict=True)]
    check(inputs, build_objective("cispo", clip_low=clip_low)(inputs), expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_gspo_is_the_sequence_form_under_sequence_mean(seed):
    inputs = tokens(seed, spread=4e-3)
    outputs = build_objective("gspo")(inputs)
    lengths = torch.bincount(inputs.sequence_index, minlength=inputs.sequence_count).double()
    weight = 1.0 / (inputs.sequence_count * lengths.clamp(min=1))[inputs.sequence_index]
    got = (weight * outputs.objective).sum()
    (gradient,) = torch.autograd.grad(got, inputs.logprob)
    total, slope, clipped = 0.0, torch.zeros_like(gradient), 0
    for sequence in range(inputs.sequence_count):
        mine = (inputs.sequence_index == sequence).nonzero()[:, 0].tolist()
        if not mine:
            continue
        log_ratios = [(inputs.logprob[i] - inputs.old_logprob[i]).item() for i in mine]
        s = math.exp(sum(log_ratios) / len(mine))
        A = inputs.advantage[mine[0]].item()
        value, d_log_s = ppo(s, A, 1 - 3e-4, 1 + 4e-4)
        clipped += (A > 0 and s > 1 + 4e-4) or (A < 0 and s < 1 - 3e-4)
        total += value / inputs.sequence_count
        for i in mine:  # d ln s / d ln pi_i = 1 / length
            slope[i] = d_log_s / len(mine) / inputs.sequence_count
    assert got.item() == pytest.approx(total, rel=1e-12)
    torch.testing.assert_close(gradient, slope, atol=1e-14, rtol=1e-10)
    assert clipped > 0


def covariances(inputs):
    logprob, advantage = inputs.logprob.tolist(), inputs.advantage.tolist()
    mean_l, mean_a = sum(logprob) / len(logprob), sum(advantage) / len(advantage)
    return [(x - mean_l) * (a - mean_a) for x, a in zip(logprob, advantage, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", SEEDS)
def test_clip_cov_drops_the_right_number_of_the_right_tokens(seed, dtype):
    inputs = tokens(seed, dtype=dtype)
    objective = build_objective("clip-cov", share=0.03, lower=0.5, upper=3.0)
    objective.observe(7, 1.0)
    outputs = objective(inputs)
    sides = [(r, A, *bounds(inputs.thresholds, p)) for r, A, p in rows(inputs)]
    clipped = [(A > 0 and r > high) or (A < 0 and r < low) for r, A, low, high in sides]
    candidates = {
        i for i, (c, out) in enumerate(zip(covariances(inputs), clipped, strict=True)) if 0.5 <= c <= 3.0 and not out
    }
    dropped = {
        i for i, (v, (r, A, *_)) in enumerate(zip(outputs.objective.tolist(), sides, strict=True)) if v == 0 != A
    }
    assert dropped <= candidates
    assert len(dropped) == min(int(0.03 * len(sides)), len(candidates)) == 9
    check(inputs, outputs, [(0.0, 0.0) if i in dropped else ppo(*side) for i, side in enumerate(sides)])
    # The draw is uniform among candidates, changes within a step and from step to step, and repeats on a resumed run.
    second = objective(inputs)
    assert not torch.equal(second.objective, outputs.objective)
    objective.observe(7, 1.0)
    assert torch.equal(objective(inputs).objective, outputs.objective)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", SEEDS)
def test_kl_cov_penalises_the_highest_covariances(seed, dtype):
    inputs = tokens(seed, dtype=dtype)
    cov = covariances(inputs)
    highest = set(sorted(range(len(cov)), key=lambda i: -cov[i])[: int(0.05 * len(cov))])

    def formula(i, r, A):
        penalty = (0.7 * abs(math.log(r)), 0.7 * math.copysign(1, math.log(r))) if i in highest else (0.0, 0.0)
        return r * A - penalty[0], r * A - penalty[1]

    outputs = build_objective("kl-cov", share=0.05, coefficient=0.7)(inputs)
    check(inputs, outputs, [formula(i, r, A) for i, (r, A, _) in enumerate(rows(inputs))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", SEEDS)
def test_sapo_has_a_sigmoid_gate(seed, dtype):
    inputs = tokens(seed, spread=1.5, dtype=dtype)

    def formula(r, A, _):
        tau = 1.0 if A > 0 else 1.05
        gate = 1 / (1 + math.exp(-tau * (r - 1)))
        return 4 / tau * gate * A, 4 * gate * (1 - gate) * r * A

    check(inputs, build_objective("sapo")(inputs), [formula(*row) for row in rows(inputs)])


@pytest.mark.parametrize("divergence", ["tv", "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", SEEDS)
def test_dppo_leaves_out_tokens_that_moved_away(seed, dtype, divergence):
    inputs = tokens(seed, spread=1.5, dtype=dtype)
    bounds = (0.05, 0.08) if divergence == "tv" else (0.01, 0.02)

    def formula(r, A, q):
        p = r * q
        distance = abs(p - q)
        if divergence == "kl":
            distance = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
        is_out = distance > bounds[1] if A > 0 and p > q else A < 0 and p < q and distance > bounds[0]
        slope = 0.0 if is_out else min(r, 2.5) * A
        pull = 0.1 * math.log(r)
        return (slope - pull * math.log(r), slope - 2 * pull), is_out

    expected, left_out = zip(*(formula(*row) for row in rows(inputs)), strict=True)
    outputs = build_objective(
        "dppo",
        divergence=divergence,
        bound_low=bounds[0],
        bound_high=bounds[1],
        max_ratio=2.5,
        log_ratio_penalty=0.1,
    )(inputs)
    check(inputs, outputs, expected)
    assert (outputs.clipped_high | outputs.clipped_low).tolist() == list(left_out)
    assert outputs.clipped_high.any() and outputs.clipped_low.any() and sum(r > 2.5 for r, *_ in rows(inputs)) > 0


@pytest.mark.parametrize("seed", SEEDS)
def test_erc_leaves_out_tokens_whose_entropy_moved(seed):
    inputs = tokens(seed, dtype=torch.float32)
    ratios = [h / old for h, old in zip(inputs.entropy.tolist(), inputs.old_entropy.tolist(), strict=True)]

    def formula(h, r, A, p):
        return ppo(r, A, *bounds(inputs.thresholds, p)) if 0.9 < h < 1.05 else (0.0, 0.0)

    outputs = build_objective("erc", bound_low=0.1)(inputs)
    check(inputs, outputs, [formula(h, *row) for h, row in zip(ratios, rows(inputs), strict=True)])
    assert any(h < 0.9 for h in ratios) and any(0.9 < h < 0.95 for h in ratios) and any(h > 1.05 for h in ratios)
    inputs.old_entropy = inputs.entropy.detach()  # before the first update nothing is left out, also at entropy 0
    inputs.old_entropy[:] = 0.0
    inputs.entropy = inputs.old_entropy.clone()
    plain = build_objective("clip")(inputs).objective
    assert build_objective("erc")(inputs).objective.equal(plain)
    inputs.old_entropy = None
    with pytest.raises(ValueError, match="erc: old_entropy is None"):
        build_objective("erc")(inputs)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_importance_weights_multiply_any_objective(level):
    for name in OBJECTIVES:
        inputs = tokens(1, dtype=torch.float32)
        plain = build_objective(name)(inputs).objective.detach()
        gaps = (inputs.old_logprob - inputs.rollout_logprob).tolist()
        index = inputs.sequence_index.tolist()
        if level == "sequence":
            gaps = [sum(g for g, j in zip(gaps, index, strict=True) if j == i) for i in index]
        weight = torch.tensor([min(math.exp(g), 1.5) for g in gaps])
        assert 0 < (weight == 1.5).sum() < len(weight)
        objective = build_objective(name, importance_cap=1.5, importance_level=level)
        assert objective.importance is not None
        torch.testing.assert_close(objective(inputs).objective.detach(), plain * weight)


def test_token_weights_multiply_value_and_gradient_of_every_objective():
    for name in OBJECTIVES:
        inputs = tokens(2, dtype=torch.float32)
        plain = build_objective(name)(inputs).objective
        (slope,) = torch.autograd.grad(plain.sum(), inputs.logprob)
        inputs.weight = torch.rand(len(slope))
        weighted = build_objective(name)(inputs).objective
        (weighted_slope,) = torch.autograd.grad(weighted.sum(), inputs.logprob)
        torch.testing.assert_close(weighted.detach(), plain.detach() * inputs.weight)
        torch.testing.assert_close(weighted_slope, slope * inputs.weight)


def test_on_policy_every_objective_has_the_plain_policy_gradient():
    for name in OBJECTIVES:
        inputs = tokens(3, dtype=torch.float32)
        inputs.logprob = inputs.old_logprob.clone().requires_grad_()
        inputs.old_entropy = inputs.entropy.detach()
        outputs = build_objective(name)(inputs)
        (slope,) = torch.autograd.grad(outputs.objective.sum(), inputs.logprob)
        differing = (slope - inputs.advantage).abs() > 1e-6
        assert differing.sum() <= (1 if name == "clip-cov" else 0), name
        assert not outputs.clipped_high.any()
        assert not outputs.clipped_low.any()


def test_entropy_bonus_adds_its_share_after_the_token_weights():
    inputs = tokens(0, dtype=torch.float32)
    inputs.weight = torch.rand(300)
    plain = build_objective("clip")(inputs).objective
    objective = build_objective("clip", entropy_coefficient=0.02)
    assert objective.entropy_bonus is not None
    assert build_objective("clip").entropy_bonus is None
    got = objective(inputs).objective
    torch.testing.assert_close(got, plain + 0.02 * inputs.entropy)
    (slope,) = torch.autograd.grad(got.sum(), inputs.entropy)
    torch.testing.assert_close(slope, torch.full_like(slope, 0.02))


def test_adaptive_entropy_bonus_follows_the_rule_and_resumes():
    objective = build_objective("clip", entropy_target=0.2, entropy_increment=0.005)
    c, used = 0.0, []
    for step, entropy in enumerate([0.5, 0.1, 0.15, 0.2, 0.25, 0.1, 0.3, 0.3, 0.3]):
        objective.observe(step, entropy)
        c = max(0.0, c + (0.005 if entropy < 0.2 else -0.005 if entropy > 0.2 else 0.0))
        used.append(c if entropy <= 0.2 else 0.0)
        assert objective.metrics()["objective/entropy_coefficient"] == pytest.approx(used[-1])
        resumed = build_objective("clip", entropy_target=0.2, entropy_increment=0.005)
        resumed.load_state_dict(objective.state_dict())
        assert resumed.metrics() == objective.metrics()
    assert max(used) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="entropy bonus"):
        objective.load_state_dict(build_objective("clip").state_dict())


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("ppo", {}, ["'ppo'", "clip", "ce-gppo"]),
        ("gsp", {}, ["did you mean 'gspo'"]),
        ("clip", {"dual_clp": 3}, ["'dual_clp'", "did you mean 'dual_clip'", "entropy_coefficient"]),
        ("clip", {"dual_clip": 1.0}, ["dual_clip", "greater than 1"]),
        ("gspo", {"eps_low": 1.5}, ["gspo", "eps_low"]),
        ("dcpo", {"max_ratio": 0.5}, ["dcpo", "max_ratio"]),
        ("ce-gppo", {"beta_low": -1.0}, ["ce-gppo", "beta_low"]),
        ("clip-cov", {"share": 0.0}, ["clip-cov", "share"]),
        ("kl-cov", {"coefficient": -1.0}, ["kl-cov", "coefficient"]),
        ("clip", {"importance_cap": 0.5}, ["importance weights: cap", "0.5"]),
        ("clip", {"importance_level": "token"}, ["importance_cap"]),
        ("clip", {"importance_cap": 2.0, "importance_level": "word"}, ["'word'", "token, sequence"]),
        ("clip", {"entropy_coefficient": -0.1}, ["coefficient", "-0.1"]),
        ("clip", {"dual_clip": "three"}, ["objective clip"]),
    ],
)
def test_bad_requests_are_answered_in_one_line(name, parameters, words):
    with pytest.raises(ValueError) as error:
        build_objective(name, **parameters)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_missing_rollout_logprobs_are_named():
    inputs = tokens(0, dtype=torch.float32)
    inputs.rollout_logprob = None
    with pytest.raises(ValueError, match="rollout_logprob"):
        build_objective("clip", importance_cap=2.0)(inputs)
