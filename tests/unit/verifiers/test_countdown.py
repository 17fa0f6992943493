from fractions import Fraction
from itertools import permutations, product

import pytest

from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers import build_verifier
from megatron_rlvr.verifiers.countdown import _evaluate, _reached_by_expression

THREE = {"numbers": [3, 5, 7], "target": 22}


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("3*5=15;15+7=22", 1),
        ("  3 * 5\n= 15 ;\t15 + 7 = 22 ", 1),
        ("3*5=15;15+7=22;", 1),
        ("5*3=15;7+15=22", 1),
        ("<answer> 3*5+7 </answer>", 1),
        ("I try <answer>3+5</answer> no, <answer>(3*5)+7 = 22</answer> done", 1),
        ("<answer>3*5=15;15+7=22", 1),  # the closing tag was a stop string
        ("7 + 5 × 3", 1),
        ("7-3*-5", 1),
        ("-(3*-5)+7", 1),
        ("3*5=15", 0),  # does not reach the target
        ("3*5=15;15+7=23", 0),  # wrong step, wrong target
        ("3*5=16;15+7=22", 0),  # wrong step
        ("3*5=15;15+7=22;22*1=22", 0),  # a number that is not available
        ("5+7=12;3*5=15;15+7=22", 0),  # numbers used twice
        ("3*5=15;15+7=2 2", 0),  # two numbers, not twenty-two
        ("15+7=22", 0),
        ("22", 0),
        ("", 0),
        (";", 0),
        ("=", 0),
        ("3*5=15;;15+7=22", 0),
        ("3*5+7=23", 0),
        ("3*5+7=", 0),
        ("3*5+7=22=22", 0),
        ("3**5+7", 0),
        ("3*(5+7", 0),
        ("3*5)+7", 0),
        ("3(5)+7", 0),
        ("3*5+7+", 0),
        ("()", 0),
        ("3*5+7!", 0),
        ("the answer is 3*5+7", 0),
        ("2²+3*5+7", 0),
        ("(" * 100_000, 0),
        ("9" * 100_000, 0),
        ("-" * 100 + "3*5+7", 1),  # silly, and right
    ],
)
def test_forms(text, reward):
    assert build_verifier("countdown")(text, THREE) == reward


def test_division_is_exact():
    verify = build_verifier("countdown")
    assert verify("8/2=4;4+1=5", {"numbers": [8, 2, 1], "target": 5}) == 1
    assert verify("7/2=3;3+1=4", {"numbers": [7, 2, 1], "target": 4}) == 0
    assert verify("5-5=0;7/0=7", {"numbers": [5, 5, 7], "target": 7}) == 0
    assert verify("7/(5-5)", {"numbers": [5, 5, 7], "target": 7}) == 0
    assert verify("8/(3-8/3)", {"numbers": [8, 3, 8, 3], "target": 24}) == 1  # a fraction in between
    assert verify("3-5=-2;-2+7=5", {"numbers": [3, 5, 7], "target": 5}) == 1
    # In floating point, 1/49*49 is not 1.
    assert verify("1/49*49", {"numbers": [1, 49, 49], "target": 1}) == 1


def test_all_numbers_or_any():
    some = {"numbers": [3, 5, 7, 9], "target": 22}
    for text in ("3*5=15;15+7=22", "3*5+7"):
        assert build_verifier("countdown")(text, some) == 0
        assert build_verifier("countdown", use="any")(text, some) == 1
        assert build_verifier("countdown")(text, some | {"use": "any"}) == 1
        assert build_verifier("countdown", use="any")(text, some | {"use": "all"}) == 0
    assert build_verifier("countdown", use="any")("3*5+7+3-3", some) == 0


def test_an_unused_intermediate_value_counts_as_an_unused_number():
    # 3*5 = 15 is computed and never used; with "all", every number must contribute to the result.
    answer = {"numbers": [3, 5, 7, 2], "target": 9}
    assert build_verifier("countdown")("3*5=15;7+2=9", answer) == 0
    assert build_verifier("countdown", use="any")("3*5=15;7+2=9", answer) == 1


def test_evaluation_equals_python():
    numbers = [8, 3, 2, 6]
    checked = 0
    for order in permutations(numbers):
        for signs in product("+-*/", repeat=3):
            a, b, c, d = order
            for form in ("{}{}{}{}{}{}{}", "({}{}{}){}({}{}{})", "{}{}({}{}({}{}{}))", "-{}{}({}{}{}{}{})"):
                text = form.format(a, signs[0], b, signs[1], c, signs[2], d)
                fractions = "".join(f"Fraction({x})" if x.isdigit() else x for x in text)
                try:
                    expected = eval(fractions, {"Fraction": Fraction})
                except ZeroDivisionError:
                    expected = None
                assert _reached_by_expression(text, numbers, True) == expected, text
                checked += 1
    assert checked == 24 * 64 * 4
    assert _evaluate([]) is None


@pytest.mark.parametrize("answer", ["22", None, {"target": 22}, [3, 5], {"numbers": [3], "target": 3, "use": "some"}])
def test_answers_of_the_wrong_form(answer):
    with pytest.raises(UserError, match="verifier countdown"):
        build_verifier("countdown")("3", answer)


def test_unknown_use():
    with pytest.raises(UserError, match="use must be all or any, found 'most'"):
        build_verifier("countdown", use="most")
