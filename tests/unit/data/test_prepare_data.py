import json

import prepare_data
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from megatron_rlvr.data import load_examples
from megatron_rlvr.verifiers import build_verifier, check_answers


def run(*arguments):
    return prepare_data.main([*map(str, arguments)])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_dapo_parquet(tmp_path, capsys):
    def row(question, answer):
        return {
            "data_source": "math_dapo",
            "prompt": [{"content": f"Solve. Answer: $Answer\n\n{question}", "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule"},
            "extra_info": {"index": "x"},
        }

    rows = [row(f"q{i}", str(i)) for i in range(200)] * 3 + [row("twice", "1"), row("twice", "2")]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "dapo.parquet")
    assert run(tmp_path / "dapo.parquet", "--output", tmp_path / "out", "--held-out-share", "0.1") == 0
    assert "602 rows, 400 duplicates dropped, 1 prompts with different answers dropped" in capsys.readouterr().out
    train = load_examples(tmp_path / "out" / "train.jsonl")
    held_out = load_examples(tmp_path / "out" / "heldout.jsonl")
    assert 5 <= len(held_out) <= 40 and len(train) + len(held_out) == 200
    pairs = [(example.prompt[0]["content"].split()[-1], example.answer) for example in train + held_out]
    assert sorted(pairs) == sorted((f"q{i}", str(i)) for i in range(200))
    assert {example.source for example in train} == {"math_dapo"}
    assert not list((tmp_path / "out").glob("*.partial"))

    # With fewer rows in another order, the same prompts are held out.
    parquet.write_table(arrow.Table.from_pylist(rows[150:20:-1]), tmp_path / "part.parquet")
    assert run(tmp_path / "part.parquet", "--output", tmp_path / "b", "--held-out-share", "0.1") == 0
    part = {example.prompt[0]["content"] for example in load_examples(tmp_path / "b" / "heldout.jsonl")}
    assert part < {example.prompt[0]["content"] for example in held_out}


def test_wording(tmp_path):
    rows = [{"question": f"q{i}?", "answer": f"so 1+{i} #### {i + 1}"} for i in range(20)]
    path = write(tmp_path / "gsm.jsonl", rows)
    options = ["--prompt-key", "question", "--answer-after", "####", "--held-out-share", "0"]
    template = "{prompt} Put it within \\boxed{{}}."
    assert run(path, "--output", tmp_path / "out", *options, "--chat", "--template", template) == 0
    first = load_examples(tmp_path / "out" / "train.jsonl")[0]
    assert first.prompt == [{"role": "user", "content": "q0? Put it within \\boxed{}."}]
    assert (first.answer, first.source) == ("1", "gsm")
    assert not (tmp_path / "out" / "heldout.jsonl").exists()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "p", "answer": "1"}], ["--answer-after", "####"], "no '####' in the answer '1'"),
        ([{"prompt": "p", "answer": "1"}], ["--template", "no place"], "does not contain {prompt}"),
        ([{"prompt": "p", "answer": "1"}], ["--template", "{prompt} {x}"], "double any other brace"),
        ([{"prompt": "p", "answer": "1"}], ["--held-out-share", "1"], "--held-out-share"),
        ([{"prompt": [{"role": "user", "content": "p"}], "answer": "1"}], ["--chat"], "chat messages already"),
        ([{"prompt": "p", "answer": "1"}, {"prompt": "p"}], [], "bad.jsonl line 2: no answer under 'answer'"),
        ([], [], "no examples in the file"),
    ],
)
def test_bad_input_is_one_line(tmp_path, rows, options, message, capsys):
    assert run(write(tmp_path / "bad.jsonl", rows), "--output", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer "
    'on its own line after "Answer:".'
)


def published_gsm8k(folder):
    rows = [
        {"question": f"q{i}?", "answer": f"Half is {i}/2 = <<{i}/2=1>>1.\n#### {answer}"}
        for i, answer in enumerate(("72", "1,000", "-5", "$0.5"))
    ]
    parquet.write_table(arrow.Table.from_pylist(rows[:3]), folder / "train-00000-of-00001.parquet")
    write(folder / "test.jsonl", [rows[3], rows[0]])  # the first training question is held out, too
    return folder / "train-00000-of-00001.parquet", folder / "test.jsonl", [("q1?", "1000"), ("q2?", "-5")], "gsm8k"


def published_math(folder):
    solutions = [
        r"We get $\frac{1}{2}$, so $\boxed{\frac{\sqrt{3}}{2}}$.",
        r"first \boxed{1}. Then $\boxed{2}$",
        r"\fbox{4}",
    ]
    for number, solution in enumerate(solutions):
        row = {"problem": f"p{number}", "level": "Level 5", "type": "Algebra", "solution": solution}
        file = folder / "train" / ("algebra" if number < 2 else "geometry") / f"{10 - number}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row))
    held_out = {
        "problem": "p",
        "solution": r"\boxed{9}",
        "answer": "9 ",
        "subject": "Algebra",
        "level": 2,
        "unique_id": "u",
    }
    write(folder / "test.jsonl", [held_out])
    pairs = [("p0", r"\frac{\sqrt{3}}{2}"), ("p1", "2"), ("p2", "4")]
    return folder / "train", folder / "test.jsonl", pairs, "math"


def published_dapo(folder):
    def row(question, answer):
        return {
            "data_source": "math_dapo",
            "prompt": [{"content": DAPO.format(question), "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
        }

    parquet.write_table(arrow.Table.from_pylist([row("Find\n\n$x$.", "34")] * 5), folder / "dapo-math-17k.parquet")
    processed = row("", "7") | {
        "prompt": "Find $y$.",
        "solution": "7",
        "source_prompt": row("Find $y$.", "7")["prompt"],
    }
    parquet.write_table(arrow.Table.from_pylist([processed]), folder / "processed.parquet")
    return folder / "dapo-math-17k.parquet", folder / "processed.parquet", [("Find\n\n$x$.", "34")], "math_dapo"


@pytest.mark.parametrize(
    ("recipe", "published"), [("gsm8k", published_gsm8k), ("math", published_math), ("dapo", published_dapo)]
)
def test_recipes_read_what_is_published(tmp_path, recipe, published, capsys):
    train, held_out, pairs, source = published(tmp_path)
    assert run("--recipe", recipe, train, "--heldout", held_out, "--output", tmp_path / "out") == 0
    examples = load_examples(tmp_path / "out" / "train.jsonl")
    request = "\n\nThink step by step, and put the final answer within \\boxed{}."
    assert all(message["role"] == "user" for example in examples for message in example.prompt)
    found = [(example.prompt[0]["content"], example.answer) for example in examples]
    assert sorted(found) == sorted((question + request, answer) for question, answer in pairs)
    assert {example.source for example in examples} == {source}
    check_answers(build_verifier("math"), [example.answer for example in examples])
    assert load_examples(tmp_path / "out" / "heldout.jsonl")[0].source == source
    leaked = 1 if recipe == "gsm8k" else 0
    assert f"{leaked} training prompts that are held out dropped" in capsys.readouterr().out
    assert run("--recipe", recipe, train, "--output", tmp_path / "b", "--text", "--held-out-share", "0") == 0
    assert load_examples(tmp_path / "b" / "train.jsonl")[0].prompt.endswith(request)
    assert run("--recipe", recipe, train, "--output", tmp_path / "c", "--template", "Q: {prompt}") == 0


@pytest.mark.parametrize(
    ("recipe", "row", "options", "message"),
    [
        ("gsm8k", {"question": "q", "answer": "72"}, [], "has no '####' in its answer"),
        ("gsm8k", {"problem": "q", "answer": "#### 1"}, [], "no prompt under 'question'"),
        ("math", {"problem": "p", "solution": "so it is 4"}, [], "neither 'answer' nor a \\boxed{} in 'solution'"),
        ("math", {"question": "p", "answer": "4"}, [], "no text under 'problem'; found the keys 'question', 'answer'"),
        (
            "dapo",
            {"prompt": [{"role": "user", "content": "p"}], "reward_model": {"ground_truth": "1"}},
            [],
            "leave out",
        ),
        ("dapo", {"prompt": "p", "answer": "1"}, [], "no answer under 'reward_model.ground_truth'"),
        ("gsm8k", {"question": "q", "answer": "#### 1"}, ["--prompt-key", "question"], "omit --prompt-key"),
    ],
)
def test_recipes_refuse_other_data_in_one_line(tmp_path, recipe, row, options, message, capsys):
    file = write(tmp_path / "other.jsonl", [row])
    assert run("--recipe", recipe, file, "--output", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_a_damaged_file_of_math_is_named(tmp_path, capsys):
    (tmp_path / "MATH" / "algebra").mkdir(parents=True)
    (tmp_path / "MATH" / "algebra" / "7.json").write_text("{")
    assert run("--recipe", "math", tmp_path / "MATH", "--output", tmp_path / "out") == 2
    assert "7.json cannot be read" in capsys.readouterr().err
    assert run("--recipe", "math", tmp_path / "MATH" / "none", "--output", tmp_path / "out") == 2
