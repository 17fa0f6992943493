"""Corrections of the sampling policy: every preset against its paper's formula, and against what its peers compute.

``PAPERS`` states each formula again, sequence by sequence in plain float64 Python. ``PEERS`` holds weights that the
released verl, TRL and AReaL computed (tools/record_corrections.py).
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch

from megatron_rlvr.objectives import OBJECTIVES, build_objective
from megatron_rlvr.objectives.importance import Correction, ImportanceWeights, SampledTokens, SecondMoment
from megatron_rlvr.objectives.importance_presets import PRESETS, parse_importance
from megatron_rlvr.objectives.order_statistics import largest_cut, quantile
from tests.processes import DEADLINE_SECONDS
from tests.unit.objectives.test_objectives import bounds, ppo, rows, tokens

SEEDS = range(4)


def of_sequences(weigh):
    """Apply ``weigh(gaps, advantage)``, of the log-ratios of one sequence, to every sequence of flat lists."""

    def formula(gaps, index, advantages):
        weights = [0.0] * len(gaps)
        for sequence in set(index):
            members = [i for i, found in enumerate(index) if found == sequence]
            found = weigh([gaps[i] for i in members], advantages[members[0]])
            for i, weight in zip(members, found, strict=True):
                weights[i] = weight
        return weights

    return formula


def tis(cap):  # fengyao.notion.site/off-policy-rl: min(pi_old / pi_rollout, C)
    return of_sequences(lambda d, _: [min(math.exp(x), cap) for x in d])


def sequence_tis(cap):  # richardli.xyz/rl-collapse: min(prod_t ratio_t, C)
    return of_sequences(lambda d, _: [min(math.exp(sum(d)), cap)] * len(d))


def icepop(low, high):  # ringtech.notion.site/icepop: M(k) = k in [alpha, beta], 0 elsewhere
    return of_sequences(lambda d, _: [math.exp(x) if low <= math.exp(x) <= high else 0.0 for x in d])


def mis(cap):  # richardli.xyz/rl-collapse: w(y|x) 1[w(y|x) <= C]
    return of_sequences(lambda d, _: [math.exp(sum(d)) if math.exp(sum(d)) <= cap else 0.0] * len(d))


def geometric(low, high):  # the same: 1[low <= (prod_t ratio_t)^(1/T) <= high]
    return of_sequences(lambda d, _: [float(low <= math.prod(map(math.exp, d)) ** (1 / len(d)) <= high)] * len(d))


def k3(cap):  # Schulman's estimate of KL(rollout || train), mean over a sequence
    return of_sequences(lambda d, _: [float(sum(math.exp(x) - 1 - x for x in d) / len(d) <= cap)] * len(d))


def opsm(delta):  # DeepSeek-V3.2, arXiv 2512.02556, equation 9; here d = ln pi_theta - ln pi_rollout
    return of_sequences(lambda d, a: [float(not (a < 0 and sum(-x for x in d) / len(d) > delta))] * len(d))


def m2po(
    threshold,
):  # arXiv 2510.01161, algorithm 1, among the tokens that PPO could clip; the kept ones as in equation 5
    def formula(gaps, index, advantages):
        region = [i for i, (d, a) in enumerate(zip(gaps, advantages, strict=True)) if (a > 0 < d) or (a < 0 > d)]
        masked = set()
        while region and sum(gaps[i] ** 2 for i in region) / len(region) > threshold:
            worst = max(region, key=lambda i: gaps[i] ** 2)
            region.remove(worst)
            masked.add(worst)
        return [0.0 if i in masked else math.exp(d) for i, d in enumerate(gaps)]

    return formula


PAPERS = {
    "tis": tis(2.0),
    "sequence-tis": sequence_tis(2.0),
    "icepop": icepop(0.5, 5.0),
    "decoupled": icepop(0.0, 5.0),  # arXiv 2505.24298, equation 5, with AReaL's cap on pi_prox / pi_behav
    "mis": mis(3.0),
    "geometric": geometric(0.999, 1.001),
    "k3": k3(0.01),
    "opsm": opsm(0.5),
    "m2po": m2po(0.04),
    # With other values, where those of a preset leave all of these tokens inside or outside.
    "tis(floor=0.7,cap=1.2)": of_sequences(lambda d, _: [min(max(math.exp(x), 0.7), 1.2) for x in d]),
    "decoupled(cap=1.5)": icepop(0.0, 1.5),
    "geometric(floor=0.9,cap=1.1)": geometric(0.9, 1.1),
    "k3(cap=0.08)": k3(0.08),
    "opsm(cap=0.05)": opsm(0.05),
    "m2po(cap=0.1)": m2po(0.1),
}


def expected_weights(text, inputs):
    of = inputs.logprob if "opsm" in text else inputs.old_logprob
    gaps = [a - b for a, b in zip(of.tolist(), inputs.rollout_logprob.tolist(), strict=True)]
    return PAPERS[text](gaps, inputs.sequence_index.tolist(), inputs.advantage.tolist())


@pytest.mark.parametrize("text", PAPERS)
@pytest.mark.parametrize("seed", SEEDS)
def test_value_and_gradient_are_those_of_the_paper(seed, text):
    inputs = tokens(seed, dtype=torch.float32)
    weights = expected_weights(text, inputs)
    objective = build_objective("clip", importance=text)(inputs).objective
    (gradient,) = torch.autograd.grad(objective.sum(), inputs.logprob)
    plain = [ppo(r, A, *bounds(inputs.thresholds, p)) for r, A, p in rows(inputs)]
    for found, column in ((objective.detach(), 0), (gradient, 1)):
        wanted = torch.tensor([w * row[column] for w, row in zip(weights, plain, strict=True)], dtype=torch.float64)
        torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-6)
    if "(" in text:
        assert 5 < sum(w == 0 for w in weights) < 295 or len(set(weights)) > 20


@pytest.mark.parametrize("text", PRESETS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_correction_multiplies_every_objective(name, text):
    inputs = tokens(5)
    plain = build_objective(name)(inputs).objective
    (slope,) = torch.autograd.grad(plain.sum(), inputs.logprob)
    corrected = build_objective(name, importance=text)(inputs).objective
    (corrected_slope,) = torch.autograd.grad(corrected.sum(), inputs.logprob)
    weight = torch.tensor(expected_weights(text, inputs), dtype=corrected.dtype)
    torch.testing.assert_close(corrected.detach(), plain.detach() * weight, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(corrected_slope, slope * weight.to(slope.dtype), atol=1e-6, rtol=1e-6)


PEERS = json.loads((Path(__file__).parent / "peer_corrections.json").read_text())["batches"]
NAMES = [(peer["peer"], peer["importance"]) for peer in PEERS[0]["peers"]]


@pytest.mark.parametrize(("peer", "text"), NAMES)
def test_weights_equal_those_of_verl_trl_and_areal(peer, text):
    """AReaL's M2PO compares all tokens. Here an advantage with the sign of ln r concerns each of them, too."""
    importance, acted = parse_importance(text), []
    for batch in PEERS:
        lengths = torch.tensor(batch["lengths"])
        index = torch.arange(len(lengths)).repeat_interleave(lengths)
        old, rollout, current, advantage = (
            torch.tensor(batch[name], dtype=torch.float64) for name in ("old", "rollout", "current", "advantage")
        )
        advantage = (old - rollout).sign() if "m2po" in text else advantage[index]
        before = importance.before_updates(SampledTokens(old, rollout, advantage, index, len(lengths)))
        during = importance.during_update(SampledTokens(current, rollout, advantage, index, len(lengths)))
        (expected,) = [recorded["weights"] for recorded in batch["peers"] if recorded["peer"] == peer]
        expected = torch.tensor(expected, dtype=torch.float64)
        corrected = before * during
        torch.testing.assert_close(corrected.weight, expected, atol=1e-6, rtol=1e-6)
        acted.append(corrected.masked | corrected.truncated)
    outside = torch.cat(acted)
    assert outside.any() and not outside.all()


def test_every_preset_was_compared_with_a_peer():
    assert {text.partition("(")[0] for _, text in NAMES} >= set(PRESETS)


def test_second_moments_are_cut_over_all_processes():
    """Two threads, each with a share of the tokens, leave out what one with all of them leaves out."""
    inputs = tokens(0)
    per_token = torch.stack([inputs.old_logprob, inputs.rollout_logprob, inputs.advantage]).detach()

    def share(part):
        return SampledTokens(*per_token[:, part], inputs.sequence_index[part], inputs.sequence_count)

    barrier, sums = Barrier(2, timeout=DEADLINE_SECONDS), [torch.zeros(()), torch.zeros(())]

    def masked(rank, part):
        def total(own):
            sums[rank] = own
            barrier.wait()
            both = sums[0] + sums[1]
            barrier.wait()
            return both

        return SecondMoment(0.1)(share(part), total).masked

    with ThreadPoolExecutor() as pool:
        shares = list(pool.map(masked, (0, 1), (slice(0, 100), slice(100, 300))))
    together = SecondMoment(0.1)(share(slice(0, 300))).masked
    alone = [SecondMoment(0.1)(share(part)).masked for part in (slice(0, 100), slice(100, 300))]
    assert torch.equal(torch.cat(shares), together) and together.any() and not torch.equal(torch.cat(alone), together)


EDGES = {  # log-probs of training and rollout, advantage, and the weights of every preset
    "a rollout log-prob of -inf": (
        *([-1.0, -1.0], [-math.inf, -1.0], 1.0),
        {"tis": [2, 1], "sequence-tis": [2, 2], "icepop": [0, 1], "decoupled": [0, 1], "mis": [0, 0]}
        | {"geometric": [0, 0], "k3": [0, 0], "opsm": [1, 1], "m2po": [0, 1]},
    ),
    "a training log-prob of -inf": (
        *([-math.inf, -1.0], [-1.0, -1.0], -1.0),
        {"tis": [0, 1], "sequence-tis": [0, 0], "icepop": [0, 1], "decoupled": [0, 1], "mis": [0, 0]}
        | {"geometric": [0, 0], "k3": [0, 0], "opsm": [0, 0], "m2po": [0, 1]},
    ),
    "both -inf": ([-math.inf, -1.0], [-math.inf, -1.0], 1.0, {name: [1, 1] for name in PRESETS}),
    "one token": (
        *([-2.0], [-1.0], 1.0),
        {name: [math.exp(-1)] for name in ("tis", "sequence-tis", "decoupled", "mis", "m2po")}
        | {"icepop": [0], "geometric": [0], "k3": [0], "opsm": [1]},
    ),
    "no token": ([], [], 1.0, {name: [] for name in PRESETS}),
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges(name, dtype):
    logprob, rollout, advantage, expected = EDGES[name]
    index = torch.zeros(len(logprob), dtype=torch.int64)
    values = SampledTokens(
        *(torch.tensor(x, dtype=dtype) for x in (logprob, rollout)), torch.full((len(logprob),), advantage), index, 2
    )
    for text, weights in expected.items():
        importance = parse_importance(text)
        found = (importance.before_updates(values) * importance.during_update(values)).weight
        torch.testing.assert_close(found, torch.tensor(weights, dtype=dtype), msg=text)
    assert set(expected) == set(PRESETS)


def test_bounds_are_inside_and_rejection_takes_whole_sequences():
    values = SampledTokens(
        torch.tensor([0.0, 2.0, 0.5, 3.0, 1.0], dtype=torch.float64).log().nan_to_num(neginf=0.0),
        torch.zeros(5),
        torch.ones(5),
        torch.tensor([0, 0, 1, 1, 2]),
        3,
    )
    masked = Correction(action="mask", floor=0.5, cap=2.0)(values)
    assert masked.weight.tolist() == pytest.approx([1.0, 2.0, 0.5, 0.0, 1.0]) and masked.masked.sum() == 1
    rejected = Correction(action="reject", floor=0.5, cap=2.0)(values)
    assert rejected.weight.tolist() == [1.0, 1.0, 0.0, 0.0, 1.0] and not rejected.truncated.any()
    truncated = Correction(floor=0.6, cap=2.0)(values)
    assert truncated.weight.tolist() == pytest.approx([1.0, 2.0, 0.6, 2.0, 1.0])
    assert truncated.truncated.tolist() == [False, False, True, True, False]
    both = ImportanceWeights((Correction(action="reject", floor=0.5, cap=2.0), Correction(cap=1.5)))
    assert both.before_updates(values).weight.tolist() == pytest.approx([1.0, 1.5, 0.0, 0.0, 1.0])
    assert both.weigh and not ImportanceWeights((both.corrections[0],)).weigh


@pytest.mark.parametrize("text", PRESETS)
def test_equal_policies_are_not_corrected(text):
    inputs = tokens(1)
    inputs = replace(inputs, rollout_logprob=inputs.old_logprob, logprob=inputs.old_logprob.clone().requires_grad_())
    plain, corrected = (build_objective("cispo", **k)(inputs).objective for k in ({}, {"importance": text}))
    assert torch.equal(plain, corrected)


def test_given_weights_are_used_instead_of_those_of_the_microbatch():
    inputs = replace(tokens(2), importance_weight=torch.full((300,), 0.5, dtype=torch.float64))
    plain = build_objective("gspo")(inputs).objective
    torch.testing.assert_close(build_objective("gspo", importance="mis")(inputs).objective, plain * 0.5)
    follows = build_objective("gspo", importance="opsm(cap=0.05)")(inputs).objective
    weight = torch.tensor(expected_weights("opsm(cap=0.05)", inputs)) * 0.5
    torch.testing.assert_close(follows, plain * weight, check_dtype=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_quantiles_and_cuts_are_exact(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(997, generator=generator, dtype=torch.float64).exp().mul(10.0 ** (seed * 40 - 80))
    ordered = sorted(values.tolist())
    for share in (0.01, 0.5, 0.99, 1.0):
        assert quantile(values, share, 997) == ordered[math.ceil(share * 997) - 1]
    limit = 0.3 * values.mean()
    cut = largest_cut(values, lambda count, sums: sums <= limit * count)
    kept = [v for v in ordered if v <= cut]
    following = ordered[len(kept)]
    assert 0 < len(kept) < 997 and sum(kept) / len(kept) <= limit < (sum(kept) + following) / (len(kept) + 1)
    assert quantile(values[:0], 0.99, 0) == 0.0 and quantile(torch.zeros(5, dtype=torch.float64), 0.99, 5) == 0.0
    assert math.isnan(quantile(torch.full((5,), torch.nan, dtype=torch.float64), 0.99, 5))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("icepob", ["importance", "'icepob'", "did you mean 'icepop'", "m2po"]),
        ("", ["importance: ''", "write for example mis"]),
        ("mis+", ["importance: ''"]),
        ("mis(cap=3", ["'mis(cap=3'", "write for example"]),
        ("mis(3)", ["importance mis", "'3' is not KEY=VALUE", "mis(cap=2)"]),
        ("mis(cp=3)", ["'cp'", "did you mean 'cap'"]),
        ("mis(cap=big)", ["cap must be a number", "'big'"]),
        ("mis(cap=0.5)", ["cap must be at least 1", "0.5"]),
        ("mis(cap=nan)", ["cap", "nan"]),
        ("mis(cap=null)", ["neither floor nor cap", "cap=2.0"]),
        ("mis(level=word)", ["level: unknown 'word'", "token, sequence, geometric"]),
        ("icepop(floor=1.5)", ["floor must be in [0, 1]", "1.5"]),
        ("icepop(floor=-1)", ["floor must be in [0, 1]"]),
        ("k3(action=truncate)", ["only a ratio can be truncated", "mask or reject"]),
        ("k3(floor=-1)", ["k3 is never negative", "only cap"]),
        ("k3(cap=-1)", ["cap must be at least 0"]),
        ("m2po(cap=0)", ["cap must be greater than 0"]),
        ("m2po(cap=null)", ["m2po needs a cap", "m2po(cap=0.04)"]),
        ("icepop(4)", ["importance icepop", "'4' is not KEY=VALUE", "icepop(cap=2)"]),
        ("icepop(floor=3, cap=2)", ["floor must be in [0, 1]", "3.0"]),
        ("tis(cap=0)", ["cap must be at least 1", "0.0"]),
        ("tis(cap=inf)", ["cap must be at most 1e+06", "inf"]),
        ("tis(cap=3, cap=2)", ["importance tis", "cap is given twice"]),
        ("m2po(level=token)", ["importance m2po", "'level'", "valid: cap"]),
    ],
)
def test_a_wrong_correction_is_answered_in_one_line(text, words):
    with pytest.raises(ValueError) as error:
        build_objective("clip", importance=text)
    for word in words:
        assert word in str(error.value) and "\n" not in str(error.value), str(error.value)


def test_the_short_form_and_the_long_one_exclude_each_other():
    short, long = (build_objective("clip", **k) for k in ({"importance_cap": 3.0}, {"importance": "tis(cap=3)"}))
    assert short.importance == long.importance
    with pytest.raises(ValueError, match=r"importance_cap is short for importance=tis.*set only one"):
        build_objective("clip", importance="mis", importance_cap=3.0)
