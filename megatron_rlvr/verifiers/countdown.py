"""Countdown: reach a target from given numbers with + - * and /, in exact arithmetic."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_rlvr.errors import UserError

# No honest play has numbers as long as this; Python's integers would grow without bound.
_DIGITS = 12
# One step in the text with white space removed: "3*5=15". Values may be negative, and must be whole numbers.
_STEP = re.compile(rf"(-?\d{{1,{_DIGITS}}})([-+*/])(-?\d{{1,{_DIGITS}}})=(-?\d{{1,{_DIGITS}}})")
_TOKEN = re.compile(rf"\d{{1,{_DIGITS}}}|[-+*/()]")
_EXPRESSION_CHARACTERS = frozenset("0123456789+-*/()")
_SPLIT_NUMBER = re.compile(r"\d\s+\d")
_TYPESET = str.maketrans({"×": "*", "÷": "/", "−": "-"})
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "negate": 3}


@dataclass(frozen=True)
class Countdown:
    """1.0 if the completion reaches the target from the numbers, else 0.0.

    Two forms are read, with any white space between tokens, inside the last <answer>...</answer> if there is one:
    steps, "3*5=15;15+7=22", each of two values that are still at hand and each correct, the last one giving the
    target; or one expression, "3*5+7" with parentheses, "=22" after it allowed. Arithmetic is exact; division in
    steps must come out whole, in an expression it may give fractions in between.

    The answer is {"numbers": [3, 5, 7], "target": 22}, and may say "use": "all" (every number exactly once) or "any"
    (every number at most once); ``use`` is the default for answers that do not say. Raises UserError if the answer is
    of another form.
    """

    use: str = "all"

    def __post_init__(self) -> None:
        if self.use not in ("all", "any"):
            raise UserError(f"verifier countdown: use must be all or any, found {self.use!r}")

    def __call__(self, completion: str, answer: Any) -> float:
        numbers, target, use = self._read_answer(answer)
        text = _answer_text(completion)
        # "1 5" is two numbers: with the blank gone it would read as fifteen.
        if _SPLIT_NUMBER.search(text):
            return 0.0
        text = "".join(text.split())
        # A play of n numbers has n - 1 steps; anything much longer is not worth reading.
        if not text or len(text) > len(numbers) * 4 * (_DIGITS + 2):
            return 0.0
        if not text.isascii():
            text = text.translate(_TYPESET)
        reached: Fraction | int | None
        if ";" in text or _STEP.fullmatch(text):
            reached = _reached_by_steps(text, numbers, use == "all")
        else:
            reached = _reached_by_expression(text, numbers, use == "all")
        return 1.0 if reached is not None and reached == target else 0.0

    def check_answer(self, answer: Any) -> None:
        """Raise UserError if an answer is not of the form that ``__call__`` reads."""
        numbers, target, _ = self._read_answer(answer)
        whole = isinstance(numbers, list) and all(type(value) is int and value >= 0 for value in numbers)
        if not whole or not numbers or type(target) is not int:
            raise UserError(f"verifier countdown: numbers and target must be whole numbers, found {answer!r}")

    def _read_answer(self, answer: Any) -> tuple[list[int], int, str]:
        try:
            numbers, target = answer["numbers"], answer["target"]
            use = answer.get("use", self.use)
        except (TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f'verifier countdown: expected an answer like {{"numbers": [3, 5, 7], "target": 22}}, found {answer!r}'
            ) from error
        if use not in ("all", "any"):
            raise UserError(f"verifier countdown: an answer's use must be all or any, found {use!r}")
        return numbers, target, use


def _answer_text(completion: str) -> str:
    """What stands in the last <answer>...</answer>, or everything; the closing tag may have been cut off as a stop."""
    start = completion.rfind("<answer>")
    if start < 0:
        return completion
    return completion[start + len("<answer>") :].partition("</answer>")[0]


def _reached_by_steps(text: str, numbers: list[int], use_all: bool) -> int | None:
    """The last value of a play in steps, or None if a step is wrong or takes what is not at hand."""
    pool = list(numbers)
    steps = text.removesuffix(";").split(";")
    # Each step takes two values and gives one back.
    if len(steps) >= len(pool):
        return None
    value = None
    for step in steps:
        match = _STEP.fullmatch(step)
        if match is None:
            return None
        left, sign, right, value = int(match[1]), match[2], int(match[3]), int(match[4])
        if sign == "+":
            correct = left + right == value
        elif sign == "*":
            correct = left * right == value
        elif sign == "-":
            correct = left - right == value
        else:
            correct = right != 0 and value * right == left
        if not correct or left not in pool:
            return None
        pool.remove(left)
        if right not in pool:
            return None
        pool.remove(right)
        pool.append(value)
    # Every number used and no intermediate value left lying about: the last value alone remains. Without that demand,
    # steps that do not lead to the last value are idle but harmless.
    return None if use_all and len(pool) != 1 else value


def _reached_by_expression(text: str, numbers: list[int], use_all: bool) -> Fraction | None:
    """The value of an expression, or None if it is malformed, divides by zero or uses other numbers."""
    text, equals, claimed = text.partition("=")
    if not _EXPRESSION_CHARACTERS.issuperset(text):
        return None
    tokens = _TOKEN.findall(text)
    used = [int(token) for token in tokens if token.isdigit()]
    pool = list(numbers)
    for number in used:
        if number not in pool:
            return None
        pool.remove(number)
    if use_all and pool:
        return None
    value = _evaluate(tokens)
    if equals and (value is None or claimed != str(value)):
        return None
    return value


def _evaluate(tokens: list[str]) -> Fraction | None:
    """Shunting-yard, without recursion: a thousand open parentheses are only a malformed expression."""
    values: list[Fraction] = []
    operators: list[str] = []
    expect_value = True
    for token in tokens:
        if token.isdigit():
            if not expect_value:
                return None
            values.append(Fraction(int(token)))
            expect_value = False
        elif token == "(":
            if not expect_value:
                return None
            operators.append(token)
        elif token == ")":
            if expect_value:
                return None
            while operators and operators[-1] != "(":
                if not _apply(operators.pop(), values):
                    return None
            if not operators:
                return None
            operators.pop()
        elif expect_value:
            if token != "-":
                return None
            operators.append("negate")
        else:
            while operators and operators[-1] != "(" and _PRECEDENCE[operators[-1]] >= _PRECEDENCE[token]:
                if not _apply(operators.pop(), values):
                    return None
            operators.append(token)
            expect_value = True
    if expect_value:
        return None
    while operators:
        operator = operators.pop()
        if operator == "(" or not _apply(operator, values):
            return None
    return values[0]


def _apply(operator: str, values: list[Fraction]) -> bool:
    """Apply an operator to the values on the stack; False for a division by zero."""
    right = values.pop()
    if operator == "negate":
        values.append(-right)
        return True
    left = values.pop()
    if operator == "/" and right == 0:
        return False
    if operator == "+":
        values.append(left + right)
    elif operator == "-":
        values.append(left - right)
    elif operator == "*":
        values.append(left * right)
    else:
        values.append(left / right)
    return True
