"""Mathematical answers, compared with math-verify."""

import contextlib
import logging
import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_rlvr.checked_input import InvalidInputError, parse_json
from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers.answer_text import plain_latex, without_unit
from megatron_rlvr.verifiers.final_answer import final_answer, final_answers

# math-verify's time grows faster than the length of an expression. Longer answers are compared literally.
_LONGEST_ANSWER = 1000
_NUMBER = re.compile(r"([-+]?)\s?(\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)(?: \\times 10\^\{([-+]?\d{1,4})\})?")
_PERCENTAGE = re.compile(r"(.*?)\s?(?:\\?%|\s(?:percent|pct))")
_NUMERAL_IN_BASE = re.compile(r"([\dA-Fa-f]+)_\{?(\d+)\}?")
_WORDS = re.compile(r"[^\W\d_](?:[^\W\d_]|[\s'-])*")
_SHORT_WORDS = ("yes", "no", "true", "false", "even", "odd")
_TEXT_COMMAND = re.compile(r"\\(?:text|mbox|mathrm|textbf|textit|textrm|textnormal)\s?\{([^{}]*)\}")
_CHOICE = re.compile(r"\(?([A-J])(?:\)|[.:](?=\s|$))\s*(.*)", re.DOTALL)
# Decimals are compared as math-verify does, to this many places, and besides with this relative tolerance, without
# which all small numbers would be equal.
_DECIMAL_PLACES, _DECIMAL_TOLERANCE = 6, Fraction(1, 10_000)
_FLOAT64_TOLERANCE = Fraction(1, 10**15)
_EXACT_TOLERANCE = 1e-12


@dataclass(frozen=True)
class MathAnswer:
    r"""1.0 if the completion's final answer is mathematically equal to the reference, else 0.0.

    The final answer is the last \boxed{...} or the last line "Answer: ..." (DAPO's form), whichever comes later. Boxes
    with only a separator between them, as in "\boxed{-2} and \boxed{1}", are one answer. The reference is a string
    (LaTeX or plain text, or a solution that ends in \boxed{...} or "#### ...") or a number. Two numbers are compared as
    numbers, everything else by math-verify. Time and memory of math-verify are unbounded: run it in a VerifierPool with
    workers.

    Attributes:
        anywhere: if the completion has neither form, let math-verify search it for its last expression. Off by
            default, because rewarding unmarked answers teaches the model to guess.

    Raises:
        UserError: on call, if the reference is neither a string nor a number.
    """

    anywhere: bool = False

    def __call__(self, completion: str, answer: Any) -> float:
        self.check_answer(answer)
        reference = _reference_text(answer)
        readings = final_answers(completion)
        if max(map(len, [reference, *readings])) > _LONGEST_ANSWER:
            return float(any(reading.strip() == reference.strip() for reading in readings))
        reference = plain_latex(reference)
        if not reference:
            return 0.0
        if readings:
            candidates = [plain_latex(reading) for reading in readings]
            return float(any(_is_double(answer, text) or _equal(reference, text) for text in candidates))
        return float(self.anywhere and _verify(_parse(_boxed(reference)), _parse(completion)))

    def warm_up(self) -> None:
        """Import math-verify and sympy, which can take seconds."""
        _verify(_parse(_boxed("1")), _parse(_boxed("x")))

    def check_answer(self, answer: Any) -> None:
        """Raise UserError if the answer is neither a string nor a number."""
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise UserError(f"verifier math: the answer must be text or a number, found {type(answer).__name__}")
        if isinstance(answer, float) and math.isnan(answer):
            raise UserError("verifier math: the answer must be text or a number, found nan")


def _reference_text(answer: str | int | float) -> str:
    if isinstance(answer, float):
        if math.isinf(answer):
            return "\\infty" if answer > 0 else "-\\infty"
        # The shortest decimal that gives this double; parquet files hold whole numbers as doubles, too.
        return str(int(answer)) if answer.is_integer() else repr(answer)
    text = str(answer).strip()
    if text.startswith('["') and text.endswith('"]'):
        with contextlib.suppress(InvalidInputError):
            text = ", ".join(map(str, parse_json(text.encode(errors="replace"))))
    text = text.rpartition("####")[2]
    return final_answer(text) or text


def _equal(reference: str, candidate: str) -> bool:
    """Whether two answers, reduced by `plain_latex`, are equal."""
    if not candidate:
        return False
    if _squeezed(_TEXT_COMMAND.sub(r"\1", candidate)) == _squeezed(_TEXT_COMMAND.sub(r"\1", reference)):
        return True
    first, second = _number(reference), _number(candidate)
    if first is not None and second is not None:
        return _numbers_equal(first, second)
    if _percentages_equal(reference, candidate):
        return True
    numerals = _NUMERAL_IN_BASE.fullmatch(reference), _NUMERAL_IN_BASE.fullmatch(candidate)
    if numerals[0] and numerals[1]:
        return numerals[0].groups() == numerals[1].groups()
    words = _spoken(reference), _spoken(candidate)
    if all(map(_WORDS.fullmatch, words)) and (_is_text(reference) or _is_text(candidate)):
        return words[0] == words[1]
    if re.fullmatch("[A-J]", _choice(reference)) and _choice(candidate) == _choice(reference):
        return True
    gold = _parse(_boxed(reference))
    if _verified(gold, candidate):
        return True
    bare = without_unit(candidate), without_unit(reference)
    if bare == (candidate, reference):
        return False
    return _verified(_parse(_boxed(bare[1])), bare[0])


def _squeezed(text: str) -> str:
    return re.sub(r"(?<![\w]) | (?![\w])", "", text)


def _number(text: str) -> Fraction | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    sign, digits, exponent = match.groups()
    return Fraction(sign + digits.replace(",", "").rstrip(".")) * Fraction(10) ** int(exponent or 0)


def _is_double(answer: str | int | float, candidate: str) -> bool:
    """Whether the reference is a double, and the candidate its exact value or its shortest decimal.

    Both are whole numbers of which a data file keeps only the double: 6.02e23 and 2^70.
    """
    if not isinstance(answer, float) or not math.isfinite(answer):
        return False
    return _number(candidate) in (Fraction(answer), Fraction(repr(answer)))


def _numbers_equal(first: Fraction, second: Fraction) -> bool:
    if first == second:
        return True
    difference = abs(first - second) / max(abs(first), abs(second))
    if first.denominator == 1 or second.denominator == 1:
        # A whole number is meant exactly, but 2.9999999999999996 of a data file is 3.
        return first.denominator != second.denominator and difference < _FLOAT64_TOLERANCE
    if difference > _DECIMAL_TOLERANCE:
        return False
    return round(first, _DECIMAL_PLACES) == round(second, _DECIMAL_PLACES)


def _percentages_equal(first: str, second: str) -> bool:
    """Whether one answer is a percentage and the other the same number, with or without the factor of 1/100."""
    for percentage, other in ((first, second), (second, first)):
        match = _PERCENTAGE.fullmatch(percentage)
        if match is None:
            continue
        value, number = _number(match[1].strip()), _number(other)
        if value is not None and number is not None:
            return _numbers_equal(value, number) or _numbers_equal(value / 100, number)
    return False


def _spoken(text: str) -> str:
    r"""Return an answer without commands that only set text, in lower case: "\\text{No}" gives "no"."""
    return " ".join(_TEXT_COMMAND.sub(r"\1", text).casefold().split())


def _is_text(text: str) -> bool:
    """Whether an answer is words rather than a product of variables."""
    return (
        "\\text" in text or text.casefold() in _SHORT_WORDS or (len(text) >= 5 and _WORDS.fullmatch(text) is not None)
    )


def _choice(text: str) -> str:
    """Return the letter of an answer to a multiple-choice question, such as "(C)" or "C. 34", or the text itself."""
    spoken = _TEXT_COMMAND.sub(r"\1", text).strip()
    match = _CHOICE.fullmatch(spoken)
    return match[1] if match else spoken


def _boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


def _parse(text: str) -> list[Any]:
    # Imported on first use, because it imports sympy, which other verifiers do not need.
    from math_verify import parse

    # math-verify would warn in every process that its time limit is off. The pool enforces the limit instead, because
    # math-verify uses a signal handler, which never runs while a worker is stuck in C code.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse(text, parsing_timeout=None)


def _verify(gold: list[Any], candidate: list[Any]) -> bool:
    from math_verify import verify

    # An interval and an inequality that describe the same numbers are equal, whichever of them is the reference.
    return bool(verify(gold, candidate, allow_set_relation_comp=True, timeout_seconds=None))


def _verified(gold: list[Any], candidate: str) -> bool:
    parsed = _parse(_boxed(candidate))
    return _verify(gold, parsed) and not _certainly_unequal(gold, parsed)


def _certainly_unequal(gold: list[Any], candidate: list[Any]) -> bool:
    """Whether two constants differ that math-verify takes as equal because it compares with an absolute tolerance."""
    import sympy

    if not gold or not candidate:
        return False
    first, second = gold[0], candidate[0]
    if first == second:
        return False
    for value in (first, second):
        if not isinstance(value, sympy.Expr) or not value.is_number or value.has(sympy.UnevaluatedExpr):
            return False
    try:
        first, second = first.doit(), second.doit()
        if not (first.is_finite and second.is_finite) or first.is_zero or second.is_zero:
            return False
        tolerance = float(_DECIMAL_TOLERANCE) if first.has(sympy.Float) or second.has(sympy.Float) else _EXACT_TOLERANCE
        return bool(abs(sympy.N(first / second, 30) - 1) > tolerance)
    except (ArithmeticError, TypeError, ValueError):
        return False
