r"""Where a completion states its final answer: \boxed{...}, or a line "Answer: ...".

Every function takes time proportional to the length of the completion, whatever it contains.
"""

import collections
import re
from dataclasses import dataclass

from megatron_rlvr.verifiers.answer_text import ascii_text

# A box, a box without braces around a number, an escaped character, or a brace. Escaped braces do not count in TeX.
_BRACES = re.compile(r"(?<!\\)\\+(?:boxed|fbox)\s*(?:\{|([-+]?\d[\w.,/]*))|\\.|[{}]", re.DOTALL)
_ANSWER_LINE = re.compile(r"(?<![^\W_])answer[*_]{0,3}\s{0,3}:[*_]{0,3}", re.IGNORECASE)
_DISPLAY_MATH = {"$$": "$$", "\\[": "\\]"}
_BEFORE_CONTENT = re.compile(r"[\s*_]*")
_MOST_LINES, _LONGEST_LINE = 100, 4000
# An answer line after a box replaces it only if it starts with an expression: "Final answer: see above" does not.
_EXPRESSION_START = re.compile(r"[-+$\\(\[{<>|\d.\"'*]|[^\W\d_](?![^\W\d_])")
# What may stand between two boxes that are parts of one answer, without white space and math delimiters: "and", ",y=".
_UNSPACED = re.compile(r"[\s$]|\\[()\[\]]")
_JOINER = re.compile(
    r"(?:[,;&]|and|or|\\(?:text|mbox)\{,?(?:and|or)\}|\\q?quad|\\[,;\\])*(?:[A-Za-z](?:_\w|_\{\w\})?=)?", re.IGNORECASE
)
_SEPARATOR = re.compile(r"\b(?:and|or)\b|[,;]")
_FEW_CHARACTERS, _MANY_CHARACTERS = 10, 70
_FORMULA = r"(?:\$\$[^$]+\$\$|\$(?:\\\$|[^$\n])+\$|\\\((?:[^\\]|\\(?!\)))+\\\))"
_FORMULAS = re.compile(
    rf"{_FORMULA}(?:\s*(?:,?\s*\b(?:and|or)\b|[,;])\s*{_FORMULA})*(?!\s*(?:,|;|and|or)\s*[-+$\\(\d])"
)
_PROSE = re.compile(
    r"[.?](?:\s|$)|!\s|[,;(]\s*(?!(?:and|or)\b)(?=[^\W\d_]{2})|\s[-(\[]\s*(?=[^\W\d_]{2})"
    r"|\s(?:because|since|as|where|which|so|for|by|when|if|is|are|was|were)\s",
    re.IGNORECASE,
)
_CHOICE_START = re.compile(r"[A-Z][.)]")


@dataclass(frozen=True)
class _Box:
    start: int
    end: int
    content: str


def final_answer(completion: str) -> str | None:
    r"""Return the text of the last \boxed{...} or "Answer: ..." line, or None if there is neither.

    Boxes with nothing but a separator between them are one answer: "\boxed{-2} and \boxed{1}" gives "-2, 1".
    """
    readings = final_answers(completion)
    return readings[0] if readings else None


def final_answers(completion: str) -> list[str]:
    """Return the readings of the final answer, the most literal one first; empty if there is no final answer.

    There is a second reading if an answer line ends in an exclamation mark behind a digit, and if the last
    boxes are near each other, with a separator and other words between them: then the answer may be the last one or all
    of them.
    """
    text = ascii_text(completion)
    boxes, unclosed_from = _boxes(text)
    box = boxes[-1] if boxes else None
    line = _last_answer_line(text, after=max(unclosed_from, box.end if box else 0), any_text=not boxes)
    if line is not None:
        # An exclamation mark at the end of "Answer: 3!" is a factorial or ends the sentence.
        return [line, line[:-1]] if re.search(r"\d!$", line) else [line] if line else []
    if box is None or unclosed_from > box.start:
        return []
    readings = []
    for near in (_joined, _near):
        parts = [box]
        for earlier in reversed(boxes[:-1]):
            between = text[earlier.end : parts[0].start]
            if not near(between, earlier, parts[0]):
                break
            if earlier.content != parts[0].content:
                parts.insert(0, earlier)
            else:
                parts[0] = earlier
        reading = ", ".join(part.content for part in parts)
        if reading and reading not in readings:
            readings.append(reading)
    return readings


def _joined(between: str, earlier: _Box, later: _Box) -> bool:
    return len(between) < _MANY_CHARACTERS and _JOINER.fullmatch(_UNSPACED.sub("", between)) is not None


def _near(between: str, earlier: _Box, later: _Box) -> bool:
    # The rule of math-verify (latex2sympy2_extended, extract_boxed_content).
    if len(between) < _FEW_CHARACTERS:
        return True
    different = earlier.content != later.content
    return different and len(between) < _MANY_CHARACTERS and _SEPARATOR.search(between) is not None


def _boxes(text: str) -> tuple[list[_Box], int]:
    """Return the innermost closed boxes in order, and the start of the last box that is not closed (-1: none)."""
    open_braces: list[int] = []  # start of the box that the brace opens, -1 for other braces
    starts: list[int] = []
    found: list[_Box] = []
    for token in _BRACES.finditer(text):
        if token[1] is not None:
            found.append(_Box(token.start(), token.end(), token[1].rstrip(".,")))
        elif token[0] == "}":
            if not open_braces:
                continue
            start = open_braces.pop()
            if start >= 0:
                content_start = starts.pop()
                # A box around a box adds nothing: the inner one is the answer.
                if not (found and found[-1].start >= content_start):
                    found.append(_Box(start, token.end(), text[content_start : token.start()].strip()))
        elif token[0] == "{":
            open_braces.append(-1)
        elif token[0].endswith("{") and len(token[0]) > 2:
            open_braces.append(token.start())
            starts.append(token.end())
    return found, max((start for start in open_braces if start >= 0), default=-1)


def _last_answer_line(text: str, after: int, any_text: bool) -> str | None:
    """Return the content of the last answer line behind position `after`; None if there is none.

    Args:
        text: the completion.
        after: end of the last box, which an answer line replaces only if it starts with an expression.
        any_text: whether a line that does not start with an expression counts if there is no other.
    """
    matches = collections.deque(_ANSWER_LINE.finditer(text, after), maxlen=_MOST_LINES)
    fallback = None
    for match in reversed(matches):
        content = _line_content(text, match.end())
        if content and _EXPRESSION_START.match(content):
            return content
        fallback = fallback or content
    return fallback if any_text else None


def _line_content(text: str, start: int) -> str:
    """Return the expression that starts at `start`, or on the next line if this one is empty."""
    before = _BEFORE_CONTENT.match(text, start)
    assert before is not None  # it matches the empty string
    text = text[before.end() : before.end() + _LONGEST_LINE]
    for opening, closing in _DISPLAY_MATH.items():
        end = text.find(closing, len(opening))
        if text.startswith(opening) and end > 0:
            return text[: end + len(closing)]
    line = text.partition("\n")[0].strip()
    formulas = _FORMULAS.match(line)
    if formulas:
        return formulas[0]
    if line[:1] not in ("$", "\\"):
        prose = _PROSE.search(line, 1)
        # A single capital and a period or parenthesis, "C. 34", is a choice and no sentence.
        if prose and not (prose.start() == 1 and _CHOICE_START.match(line)):
            line = line[: prose.start()]
    return line.strip().rstrip("*_").rstrip()
