"""Countdown: reach a target from given numbers with + - * and /, in exact arithmetic."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_rlvr.errors import UserError

# No valid solution needs longer numbers. Without a limit, Python's integers would grow without bound.
_DIGITS = 12
# One step, such as "3*5=15", in text without white space. Values are integers and may be negative.
_STEP = re.compile(rf"(-?\d{{1,{_DIGITS}}})([-+*/])(-?\d{{1,{_DIGITS}}})=(-?\d{{1,{_DIGITS}}})")
_TOKEN = re.compile(rf"\d{{1,{_DIGITS}}}|[-+*/()]")
_EXPRESSION_CHARACTERS = frozenset("0123456789+-*/()")
_SPLIT_NUMBER = re.compile(r"\d\s+\d")
_TYPESET = str.maketrans({"×": "*", "÷": "/", "−": "-"})
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "negate": 3}


@dataclass(frozen=True)
class Countdown:
    """1.0 if the completion reaches the target from the numbers, else 0.0.

    Two forms are accepted, with any white space between tokens, inside the last <answer>...</answer> if there is one:

    - steps, "3*5=15;15+7=22": each step is correct and combines two values that are still available, and the last step
      gives the target. Divisions must have integer results.
    - one expression, "3*5+7", with parentheses, optionally followed by "=22". Intermediate results may be fractions.

    The answer is {"numbers": [3, 5, 7], "target": 22}, optionally with "use": "all" (each number exactly once) or "any"
    (each number at most once).

    Attributes:
        use: the value of "use" for answers without it.

    Raises:
        UserError: on call, if the answer has another form.
    """

    use: str = "all"

    def __post_init__(self) -> None:
        if self.use not in ("all", "any"):
            raise UserError(f"verifier countdown: use must be all or any, found {self.use!r}")

    def __call__(self, completion: str, answer: Any) -> float:
        numbers, target, use = self._read_answer(answer)
        text = _answer_text(completion)
        # "1 5" is two numbers; without the space it would become fifteen.
        if _SPLIT_NUMBER.search(text):
            return 0.0
        text = "".join(text.split())
        # A solution with n numbers has n - 1 steps. Much longer text cannot be one.
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
        """Raise UserError if the answer does not have the form that ``__call__`` reads."""
        numbers, target, _ = self._read_answer(answer)
        valid = isinstance(numbers, list) and all(type(value) is int and value >= 0 for value in numbers)
        if not valid or not numbers or type(target) is not int:
            raise UserError(
                "verifier countdown: numbers must be a list of integers of at least 0 and target an integer, "
                f"found {answer!r}"
            )

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
    """Return the text in the last <answer>...</answer>, or the whole text without one.

    The closing tag may be missing, because a stop string may have removed it.
    """
    start = completion.rfind("<answer>")
    if start < 0:
        return completion
    return completion[start + len("<answer>") :].partition("</answer>")[0]


def _reached_by_steps(text: str, numbers: list[int], use_all: bool) -> int | None:
    """Return the result of the last step, or None if a step is wrong or uses a value that is not available."""
    available = list(numbers)
    steps = text.removesuffix(";").split(";")
    # Each step replaces two values by one.
    if len(steps) >= len(available):
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
        if not correct or left not in available:
            return None
        available.remove(left)
        if right not in available:
            return None
        available.remove(right)
        available.append(value)
    # Once every number and every intermediate value is used, only the last value remains. With use="any", steps that do
    # not contribute to it are allowed.
    return None if use_all and len(available) != 1 else value


def _reached_by_expression(text: str, numbers: list[int], use_all: bool) -> Fraction | None:
    """Return the value of an expression, or None if it is malformed, divides by zero, or uses other numbers."""
    text, equals, claimed = text.partition("=")
    if not _EXPRESSION_CHARACTERS.issuperset(text):
        return None
    tokens = _TOKEN.findall(text)
    used = [int(token) for token in tokens if token.isdigit()]
    available = list(numbers)
    for number in used:
        if number not in available:
            return None
        available.remove(number)
    if use_all and available:
        return None
    value = _evaluate(tokens)
    if equals and (value is None or claimed != str(value)):
        return None
    return value


def _evaluate(tokens: list[str]) -> Fraction | None:
    """Evaluate by shunting-yard. Without recursion, a thousand open parentheses are just a malformed expression."""
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
    """Apply an operator to the values on top of the stack; returns False for a division by zero."""
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
