"""Generate Countdown problems: reach a target from 3 or 4 numbers with + - * and /, each number used once.

    python examples/quickstart/countdown.py --output runs/quickstart/data

This writes train.jsonl and heldout.jsonl with lines such as
{"prompt": "3 5 7 : 22 >", "answer": {"numbers": [3, 5, 7], "target": 22}}. A right answer is "3*5=15;15+7=22".
Every problem is solvable, because its target is the result of a random play. The same seed gives the same files.
"""

import argparse
import json
from pathlib import Path

import numpy as np

LARGEST_NUMBER = 9  # of the numbers of a problem
LARGEST_VALUE = 99  # of targets and intermediate values; the smallest is 1
SIGNS = ("+", "-", "*", "/")
PLUS, MINUS, TIMES, DIVIDE = range(4)
HELD_OUT_ONE_IN = 8  # one problem in eight is held out


def random_numbers(rng: np.random.Generator, count: int, size: int) -> np.ndarray:
    """The numbers of ``count`` problems: int64 [count, size], uniform in 1..LARGEST_NUMBER."""
    return rng.integers(1, LARGEST_NUMBER + 1, (count, size))


def random_plays(rng: np.random.Generator, numbers: np.ndarray) -> np.ndarray:
    """One random legal play for each row of numbers [count, size].

    Returns int64 [count, size - 1, 4]: steps (left, sign, right, value), where sign is an index into SIGNS. A step
    draws two of the remaining values, then one of the signs that are legal for them. Subtraction and division have the
    larger value on the left. All values are integers in 1..LARGEST_VALUE.
    """
    count, size = numbers.shape
    rows = np.arange(count)
    pool = numbers.copy()
    steps = np.empty((count, size - 1, 4), dtype=np.int64)
    for step in range(size - 1):
        remaining = size - step
        i = rng.integers(remaining, size=count)
        j = (i + 1 + rng.integers(remaining - 1, size=count)) % remaining
        left, right = pool[rows, i], pool[rows, j]
        large, small = np.maximum(left, right), np.minimum(left, right)
        values = np.stack([left + right, large - small, left * right, large // small], axis=1)
        legal = (values >= 1) & (values <= LARGEST_VALUE)
        legal[:, DIVIDE] &= large % small == 0
        # At least one sign is always legal: equal values divide, unequal ones subtract.
        sign = np.argmax(rng.random((count, 4)) * legal, axis=1)
        ordered = (sign == MINUS) | (sign == DIVIDE)
        value = values[rows, sign]
        steps[:, step] = np.stack(
            [np.where(ordered, large, left), sign, np.where(ordered, small, right), value], axis=1
        )
        # The result replaces the left value; the last remaining value replaces the right one.
        pool[rows, i] = value
        pool[rows, j] = pool[:, remaining - 1]
    return steps


def is_held_out(numbers: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Whether problems belong to the held-out split, bool [count].

    A hash of the sorted numbers and the target decides, so no training problem is a held-out one with its numbers in
    another order.
    """
    key = target.astype(np.uint64)
    for column in np.sort(numbers, axis=1).T:
        key = key * np.uint64(LARGEST_VALUE + 1) + column.astype(np.uint64)
    # Fibonacci hashing: the high bits of the product depend on all bits of the key.
    return (key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32) & np.uint64(0xFFFF) < np.uint64(
        0x10000 // HELD_OUT_ONE_IN
    )


def prompt_text(numbers: list[int], target: int) -> str:
    """The prompt as the model reads it: "3 5 7 : 22 >"."""
    return f"{' '.join(map(str, numbers))} : {target} >"


def play_text(steps: np.ndarray) -> str:
    """A play [size - 1, 4] as the model writes it: "3*5=15;15+7=22"."""
    return ";".join(f"{left}{SIGNS[sign]}{right}={value}" for left, sign, right, value in steps.tolist())


def make_problems(
    rng: np.random.Generator, count: int, *, held_out: bool, four_share: float
) -> list[tuple[list[int], int]]:
    """``count`` different problems (numbers, target) of one split, in random order.

    A share of ``four_share`` has 4 numbers, the rest 3. Raises ValueError if there are not enough different problems.
    """
    problems: list[tuple[list[int], int]] = []
    four = round(count * four_share)
    for size, wanted in ((3, count - four), (4, four)):
        different: dict[tuple[int, ...], tuple[list[int], int]] = {}
        for _ in range(200):
            if len(different) >= wanted:
                break
            numbers = random_numbers(rng, 4096, size)
            target = random_plays(rng, numbers)[:, -1, 3]
            for row in np.flatnonzero(is_held_out(numbers, target) == held_out):
                problem = (numbers[row].tolist(), int(target[row]))
                different.setdefault((*problem[0], problem[1]), problem)
        if len(different) < wanted:
            raise ValueError(f"only {len(different)} of {wanted} problems of {size} numbers were found")
        problems += list(different.values())[:wanted]
    return [problems[i] for i in rng.permutation(len(problems))]


def write_problems(path: Path, problems: list[tuple[list[int], int]]) -> None:
    """Write problems as JSONL in the plain format of ``megatron_rlvr.data``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for numbers, target in problems:
            line = {
                "prompt": prompt_text(numbers, target),
                "answer": {"numbers": numbers, "target": target},
                # For data.stratify_key: problems with equally many numbers and close targets are similar.
                "kind": len(numbers) * (LARGEST_VALUE + 1) + target,
            }
            file.write(json.dumps(line) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Generate Countdown problems as JSONL: a training split and a held-out split."
    )
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart/data"), help="folder for both files")
    parser.add_argument("--train", type=int, default=4096, help="number of training problems")
    parser.add_argument("--held-out", type=int, default=256, help="number of held-out problems")
    parser.add_argument(
        "--four-share", type=float, default=0.35, help="share of problems with 4 numbers; the rest have 3"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.four_share <= 1:
        parser.error(f"--four-share must lie between 0 and 1, found {arguments.four_share}")
    if arguments.train < 1 or arguments.held_out < 1 or arguments.seed < 0:
        parser.error("--train and --held-out must be at least 1, --seed at least 0")
    for name, count, held_out in (("train", arguments.train, False), ("heldout", arguments.held_out, True)):
        rng = np.random.default_rng([arguments.seed, held_out])
        path = arguments.output / f"{name}.jsonl"
        try:
            problems = make_problems(rng, count, held_out=held_out, four_share=arguments.four_share)
        except ValueError as error:
            parser.error(f"{error}; lower --{'held-out' if held_out else 'train'}")
        write_problems(path, problems)
        print(f"{path}: {count} problems")


if __name__ == "__main__":
    main()
