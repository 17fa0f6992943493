"""Prompts to token ids, the tokens that end a completion, and tokenizer files that are damaged or hold code."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rlvr.data import Example
from megatron_rlvr.data.completion import Completion
from megatron_rlvr.data.kept_tokens import KeptTokens
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.huggingface_config import read_config
from megatron_rlvr.rollout.tokenization import Tokenization

WORDS = ["<bos>", "<eos>", "<eot>", "<pad>", "user", "assistant", "system", ":", "one", "two", "three", "\n"]
BOS, EOS, EOT, PAD = range(4)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <eot>{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def make_folder(folder: Path, template: str | None = TEMPLATE, append: str = "", **config: Any) -> Path:
    """Save a word tokenizer that puts <bos> before texts, as Llama 3's does, and `append` after them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("<bos>", BOS), ("<eos>", EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<bos> $A {append}".strip(), special_tokens=special
    )
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens, additional_special_tokens=["<eot>"])
    fast.chat_template = template
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def encode(tokenization: Tokenization, prompt: Any) -> list[str]:
    return [WORDS[i] for i in tokenization.encode_all([Example(0, prompt, 1, "test")], 64)[0]]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_every_file_may_name_tokens_that_end_a_sequence(tmp_path: Path) -> None:
    assert Tokenization(make_folder(tmp_path / "a"), 12).stop_token_ids == (EOS,)
    assert Tokenization(make_folder(tmp_path / "b", eos_token_id=EOT), 12).stop_token_ids == (EOS, EOT)
    folder = make_folder(tmp_path / "c", eos_token_id=[EOS, EOT])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, PAD]}))
    assert Tokenization(folder, 12).stop_token_ids == (EOS, EOT, PAD)


@pytest.mark.parametrize("wrong", [12, -1, "2", 1.5, True, [2, [1]], {"a": 1}, 10**30])
def test_an_impossible_end_of_sequence_token_is_refused(wrong: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", eos_token_id=wrong)
    with pytest.raises(UserError, match="'eos_token_id'") as error:
        Tokenization(folder, 12)
    assert "\n" not in str(error.value)


def test_a_text_has_one_beginning(tmp_path: Path) -> None:
    tokenization = Tokenization(make_folder(tmp_path / "a"), 12)
    assert encode(tokenization, "one two") == ["<bos>", "one", "two"]
    assert encode(tokenization, "<bos> user : one <eot> assistant :") == [
        *("<bos>", "user", ":", "one", "<eot>", "assistant", ":"),
    ]
    assert encode(tokenization, [message("user", "one")]) == ["<bos>", "user", ":", "one", "<eot>", "assistant", ":"]
    assert encode(tokenization, [message("system", "two"), message("user", "one")])[:5] == [
        *("<bos>", "system", ":", "two", "<eot>"),
    ]


def test_a_last_message_of_the_assistant_is_continued(tmp_path: Path) -> None:
    tokenization = Tokenization(make_folder(tmp_path / "a"), 12)
    begun = ["<bos>", "user", ":", "one", "<eot>", "assistant", ":"]
    assert encode(tokenization, [message("user", "one"), message("assistant", "two three")]) == [*begun, "two", "three"]
    assert encode(tokenization, [message("user", "one"), message("assistant", "")]) == begun


def test_a_template_sees_every_field_of_a_message(tmp_path: Path) -> None:
    named = "{% for m in messages %}{{ m['name'] }} : {{ m['content'] }}{% endfor %}"
    tokenization = Tokenization(make_folder(tmp_path / "a", template=named), 12)
    assert encode(tokenization, [message("user", "one") | {"name": "two"}]) == ["two", ":", "one"]


def test_a_prompt_does_not_end_with_the_end_of_a_sequence(tmp_path: Path) -> None:
    appends = Tokenization(make_folder(tmp_path / "a", append="<eos>"), 12)
    with pytest.raises(UserError, match="ends the prompt of example 0 of test with an end-of-sequence token"):
        encode(appends, "one two")
    closes = Tokenization(make_folder(tmp_path / "b", TEMPLATE.split("{% if")[0], eos_token_id=EOT), 12)
    with pytest.raises(UserError, match="ends the prompt of example 0 of test with an end-of-sequence token"):
        encode(closes, [message("user", "one")])
    assert encode(closes, "one <eot>") == ["<bos>", "one", "<eot>"]  # the data say so


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no\nsystem') }}", "{% for", "{{ messages[9].role }}", "{{ 1 / 0 }}", "{{ x.y.z }}"],
)
def test_a_chat_template_that_fails_is_one_line(template: str, tmp_path: Path) -> None:
    tokenization = Tokenization(make_folder(tmp_path / "a", template), 12)
    with pytest.raises(UserError, match="example 0 of test cannot be encoded") as error:
        encode(tokenization, [message("user", "one")])
    assert "\n" not in str(error.value)


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    tokenization = Tokenization(make_folder(tmp_path / "a"), 12)
    assert tokenization.decode([Completion([8, EOS], [-1.0, -1.0], "stop", 0)]) == ["one"]
    with pytest.raises(UserError, match="token id 12, but the model's vocabulary ends at 11"):
        tokenization.decode([Completion([8], [-1.0], "stop", 0), Completion([12, 1], [-1.0, -1.0], "stop", 0)])
    with pytest.raises(UserError, match="token id 13, but the model's vocabulary ends at 11"):
        tokenization.decode([Completion([8], [-1.0], "stop", 0, kept=KeptTokens.of([[8, 13]]))])


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"a": NaN}', '{"model": 3}', "\udcff", "[" * 100_000])
def test_a_damaged_tokenizer_is_one_line(file: str, content: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    (folder / file).write_text(content, errors="surrogateescape")
    try:
        assert Tokenization(folder, 12).stop_token_ids  # transformers can do without some fields
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)


CODE = (
    "from pathlib import Path\nPath({!r}).write_text('run')\nclass Hidden:\n    from_pretrained = staticmethod(print)\n"
)


@pytest.mark.parametrize("places", [("tokenizer",), ("config",), ("tokenizer", "config")])
@pytest.mark.parametrize("model_type", ["qwen2", "hidden"])
def test_python_code_of_a_model_folder_is_never_run(
    places: tuple[str, ...], model_type: str, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default, transformers asks on stdin whether to run the code. Here stdin answers every question with yes."""
    folder, trace = shutil.copytree(small_model, tmp_path / "hidden"), tmp_path / "trace"
    (folder / "hidden.py").write_text(CODE.format(str(trace)))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
    described = json.loads((folder / "tokenizer_config.json").read_text())
    if "config" in places:
        config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "hidden.Hidden")
    if "tokenizer" in places:
        described |= {"tokenizer_class": "Hidden", "auto_map": {"AutoTokenizer": ["hidden.Hidden", "hidden.Hidden"]}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 100))
    for load in (lambda: read_config(folder), lambda: Tokenization(folder, 112)):
        try:
            load()
        except UserError as error:
            assert "\n" not in str(error) and str(folder) in str(error) and "never run" in str(error)
    assert not trace.exists()
