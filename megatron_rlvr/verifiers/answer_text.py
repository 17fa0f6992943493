r"""The text of a mathematical answer, in the ASCII LaTeX that math-verify reads."""

import functools
import re
import unicodedata

_CHARACTERS = {
    **dict.fromkeys("‐‑‒–—―−﹣", "-"),
    **dict.fromkeys("\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u2061\u2062\u200e\u200f", ""),
    **dict.fromkeys("“”„", '"'),
    **dict.fromkeys("‘’", "'"),
    "×": "\\times ", "÷": "\\div ", "·": "\\cdot ", "⋅": "\\cdot ", "∙": "\\cdot ", "±": "\\pm ", "∓": "\\mp ",
    "≤": "\\le ", "≥": "\\ge ", "⩽": "\\le ", "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "∞": "\\infty ",
    "π": "\\pi ", "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "λ": "\\lambda ",
    "φ": "\\phi ", "ω": "\\omega ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ",
    "°": "^{\\circ}", "º": "^{\\circ}", "℃": "^{\\circ}C", "∠": "\\angle ", "△": "\\triangle ", "⁄": "/", "∕": "/",
    "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}", "ℕ": "\\mathbb{N}", "ℚ": "\\mathbb{Q}", "ℂ": "\\mathbb{C}",
    "…": "\\ldots ", "、": ", ", "。": ".", "〈": "\\langle ", "〉": "\\rangle ", "⟨": "\\langle ", "⟩": "\\rangle ",
    "√": "\\sqrt",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+")
_SUBSCRIPT_RUN = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎]+")
_ROOT = re.compile(r"\\sqrt(\d+)")
# Text that a chat template or a tokenizer puts around an answer: <|im_end|>, </s>, <eos>, <end_of_turn>.
_STOP_TEXT = re.compile(
    r"<\|[^|<>\n]{1,40}\|>|</?(?:s|eos|bos|pad|unk|answer|think|end_of_turn|start_of_turn|b|strong|em|i|p|br)\s?/?>"
    r"|\[(?:EOS|END|/?INST)\]",
    re.IGNORECASE,
)

_STYLED = re.compile(
    r"\\(?:mathbf|boldsymbol|bm|bf|mathbb(?=\{\d)|mathsf|mathtt|rm(?=\{)|it(?=\{)|emph|underline|color\{\w+\})"
    r"\s?\{([^{}]*)\}"
)
_STYLE = re.compile(
    r"\\(?:bf|rm|it|sf|tt|displaystyle|textstyle|scriptstyle|large|Large|huge|limits|bigl|bigr|Bigl|Bigr|biggl|biggr"
    r"|big|Big|bigg|Bigg)(?![a-zA-Z])\s?"
)
_SYNONYMS = [
    (re.compile(r"\\(?:dfrac|tfrac|cfrac)(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:leqslant|leqq|leq)(?![a-zA-Z])"), r"\\le "),
    (re.compile(r"\\(?:geqslant|geqq|geq)(?![a-zA-Z])"), r"\\ge "),
    (re.compile(r"\\lt(?![a-zA-Z])"), "<"),
    (re.compile(r"\\gt(?![a-zA-Z])"), ">"),
    (re.compile(r"\\colon(?![a-zA-Z])"), ":"),
    (re.compile(r"\\(?:left\s?)?\\?langle(?![a-zA-Z])"), "("),
    (re.compile(r"\\(?:right\s?)?\\?rangle(?![a-zA-Z])"), ")"),
    (re.compile(r"\\(?:varnothing)(?![a-zA-Z])"), r"\\emptyset "),
    (re.compile(r"\^\s?\\circ(?![a-zA-Z])|\\(?:text)?degree(?![a-zA-Z])"), r"^{\\circ}"),
    (re.compile(r"\\(?:dots|cdots|dotsc)(?![a-zA-Z])"), r"\\ldots "),
    # Commands for space. `_GROUPS_OF_THOUSANDS` and `_SEPARATE_NUMBERS` decide about a space between digits.
    (re.compile(r"(?<!\\)\\(?:[,;:! ]|quad|qquad|thinspace|enspace|space)(?![a-zA-Z])|~"), " "),
    (re.compile(r"(?<!\\)\\[()\[\]]"), " "),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\(?:mathrm|text)\s?\{([ei])\}"), r"\1"),
    (re.compile(r"\\text\s?\{[\s.]*\}|\\checkmark(?![a-zA-Z])|[✓✔✅]"), ""),
    (re.compile(r"(?<=\d)\s?\{,\}\s?(?=\d)"), ""),
]
_CURRENCY = re.compile(r"\\?\$|\\(?:euro|pounds|yen)(?![a-zA-Z])|[€£¥₹₩₽]")
_GROUPS_OF_THOUSANDS = re.compile(r"(?<![\d.,\w])\d{1,3}(?: \d{3})+(?![\d,]|\s?/|\s\d)")
_MIXED_NUMBER = re.compile(r"(?<![\d./])(\d+)\s+(\d+)\s?/\s?(\d+)(?![\d/])")
_MIXED_FRACTION = re.compile(r"(?<=\d)\s+(?=\\frac)")
_SEPARATE_NUMBERS = re.compile(r"(?<=\d) +(?=\d)")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]([-+]?\d+)(?!\w)")
_POWER = r"(?:\s?\^\s?\{?-?\d\}?)?"
_REPEATING = re.compile(
    r"(?<![\d.,])(\d{1,20}|(?<![\w}]))\.(\d{0,20})\\(?:overline|dot|bar)\s?\{(\d{1,20})\}(?![\d\\])"
)
_QUANTITY_IN_TEXT = re.compile(r"\\text\s?\{\s*([-+]?[\d.][^{}]*)\}")
_UNIT = re.compile(rf"(?<=[\d}}])\s+[^\W\d_]{{2,}}\.?{_POWER}(?:[\s/]+[^\W\d_]+\.?{_POWER})*$")
# An exclamation mark ends a sentence only behind a formula: "3!" is a factorial.
_PUNCTUATION = re.compile(r"(?:\\?[.]|(?<!\\)[,;]|(?<=\$)!|\s)+$")
_DELIMITERS = [("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")]
_WRAPPERS = [*_DELIMITERS, ("**", "**"), ("__", "__"), ("*", "*"), ("`", "`"), ('"', '"'), ("'", "'"), ("<", ">")]


def ascii_text(text: str) -> str:
    """Replace Unicode digits, signs and symbols by ASCII and LaTeX, and remove stop text such as <|im_end|>."""
    if not text.isascii():
        text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + run[0].translate(_SUPERSCRIPTS) + "}", text)
        text = _SUBSCRIPT_RUN.sub(lambda run: "_{" + run[0].translate(_SUBSCRIPTS) + "}", text)
        text = text.translate(_Translation())
        text = _ROOT.sub(r"\\sqrt{\1}", text)
    return _STOP_TEXT.sub("", text) if "<" in text or "[" in text else text


def plain_latex(text: str) -> str:
    """Reduce an answer to the expression itself: no delimiters, quotes, style, currency, or spelling of spaces."""
    text = ascii_text(text)
    text = _STYLED.sub(r"\1", _STYLED.sub(r"\1", text))
    text = _STYLE.sub("", text)
    text = _without_wrappers(text)
    for pattern, replacement in _SYNONYMS:
        text = pattern.sub(replacement, text)
    text = _CURRENCY.sub("", text)
    text = _without_wrappers(" ".join(text.split()))
    if quantity := _QUANTITY_IN_TEXT.fullmatch(text):
        text = quantity[1].strip()
    text = _REPEATING.sub(_fraction_of_repeating, text)
    text = _GROUPS_OF_THOUSANDS.sub(lambda number: number[0].replace(" ", ""), text)
    text = _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", text)
    text = _MIXED_FRACTION.sub("", text)
    if "\\" not in text:  # in LaTeX, as in \log_2 3 or \frac 1 2, two numbers may belong to a command
        text = _SEPARATE_NUMBERS.sub(", ", text)
    return _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text).strip()


def _fraction_of_repeating(number: re.Match[str]) -> str:
    """Return 0.1\\overline{6} as a fraction."""
    whole, once, repeated = number.groups()
    difference = int(whole + once + repeated) - int(whole + once or "0")
    return f"\\frac{{{difference}}}{{{10 ** len(once) * (10 ** len(repeated) - 1)}}}"


def without_unit(text: str) -> str:
    """Remove words at the end of a quantity: "34 apples" becomes "34", "60 km/h" becomes "60"."""
    return text if ":" in text else _UNIT.sub("", text)  # the PM of 7:30 PM is no unit


def _without_wrappers(text: str) -> str:
    """Remove delimiters and quotes around the whole text, and punctuation behind it, until nothing changes."""
    while True:
        before = text
        text = _PUNCTUATION.sub("", text.strip())
        for opening, closing in _WRAPPERS:
            if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing):
                inside = text[len(opening) : len(text) - len(closing)]
                if not inside.endswith("\\") and opening not in inside and closing not in inside:
                    text = inside
        if text.startswith("{") and text.endswith("}") and not text.endswith("\\}") and _closes_at_end(text):
            text = text[1:-1]
        if text.count("$") - text.count("\\$") == 1 and (text.startswith("$") or text.endswith("$")):
            text = text.strip("$")
        if text == before:
            return text


def _closes_at_end(text: str) -> bool:
    depth = 0
    for position, character in enumerate(text):
        if text[position - 1 : position] != "\\":
            depth += (character == "{") - (character == "}")
        if depth == 0:
            return position == len(text) - 1
    return False


class _Translation:
    """A table for `str.translate` that is computed on demand."""

    def __getitem__(self, code: int) -> str:
        return _translated(code)


@functools.lru_cache(maxsize=4096)
def _translated(code: int) -> str:
    character = chr(code)
    if code < 128:
        return character
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    if 0xFF01 <= code <= 0xFF5E:  # full-width ASCII
        return chr(code - 0xFF01 + 0x21)
    if unicodedata.category(character) == "Nd":  # decimal digits of any script
        return str(unicodedata.decimal(character))
    if "VULGAR FRACTION" in unicodedata.name(character, "") and "⁄" in unicodedata.normalize("NFKC", character):
        numerator, _, denominator = unicodedata.normalize("NFKC", character).partition("⁄")
        return f"\\frac{{{numerator}}}{{{denominator}}}"
    compatible = unicodedata.normalize("NFKC", character)
    return compatible if compatible.isascii() and compatible.isalpha() else character
