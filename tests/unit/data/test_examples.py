import json

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from megatron_rlvr.data import Example, load_examples
from megatron_rlvr.errors import UserError


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_plain_jsonl(tmp_path):
    answer = {"numbers": [3, 5, 7], "target": 22}
    path = write(
        tmp_path / "train.jsonl", {"prompt": "3 5 7 : 22 >", "answer": answer}, "\n", {"prompt": "x", "answer": 0}
    )
    assert load_examples(path) == [
        Example(0, "3 5 7 : 22 >", answer, "train"),
        Example(1, "x", 0, "train"),  # blank lines are skipped, and 0 is an answer
    ]
    assert load_examples(str(path), limit=1) == [Example(0, "3 5 7 : 22 >", answer, "train")]


def test_slime_jsonl(tmp_path):
    messages = [{"role": "user", "content": "1+1?"}]
    path = write(tmp_path / "a.jsonl", {"prompt": messages, "label": "2", "metadata": {"x": 1}})
    assert load_examples(path) == [Example(0, messages, "2", "a")]


def test_first_row_decides_the_answer_key(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "label": "2"}, {"prompt": "p", "answer": "3"})
    with pytest.raises(UserError, match=r"a\.jsonl line 2: no answer under 'label'; found the keys 'prompt', 'answer'"):
        load_examples(path)


def test_named_keys_reach_into_objects(tmp_path):
    path = write(tmp_path / "a.jsonl", {"q": {"text": "p"}, "meta": {"truth": [1, 2]}, "answer": "no"})
    assert load_examples(path, prompt_key="q.text", answer_key="meta.truth") == [Example(0, "p", [1, 2], "a")]


def test_verl_parquet(tmp_path):
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": f"question {i}", "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(i), "style": "rule-lighteval/MATH_v2"},
        }
        for i in range(3)
    ]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "dapo.parquet")
    examples = load_examples(tmp_path / "dapo.parquet")
    assert [example.answer for example in examples] == ["0", "1", "2"]
    assert examples[2] == Example(2, [{"role": "user", "content": "question 2"}], "2", "math_dapo")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x", "answer": \n', r"line 2: not valid JSON \(.*\); expected one JSON object per line, such as"),
        ('["x", 1]\n', r"line 2: found list \['x', 1\]; expected one JSON object per line"),
        ("[" * 100_000 + "\n", r"line 2: not valid JSON"),
        ('{"answer": 1}\n', r"line 2: no prompt under 'prompt'; found the keys 'answer'; set prompt_key"),
        ('{"prompt": "x"}\n', r"line 2: no answer under 'answer'; found the keys 'prompt'; set answer_key"),
        ('{"prompt": "x", "answer": null}\n', r"line 2: no answer under 'answer'"),
        ('{"prompt": "  ", "answer": 1}\n', r"line 2: prompt must be text or a list of .* found str '  '"),
        ('{"prompt": 5, "answer": 1}\n', r"line 2: prompt must be text or a list of .* found int 5"),
        ('{"prompt": [], "answer": 1}\n', r"line 2: prompt must be text .* found list \[\]"),
        ('{"prompt": [{"role": "user"}], "answer": 1}\n', r"line 2: prompt must be text"),
    ],
)
def test_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "train.jsonl", {"prompt": "p", "answer": 1}, line)
    with pytest.raises(UserError, match=r"train\.jsonl " + message) as caught:
        load_examples(path)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "p", "answer": 1}\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl line 2: not UTF-8 text \(byte 12\)"):
        load_examples(tmp_path / "a.jsonl")


def test_no_answer_key_at_all(tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "solution": 1})
    with pytest.raises(
        UserError, match=r"line 1: no answer under answer, label, reward_model.ground_truth; found .*'solution'"
    ):
        load_examples(path)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_empty_file(tmp_path, content):
    with pytest.raises(UserError, match=r"a\.jsonl: no examples in the file"):
        load_examples(write(tmp_path / "a.jsonl", content))


def test_empty_parquet(tmp_path):
    parquet.write_table(arrow.table({"prompt": arrow.array([], arrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: no examples"):
        load_examples(tmp_path / "a.parquet")


def test_torn_parquet(tmp_path):
    parquet.write_table(arrow.table({"prompt": ["a"] * 1000, "answer": range(1000)}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"b\.parquet: not a readable parquet file") as caught:
        load_examples(tmp_path / "b.parquet")
    assert "\n" not in str(caught.value)


def test_missing_file_and_unknown_suffix(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such file"):
        load_examples(tmp_path / "nowhere.jsonl")
    with pytest.raises(
        UserError, match=r"data\.csv: the file type '.csv' is not supported; write a .jsonl or .parquet file"
    ):
        load_examples(tmp_path / "data.csv")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UserError, match=r"folder\.jsonl: no such file"):
        load_examples(tmp_path / "folder.jsonl")
    with pytest.raises(UserError, match="limit"):
        load_examples(tmp_path / "a.jsonl", limit=0)


def test_the_stratum_is_a_number_in_the_row(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "answer": 1, "about": {"kind": 302}}\n{"prompt": "b", "answer": 2, "kind": 3.5}\n')
    assert [e.stratum for e in load_examples(path)] == [None, None]
    with pytest.raises(UserError, match=r"line 2: data.stratify_key=about.kind must name a number, found NoneType"):
        load_examples(path, stratify_key="about.kind")
    path.write_text('{"prompt": "a", "answer": 1, "kind": 302}\n{"prompt": "b", "answer": 2, "kind": 3.5}\n')
    assert [e.stratum for e in load_examples(path, stratify_key="kind")] == [302.0, 3.5]
    for wrong in ('"easy"', "true", "1e999"):
        path.write_text(f'{{"prompt": "a", "answer": 1, "kind": {wrong}}}\n')
        with pytest.raises(UserError, match="must name a number"):
            load_examples(path, stratify_key="kind")


USER, ASSISTANT = {"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"messages": [USER], "answer": 5}, [USER], 5),
        ({"messages": [USER, ASSISTANT]}, [USER], "5"),
        ({"messages": [USER, ASSISTANT], "label": "five"}, [USER], "five"),
        ({"messages": [USER, ASSISTANT], "prompt": "2+3", "answer": 5}, "2+3", 5),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, [USER, ASSISTANT, USER], "5"),
    ],
)
def test_chat_data_under_messages(row, prompt, answer, tmp_path):
    file = write(tmp_path / "chat.jsonl", row)
    [example] = load_examples(file)
    assert (example.prompt, example.answer) == (prompt, answer)
    [named] = load_examples(file, prompt_key="messages", answer_key="messages")
    assert named.prompt == row["messages"]  # a prompt like any other, whose last message is continued


def test_chat_messages_keep_all_their_fields(tmp_path):
    named = USER | {"name": "Ada", "tool_calls": [{"id": 1}]}
    [example] = load_examples(write(tmp_path / "chat.jsonl", {"messages": [named | {"weight": None}], "answer": 5}))
    assert example.prompt == [named]
    rows = {"prompt": [[named, ASSISTANT, USER]], "answer": [5]}
    parquet.write_table(arrow.table(rows), tmp_path / "chat.parquet")
    [example] = load_examples(tmp_path / "chat.parquet")
    assert example.prompt == [named, ASSISTANT, USER]  # Arrow gives every message every field


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"messages": [USER]}], "line 1: no answer under answer, label"),
        ([{"messages": [USER, ASSISTANT]}, {"messages": [USER]}], "line 2: messages must end with the answer"),
        ([{"messages": [ASSISTANT]}], "line 1: no answer under"),
        ([{"messages": "2 + 3?"}], "line 1: no answer under"),
        ([{"messages": [], "answer": 5}], "line 1: messages must be text or a list of"),
    ],
)
def test_chat_data_that_cannot_be_read(rows, said, tmp_path):
    with pytest.raises(UserError) as error:
        load_examples(write(tmp_path / "chat.jsonl", *rows))
    assert said in str(error.value)
