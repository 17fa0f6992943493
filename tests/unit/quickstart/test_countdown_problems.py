import json

import countdown
import numpy as np
import pytest

from megatron_rlvr.data import load_examples
from megatron_rlvr.verifiers import build_verifier


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_play_is_right(size, seed):
    rng = np.random.default_rng(seed)
    numbers = countdown.random_numbers(rng, 1000, size)
    plays = countdown.random_plays(rng, numbers)
    verify = build_verifier("countdown")
    for row in range(1000):
        answer = {"numbers": numbers[row].tolist(), "target": int(plays[row, -1, 3])}
        assert verify(countdown.play_text(plays[row]), answer) == 1, (answer, countdown.play_text(plays[row]))
    assert plays[..., 3].min() >= 1 and plays[..., 3].max() <= countdown.LARGEST_VALUE
    signs = np.bincount(plays[..., 1].ravel(), minlength=4) / plays[..., 1].size
    assert signs.min() > 0.05


def test_split_ignores_the_order_of_the_numbers():
    rng = np.random.default_rng(0)
    numbers = countdown.random_numbers(rng, 20000, 4)
    target = rng.integers(1, 100, 20000)
    held_out = countdown.is_held_out(numbers, target)
    assert (countdown.is_held_out(rng.permuted(numbers, axis=1), target) == held_out).all()
    assert abs(held_out.mean() - 1 / countdown.HELD_OUT_ONE_IN) < 0.01
    # No number decides alone: within each target and each largest number the share is about the same.
    for value in range(5, 10):
        assert abs(held_out[numbers.max(1) == value].mean() - 1 / 8) < 0.04


def test_files(tmp_path):
    countdown.main(["--output", str(tmp_path), "--train", "500", "--held-out", "100"])
    train = load_examples(tmp_path / "train.jsonl")
    held_out = load_examples(tmp_path / "heldout.jsonl")
    assert (len(train), len(held_out)) == (500, 100)
    assert [sum(len(e.answer["numbers"]) == size for e in train) for size in (3, 4)] == [325, 175]
    keys = [{(*sorted(e.answer["numbers"]), e.answer["target"]) for e in part} for part in (train, held_out)]
    assert not keys[0] & keys[1]
    assert len({e.prompt for e in train}) == 500
    for example in train[:20]:
        assert example.prompt == countdown.prompt_text(example.answer["numbers"], example.answer["target"])


def test_same_seed_same_files(tmp_path):
    for folder, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        options = ["--train", "64", "--held-out", "64", "--seed", seed]
        countdown.main(["--output", str(tmp_path / folder), *options])
    texts = [(tmp_path / folder / "train.jsonl").read_bytes() for folder in "abc"]
    assert texts[0] == texts[1] != texts[2]
    assert json.loads(texts[0].splitlines()[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--held-out", "5000"), "problems of 3 numbers were found; lower --held-out"),
        (("--four-share", "1.5"), "--four-share must lie between 0 and 1, found 1.5"),
        (("--train", "0"), "at least 1"),
    ],
)
def test_impossible_settings(tmp_path, options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        countdown.main(["--output", str(tmp_path), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
