import json

import prepare_data
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from megatron_rlvr.data import load_examples


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
