import sys

import pytest

from megatron_rlvr.config import Config, resolve
from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers import VerifierPool, build_pool, build_verifier, check_answers
from megatron_rlvr.verifiers.config import VerifierConfig
from megatron_rlvr.verifiers.final_answer import final_answer


@pytest.mark.parametrize(
    ("options", "completion", "answer", "reward"),
    [
        ({}, " yes \n", "yes", 1),
        ({}, "a  b", "a b", 1),
        ({}, "Yes", "yes", 0),
        ({"ignore_case": True}, "Yes", "yES", 1),
        ({}, "42", 42, 1),
        ({}, "42.0", 42, 0),
        ({"after": "####"}, "6 * 7 #### 41 no #### 42", 42, 1),
        ({"after": "####"}, "42", 42, 0),
    ],
)
def test_exact(options, completion, answer, reward):
    assert build_verifier("exact", **options)(completion, answer) == reward


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (r"so it is \boxed{34}.", "34", 1),
        (r"so it is \boxed{34}.", 34, 1),
        (r"\boxed{\frac{1}{2}}", "0.5", 1),
        (r"\boxed{\frac12}", r"\frac{1}{2}", 1),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 1),
        (r"first \boxed{3}, then \boxed{4}", "4", 1),
        (r"first \boxed{4}, then \boxed{3}", "4", 0),
        (r"\boxed{34", "34", 0),
        ("work\nAnswer: 34", "34", 1),
        ("work\n**Answer:** $34$", "34", 1),
        ("Answer: 3\nno.\nAnswer: 34", "34", 1),
        (r"Answer: \boxed{34}", "34", 1),
        (r"\boxed{3} no. Answer: 34", "34", 1),
        ("it is 34", "34", 0),
        ("", "34", 0),
        (r"\boxed{35}", "34", 0),
        (r"\boxed{(1, 2)}", "(1,2)", 1),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", 1),
        (r"\boxed{7}", r"The area is 7, so we answer \boxed{7}", 1),
        (r"\boxed{not mathematics at all}", "34", 0),
        (r"\boxed{Tuesday}", "Tuesday", 1),
        (r"\boxed{Monday}", "Tuesday", 0),
        (r"\boxed{34}", r"\notacommand{{", 0),
    ],
)
def test_math(completion, answer, reward):
    assert build_verifier("math")(completion, answer) == reward


def test_math_anywhere():
    assert build_verifier("math", anywhere=True)("it is 34", "34") == 1
    assert build_verifier("math", anywhere=True)("it is 35", "34") == 0


def test_final_answer():
    assert final_answer(r"\boxed{\frac{1}{2}} ok") == r"\frac{1}{2}"
    assert final_answer("Answer:") is None
    assert final_answer("nothing") is None


def test_an_enormous_number_in_an_answer_is_bounded_by_the_pool():
    # 9^(9^(9^9)) has more digits than fit in memory, and sympy tries to compute it.
    enormous = r"\boxed{9^{9^{9^{9}}}}"
    with VerifierPool(build_verifier("math"), workers=1, timeout_s=3, memory_mb=1024) as pool:
        verdicts = pool.verify([enormous, r"\boxed{34}"], ["34", "34"])
    assert verdicts[0].reward == 0
    assert verdicts[1] == (1.0, "ok", "")


@pytest.mark.parametrize(
    ("config", "workers"),
    [
        (VerifierConfig("countdown"), 0),
        (VerifierConfig("exact"), 0),
        (VerifierConfig("math"), 4),  # math-verify is unbounded: without workers, an answer could hang a run
        (VerifierConfig("os.path:join"), 4),
        (VerifierConfig("math", workers=1), 1),
        (VerifierConfig("math", workers=0), 0),
    ],
)
def test_verifiers_that_may_hang_run_in_workers_by_default(config, workers):
    config = resolve(Config(verifier=config), on_gpu=False).verifier
    with build_pool(config) as pool:
        assert len(pool._workers) == workers
    with build_pool(config, start_workers=False) as pool:
        assert not pool._workers


def test_user_function(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def length(completion, answer, scale=1.0):\n    return scale * len(completion)\n_hidden = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build_verifier("my_rewards:length")("abc", None) == 3
    half = build_verifier("my_rewards:length", scale=0.5)
    assert half("abc", None) == 1.5
    with VerifierPool(half, workers=1) as pool:  # imported in another process too
        assert pool.verify(["abcd"], [None])[0].reward == 2
    with pytest.raises(UserError, match="my_rewards has no function width; it has length"):
        build_verifier("my_rewards:width")
    with pytest.raises(UserError, match=r"cannot be called as length\(completion, answer, size=...\)"):
        build_verifier("my_rewards:length", size=2)
    sys.modules.pop("my_rewards")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "countdwon",
            {},
            "verifier 'countdwon' is not known; write one of countdown, exact, math, reasoning_gym or module:function",
        ),
        ("exact", {"case": 1}, "verifier exact has no option 'case'; it has after, ignore_case"),
        ("no_such_module:f", {}, "cannot import no_such_module"),
        (":f", {}, "not of the form module:function"),
        ("json:", {}, "not of the form module:function"),
    ],
)
def test_bad_names_and_options(name, options, message):
    with pytest.raises(UserError, match=message):
        build_verifier(name, **options)


@pytest.mark.parametrize("name", ["exact", "math"])
@pytest.mark.parametrize("answer", [None, ["34"], {"a": 1}])
def test_answers_of_the_wrong_form(name, answer):
    with pytest.raises(UserError, match=f"verifier {name}: the answer must be text or a number"):
        build_verifier(name)(r"\boxed{34}", answer)


def test_answers_of_a_data_set_are_checked_before_the_run():
    good = {"numbers": [3, 5, 7], "target": 22}
    check_answers(build_verifier("countdown"), [good, good | {"use": "any"}])
    check_answers(build_verifier("math"), ["34", 34, r"\frac{1}{2}"])
    check_answers(len, [object()])  # a user's function has no check
    for bad in ("22", good | {"numbers": []}, good | {"numbers": [3, "5"]}, good | {"target": 22.5}):
        with pytest.raises(UserError, match=r"example 1 \(counted from 0\) of the data set: verifier countdown: "):
            check_answers(build_verifier("countdown"), [good, bad])
    with pytest.raises(UserError, match=r"example 2 \(counted from 0\) of the data set: verifier math: .*found list"):
        check_answers(build_verifier("math"), ["1", "2", ["3"]])
