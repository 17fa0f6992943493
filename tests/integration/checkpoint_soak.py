"""Kill a run at random moments and flip bytes of its checkpoints, and compare it with an uninterrupted run.

    make checkpoint-soak ARGS="[--kills 50] [--flips 50] [--seed 0] [--steps 40]"

After a kill, one random bit of a random byte of a random file under ``checkpoints/`` is changed, as long as flips are
left; then the same command resumes. Every resume must do one of three things: continue from the newest checkpoint, if
it is intact; name the damaged checkpoint and continue from the one before; or, if all are damaged, name them and end
with status 2. After the last case the flip is undone. A run that has finished must have the metrics of the
uninterrupted run, bit for bit; then another run begins. The exit status is 1 if anything else happens.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from megatron_rlvr.telemetry.metrics import deterministic, read_metrics
from tests.processes import ROOT, environment
from tests.small_model import make_small_model, write_problems

CONFIG = """
name: soak
seed: 3
threads: 1
model: {{path: {folder}/model}}
data: {{train: {folder}/train.jsonl}}
verifier: {{name: "tests.rewards:letter_sum", workers: 0}}
rollout: {{prompts_per_step: 4, samples_per_prompt: 4, max_tokens: 8}}
algorithm: {{epochs: 2, minibatches: 2, schedule: {{name: target-entropy}}}}
optimizer: {{learning_rate: 3.0e-3}}
checkpoint: {{every: 1, keep: 3, export_huggingface: false}}
telemetry: {{tensorboard: false, plots: false}}
"""


@dataclass
class Flip:
    """A changed byte of a checkpoint, and the bytes from before."""

    file: Path
    position: int
    before: bytes = field(repr=False)

    def undo(self) -> None:
        if self.file.is_file():
            self.file.write_bytes(self.before)

    def newest_is_damaged(self) -> bool:
        """Whether the changed file belongs to the newest checkpoint."""
        return self.file.parent == newest(self.file.parents[1])


def newest(checkpoints: Path) -> Path | None:
    """Return the folder of the newest checkpoint."""
    steps = [int(d.name[5:]) for d in checkpoints.glob("step_*") if d.name[5:].isdigit()]
    return checkpoints / f"step_{max(steps)}" if steps else None


class Soak:
    """The runs, one after another, and what has happened to them.

    Args:
        folder: an empty folder.
        steps: steps of every run.
        rng: chooses moments, files and bytes.
    """

    def __init__(self, folder: Path, steps: int, rng: random.Random):
        self.folder, self.steps, self.rng = folder, steps, rng
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.config = folder / "soak.yaml"
        self.config.write_text(CONFIG.format(folder=folder))
        make_small_model(folder / "model")
        write_problems(folder / "train.jsonl")

    def start(self, name: str) -> subprocess.Popen[str]:
        arguments = [str(self.config), f"run_directory={self.folder / name}", f"steps={self.steps}"]
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "megatron_rlvr.train", *arguments],
            env=environment(),
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def metrics(self, name: str) -> list[dict]:
        return [deterministic(record) for record in read_metrics(self.folder / name)]

    def resume(self, name: str, kill: bool) -> tuple[int, str, bool]:
        """Start a run, kill it after a random number of steps or seconds.

        Returns:
            its status, its stderr, and whether it got so far that it had to load a checkpoint.
        """
        process = self.start(name)
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))  # type: ignore[union-attr]
        reader.start()
        left = self.rng.randrange(1, 7) if kill else self.steps + 1
        timer = threading.Timer(8 * self.rng.random(), process.kill)
        if kill and self.rng.random() < 0.2:  # at a moment of the start, or of the first steps
            timer.start()
        stepped = False
        for line in process.stdout:  # type: ignore[union-attr]
            stepped |= line.startswith("step ")
            left -= line.startswith("step ")
            if left <= 0:
                time.sleep(self.rng.random() / 4)  # a step takes about a tenth of a second, a save somewhat less
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()  # type: ignore[union-attr]
        status = process.wait()
        timer.cancel()
        reader.join()
        return status, errors[0], stepped or status != -signal.SIGKILL or "warning: " in errors[0]

    def flip(self, name: str) -> Flip | None:
        """Change one bit of a file under ``checkpoints/``, most often of the newest checkpoint."""
        files = [f for f in sorted((self.folder / name / "checkpoints").rglob("*")) if f.is_file() and f.stat().st_size]
        if not files:
            return None
        last = newest(self.folder / name / "checkpoints")
        if self.rng.random() < 0.7:
            files = [f for f in files if f.parent == last] or files
        file = self.rng.choice(files)
        before = file.read_bytes()
        position = self.rng.randrange(len(before))
        changed = bytearray(before)
        changed[position] ^= 1 << self.rng.randrange(8)
        file.write_bytes(changed)
        return Flip(file, position, before)

    def judge(self, status: int, stderr: str, flip: Flip | None) -> None:
        """Count what a resume did after a flip, and note it if it was wrong."""
        lines = [line for line in stderr.splitlines() if line.startswith(("warning: ", "error: "))]
        if "Traceback" in stderr or status not in (0, 2, -signal.SIGKILL):
            self.wrong.append(f"status {status}: {stderr[-2000:]}")
        elif flip is None:
            if lines:
                self.wrong.append(f"without a flip: {lines}")
        elif status == 2:
            refused = len(lines) == 1 and "no checkpoint of" in lines[0] and flip.file.parent.name in lines[0]
            self.counts["refused: all checkpoints damaged, each named"] += refused
            if not refused:
                self.wrong.append(f"status 2 after {flip.file} byte {flip.position}: {lines}")
            flip.undo()
        elif lines:
            named = flip.file.parent.name in lines[0] or flip.file.name == "latest"
            self.counts["named, and the checkpoint before taken" if "damaged" in lines[0] else "named (latest)"] += (
                named
            )
            if not named or len(lines) > 1:
                self.wrong.append(f"{flip.file} byte {flip.position}: {lines}")
        else:
            self.counts["in a file that the resume does not read"] += 1

    def run(self, kills: int, flips: int) -> None:
        """Do everything; results are in `counts` and `wrong`."""
        status, stderr, _ = self.resume("uninterrupted", kill=False)
        assert status == 0, stderr
        expected = self.metrics("uninterrupted")
        number = 0
        while kills > 0 or flips > 0:  # a run that has begun goes on to its end, so there may be one kill more
            number += 1
            name, flip = f"run{number}", None
            while True:
                damaged = flip is not None and flip.newest_is_damaged()
                status, stderr, loaded = self.resume(name, kill=kills > 0 or flips > 0)
                if loaded:
                    self.judge(status, stderr, flip)
                    if damaged and status != 2 and "is damaged" not in stderr:
                        self.wrong.append(f"silent: {flip}")
                    flip = None
                if status == 0:
                    break
                if status == -signal.SIGKILL:
                    kills -= 1
                    self.counts["kills"] += 1
                if flip is None and flips > 0 and (flip := self.flip(name)) is not None:
                    flips -= 1
                    self.counts["flips"] += 1
                print(f"{dict(self.counts)} wrong {len(self.wrong)} {self.wrong[-1:]}", flush=True)
            self.counts["finished runs"] += 1
            if self.metrics(name) != expected:
                self.wrong.append(f"{name}: other metrics")
            print(f"{name} has finished, wrong {len(self.wrong)}", flush=True)
            shutil.rmtree(self.folder / name)


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--flips", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), options.steps, random.Random(options.seed))
        soak.run(options.kills, options.flips)
    for text, count in soak.counts.items():
        print(f"{count:4d} {text}")
    print(f"{len(soak.wrong):4d} wrong")
    print(*soak.wrong, sep="\n")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
