"""The math verifier: pairs of a reference and a completion with the right reward, and degenerate completions."""

import json
import math
from pathlib import Path

import pytest

from megatron_rlvr.errors import UserError
from megatron_rlvr.verifiers import build_verifier
from megatron_rlvr.verifiers.answer_text import ascii_text, plain_latex
from megatron_rlvr.verifiers.final_answer import final_answer, final_answers

PAIRS = [json.loads(line) for line in (Path(__file__).parent / "math_answers.jsonl").read_text().splitlines()]
LONG = 1_000_000


@pytest.mark.parametrize("kind", sorted({pair["kind"] for pair in PAIRS}))
def test_pairs(kind):
    verify = build_verifier("math")
    pairs = [pair for pair in PAIRS if pair["kind"] == kind]
    assert len({pair["reward"] for pair in pairs}) == 2
    wrong = [pair for pair in pairs if verify(pair["completion"], pair["answer"]) != pair["reward"]]
    assert not wrong


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"\boxed{34}. The final answer: see above", "34"),
        ("\\boxed{34}\nAnswer: 35", "35"),
        (r"Answer: 1, \boxed{2}", "2"),
        ("Answer: 3\n\nAnswer: unknown", "3"),
        ("Answer: unknown", "unknown"),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"\boxed{1} and now \boxed{2}", "2"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{3} \boxed{4", None),
        (r"I used \boxed as asked", None),
        ("Answer:\n", None),
        ("#### 34", None),
    ],
)
def test_final_answer(completion, answer):
    assert final_answer(completion) == answer


def test_boxes_with_words_between_them_are_the_last_box_or_all():
    assert final_answers(r"one is \boxed{1} and the other is \boxed{2}") == ["2", "1, 2"]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("３４．５", "34.5"),
        ("−½", r"-\frac{1}{2}"),
        ("x²+y¹⁰", "x^{2}+y^{10}"),
        ("٣٤", "34"),  # Arabic-Indic digits
        ("10\u202f080", "10080"),
        ("1 2", "1, 2"),
        ("3 1/2", r"3\frac{1}{2}"),
        ("1.5e-3", r"1.5 \times 10^{-3}"),
        (r"\log_2 3", r"\log_2 3"),
        (r"$\mathbf{34}$.", "34"),
        ("3!", "3!"),
        (r"\begin{pmatrix}1\\ 2\end{pmatrix}", r"\begin{pmatrix}1\\ 2\end{pmatrix}"),
    ],
)
def test_plain_latex(text, plain):
    assert plain_latex(text) == plain


def test_stop_text_is_no_part_of_an_answer():
    for stop in ("<|im_end|>", "</s>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "<end_of_turn>"):
        assert ascii_text(f"34{stop}") == "34"
    assert ascii_text("1<x<2") == "1<x<2"


@pytest.mark.parametrize(
    "completion",
    [
        "{" * LONG,
        "}" * LONG,
        r"\boxed{" * (LONG // 7),
        r"\boxed{" * (LONG // 8) + "}" * (LONG // 8),
        r"\boxed{" + "3" * LONG + "}",
        r"\boxed{1}," * (LONG // 10),
        "Answer: " * (LONG // 8),
        "Answer: 3" + " " * LONG + "4",
        "Answer: " + "$" * LONG,
        "Answer: " + r"\(" * (LONG // 2),
        "\\" * LONG,
        "<|" * (LONG // 2),
        "answer" + "_" * LONG,
        "Answer: " + "1(" * (LONG // 2),
        "\\boxed{\0}",
        "\\boxed{\ud800}",
    ],
    ids=range(16),
)
def test_degenerate_completions_take_time_linear_in_their_length(completion):
    # A quadratic pass over a million characters takes hours.
    assert build_verifier("math")(completion, "34") == 0


@pytest.mark.parametrize(("first", "second"), [(1e20, 1e21), (1e-5, 1e-6), (1e-7, 2e-7), (0.1, 0.2), (3.0, 3.5)])
def test_numbers_of_parquet_files(first, second):
    verify = build_verifier("math")
    for text in (repr(first), f"{first:.1e}".replace("e", r"\times 10^{") + "}", f"{first:.20f}"):
        assert verify(f"\\boxed{{{text}}}", first) == 1, text
        assert verify(f"\\boxed{{{text}}}", second) == 0, text
    for whole in (6.02e23, 2.0**70):  # as their shortest decimal and as the exact value of the double
        assert verify(f"\\boxed{{{whole:.0f}}}", whole) == verify(f"\\boxed{{{whole!r}}}", whole) == 1
        assert verify(f"\\boxed{{{whole * (1 + 1e-9)!r}}}", whole) == 0
    assert verify(r"\boxed{-\infty}", -math.inf) == 1
    with pytest.raises(UserError, match="found nan"):
        verify(r"\boxed{3}", math.nan)
