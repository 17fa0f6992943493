import shutil

import countdown
import make_base_model
import numpy as np
import pytest
import sample
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

TINY = ["--steps", "3", "--batch", "8", "--hidden", "16", "--ffn", "32", "--threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "a"
    make_base_model.main(["--output", str(path), *TINY])
    return path


def test_reload_as_an_ordinary_folder(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    config = model.config
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == config.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert model.generation_config.top_k == 0 and model.generation_config.eos_token_id == tokenizer.eos_token_id
    for divisible in (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
        config.intermediate_size,
        config.num_hidden_layers,
    ):
        assert divisible % 2 == 0


# PreTrainedTokenizerFast takes tokenizer.json as it stands; AutoTokenizer gives Qwen2 folders to its own class.
@pytest.mark.parametrize("tokenizer_class", [AutoTokenizer, PreTrainedTokenizerFast])
def test_text_and_tables_are_the_same_tokens(folder, tokenizer_class):
    tokenizer = tokenizer_class.from_pretrained(folder)
    rng = np.random.default_rng(0)
    for size in (3, 4):
        numbers = countdown.random_numbers(rng, 200, size)
        plays = countdown.random_plays(rng, numbers)
        target = plays[:, -1, 3]
        prompts = make_base_model.prompt_ids(numbers, target)
        responses = make_base_model.response_ids(plays)
        assert responses.shape[1] <= make_base_model.MAX_RESPONSE_TOKENS
        for row in range(200):
            text = countdown.prompt_text(numbers[row].tolist(), int(target[row]))
            assert tokenizer(text).input_ids == prompts[row].tolist()
            play = countdown.play_text(plays[row])
            spaced = play.replace("=", " =\n").replace("+", " + ").replace(";", " ; ")
            for written in (play, spaced, f" {play} "):
                assert [*tokenizer(written).input_ids, tokenizer.eos_token_id] == responses[row].tolist()
            assert tokenizer.decode(responses[row], skip_special_tokens=True) == play


@pytest.mark.parametrize("seed", [0, 1])
def test_training_rows(seed):
    rows = make_base_model.training_rows(np.random.default_rng(seed), 4000, 3, 0.3).numpy()
    assert rows.shape == (4000, 18)
    numbers, target = rows[:, :3], rows[:, 4]
    assert not countdown.is_held_out(numbers, target).any()
    reached = rows[:, -2]
    # 0.3 of the plays do not look at the target, and hit it about one time in ten.
    assert 0.20 < (reached != target).mean() < 0.32


def test_same_seed_same_model(folder, tmp_path, capsys):
    for name, seed in (("same", "0"), ("other", "1")):
        make_base_model.main(["--output", str(tmp_path / name), *TINY, "--seed", seed])
    assert "held-out problems: pass@1" in capsys.readouterr().out
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, tmp_path / "same", tmp_path / "other")]
    assert weights[0] == weights[1] != weights[2]


def test_sampling_reports_the_distribution_it_drew_from(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    end = make_base_model.TOKEN["<eos>"]
    with torch.no_grad():  # so that ends turn up among the few samples of an untrained model
        model.get_input_embeddings().weight[end] *= 4
    prompts = torch.tensor([[3, 5, 7, 106, 22, 107], [9, 9, 9, 106, 27, 107]]).repeat_interleave(64, 0)
    tokens, entropies = make_base_model.sample(model, prompts, torch.Generator().manual_seed(0))
    ended = (tokens == end).cumsum(1)
    after = (ended - (tokens == end).int()) > 0
    assert after.any() and not after.all()
    assert (tokens[after] == make_base_model.TOKEN["<pad>"]).all()
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompts, tokens], 1)).logits[:, prompts.shape[1] - 1 : -1].double()
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert torch.allclose(entropies.double(), expected * ~after, atol=1e-5)


def test_sample_program(folder, capsys):
    outputs = []
    for _ in range(2):
        assert sample.main([str(folder), "3 5 7 : 22 >", "--samples", "5"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    *lines, last = outputs[0].splitlines()
    assert last.endswith("of 5 samples are right")
    assert sum(int(line.split("x")[0]) for line in lines) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["{nowhere}"], "no Hugging Face model there"),
        (["{folder}", "three 5 : 15 >"], "reads the prompt 'three 5 : 15 >' as '5:15>'"),
        (["{folder}", "--samples", "0"], "--samples"),
    ],
)
def test_sample_program_refuses(folder, tmp_path, options, message, capsys):
    assert sample.main([option.format(folder=folder, nowhere=tmp_path) for option in options]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "qwen2", "hidden_size": "x"}'),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"\xff"),
        ("model.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00garbage!"),
    ],
)
def test_sample_program_refuses_damaged_files(folder, tmp_path, name, content, capsys):
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / name).write_bytes(content)
    assert sample.main([str(damaged)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "damaged" in error
