"""Seeded mutations of everything that a run reads: each is read, or ends in one line; none hangs or leaves NaN behind.

`MUTATIONS` mutations per surface, by default few; `make fuzz` runs 500. A failure names the seed of its mutation.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import yaml
from pyarrow import parquet
from safetensors.torch import load_file

from megatron_rlvr.config import load_config, resolve, warnings_of
from megatron_rlvr.data import load_examples
from megatron_rlvr.data.routes import RouterShape, Routes
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.http import Reply, _read_reply
from megatron_rlvr.rollout.engines.sglang.protocol import read_completions
from megatron_rlvr.rollout.recording import read_recorded_group, recording_path
from megatron_rlvr.rollout.sampling import SamplingSettings
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.telemetry.comparison import group_runs
from megatron_rlvr.telemetry.metrics import read_metrics
from megatron_rlvr.telemetry.status import read_status
from megatron_rlvr.train import main
from megatron_rlvr.verifiers import check_answers
from megatron_rlvr.verifiers.build import build_verifier
from tests.mutations import COUNT, HOSTILE, damaged, mutated, seeds

ROUTERS = RouterShape(layers=2, routed=(0, 1), experts=4, chosen=2)
DEADLINE_S = 120
"""Of one mutation; it usually takes less than a second."""
READABLE = 0.02
"""At least this share of the mutations must be read, or they would test nothing but the first check."""


class Tally:
    """What became of the mutations of a surface."""

    def __init__(self) -> None:
        self.read, self.refused = 0, 0
        self.failures: list[str] = []

    @contextmanager
    def mutation(self, number: int, what: object = "") -> Iterator[None]:
        """Run one mutation: it may return or raise a UserError of one line, within the deadline."""

        def hang(*_: object) -> None:
            raise TimeoutError(f"no end after {DEADLINE_S} s")

        previous = signal.signal(signal.SIGALRM, hang)
        signal.alarm(DEADLINE_S)
        try:
            yield
            self.read += 1
        except UserError as error:
            self.refused += 1
            if "\n" in str(error) or not str(error) or len(str(error)) > 2000:
                self.failures.append(f"mutation {number} ({what}): not one line: {str(error)[:300]!r}")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-3:]
            places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(where))
            self.failures.append(
                f"mutation {number} ({what}): {type(error).__name__}: {str(error)[:150]!r} at {places}"
            )
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)

    def check(self, both: bool = True) -> None:
        """Fail if a mutation did; with `both`, also if (almost) all were read or refused."""
        print(f"{self.read} read, {self.refused} refused in one line, {len(self.failures)} failed")
        assert not self.failures, f"{len(self.failures)} failures:\n" + "\n".join(self.failures[:30])
        smaller = min(self.read, self.refused)
        assert not both or smaller >= READABLE * (self.read + self.refused), (self.read, self.refused)


def test_configuration(run_yaml: Path) -> None:
    tally, text = Tally(), run_yaml.read_text()
    tree = yaml.safe_load(text)
    for number, rng in enumerate(seeds("configuration")):
        overrides = []
        if (kind := rng.randrange(3)) == 0:
            content = damaged(text.encode(), rng)
        else:
            content = yaml.safe_dump(mutated(tree, rng) if kind == 1 else tree, allow_unicode=True).encode(
                errors="surrogatepass"
            )
        if kind == 2:
            key = rng.choice(
                ("rollout.temperature", "seed", "threads", "data.train", "optimizer.beta1", "verifier", "x.y")
            )
            overrides = [f"{key}{rng.choice(('=', '=', '=[', '.a=', ''))}{rng.choice(HOSTILE)!s}"[:6000]]
        run_yaml.write_bytes(content)
        with tally.mutation(number):
            config = load_config(run_yaml, overrides)
            resolve(config, on_gpu=False)
            warnings_of(config)
            assert math.isfinite(config.rollout.temperature) and config.threads <= 1024
    tally.check()


ROWS: list[dict[str, Any]] = [
    {"prompt": "3 5 7 : 22 >", "answer": {"numbers": [3, 5, 7], "target": 22}, "kind": 1, "data_source": "a"},
    {"prompt": "1 2 3 : 6 >", "answer": {"numbers": [1, 2, 3], "target": 6}, "kind": 2.5, "data_source": "b"},
    {"prompt": "9 9 2 : 20 >", "answer": {"numbers": [9, 9, 2], "target": 20}, "kind": 3, "data_source": "c"},
]


def test_data(small_model: Path, tmp_path: Path) -> None:
    tally, tokenization = Tally(), Tokenization(small_model, 112, 64)
    verifiers = [build_verifier("countdown"), build_verifier("exact"), build_verifier("math")]
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    for number, rng in enumerate(seeds("data")):
        kind = rng.randrange(4)
        path = tmp_path / ("train.parquet" if kind >= 2 else "train.jsonl")
        lines = "".join(json.dumps(row) + "\n" for row in (mutated(ROWS, rng) if kind != 1 else ROWS) or [0])
        if kind == 0:
            path.write_text(lines)
        elif kind == 1:
            path.write_bytes(damaged(lines.encode(), rng))
        elif kind == 2:
            path.write_bytes(damaged(whole, rng))
        else:
            try:
                parquet.write_table(pyarrow.Table.from_pylist(mutated(ROWS, rng)), path)
            except Exception:  # Arrow cannot store this mutation
                continue
        with tally.mutation(number, f"kind {kind}"):
            stratify = rng.choice((None, "kind"))
            examples = load_examples(path, stratify_key=stratify, limit=rng.choice((None, 2)))
            check_answers(rng.choice(verifiers), [example.answer for example in examples], str(path))
            ids = tokenization.encode_all(examples, 40)
            tokenization.check_context(examples, ids, 10, "rollout.max_tokens")
            json.dumps([example.answer for example in examples], allow_nan=False).encode()
    tally.check()


def test_server_reply() -> None:
    tally, sampling = Tally(), SamplingSettings(samples=2, max_tokens=4, routers=ROUTERS)
    meta = {"finish_reason": {"type": "stop", "matched": 1}, "weight_version": "3", "prompt_tokens": 4}
    meta |= {"routed_experts": base64.b64encode(np.int32(6 * [3, 1, 0, 2])).decode(), "num_retractions": 0}
    spans = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 3}]
    meta |= {"output_token_logprobs": [[-0.5, 7, None], [-1e-5, 8, None], [-3.25, 1, None]], "weight_versions": spans}
    good = [{"output_ids": [7, 8, 1], "meta_info": meta, "text": ""} for _ in range(2)]
    body = json.dumps(good).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def read(raw: bytes) -> Reply:
        reader = asyncio.StreamReader(limit=2**20)
        reader.feed_data(raw)
        reader.feed_eof()
        return (await _read_reply(reader, 10**6))[0]

    for number, rng in enumerate(seeds("server reply")):
        kind = rng.randrange(3)
        with tally.mutation(number, f"kind {kind}"):
            if kind == 0:
                reply = Reply(200, json.dumps(mutated(good, rng)).encode())
            elif kind == 1:
                reply = Reply(rng.choice((200, 200, 400)), damaged(body, rng))
            else:
                try:
                    reply = asyncio.run(read(damaged(head, rng) + body))
                except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:  # the server counts as lost
                    raise UserError(f"lost: {error!r}"[:200]) from error
            for completion in read_completions("http://server", reply, sampling, 4) or []:
                assert completion.routes is not None and completion.routes.experts.shape[1:] == (2, 2)
                assert len(completion.routes.experts) in (0, 3 + len(completion.token_ids))
                assert completion.routes.experts.max(initial=0) < 4
                assert 0 < len(completion.token_ids) == len(completion.logprobs) <= 4
                assert all(0 <= token < 2**31 for token in completion.token_ids)
                assert all(-1e4 <= value <= 1e-3 for value in completion.logprobs)
    tally.check()


def test_files_of_a_run(tmp_path: Path) -> None:
    """Recordings, metrics, the status and the configuration that tools read."""
    row = {"prompt": "1", "completion": "2", "reward": 1.0, "finish_reason": "stop", "token_ids": [1, 2]}
    row |= {"logprobs": [-0.5, -0.25], "weight_version": 1, "version_spans": [[0, 1], [1, 1]]}
    row["routes"] = Routes(np.uint8(3 * [[[3, 1], [0, 2]]])).encoded()
    metrics = [{"step": step, "reward": 0.5, "entropy": 1.0 / (1 + step), "time/step": None} for step in range(3)]
    status = {
        "name": "a",
        "steps": 5,
        "state": "running",
        "phase": "x",
        "step": 1,
        "reward": 0.5,
        "updated": 1e9,
        "pid": 1,
    }
    sampling = SamplingSettings(samples=2, max_tokens=4, routers=ROUTERS)
    files: dict[str, tuple[Any, Callable[[], Any]]] = {
        "metrics.jsonl": (metrics, lambda: (read_metrics(tmp_path), group_runs([tmp_path]))),
        "status.json": ([status], lambda: read_status(tmp_path)),
        str(recording_path(Path(), 0, 0)): ([row, row], lambda: read_recorded_group(tmp_path, 0, 0, sampling, 2)),
        "config.yaml": ([{"name": "a", "seed": 3, "rollout": {"temperature": 1.0}}], lambda: group_runs([tmp_path])),
    }
    tally = Tally()

    def write(name: str, lines: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in (lines if isinstance(lines, list) else [lines])))
        return path

    for name, (lines, _) in files.items():
        write(name, lines)
    for number, rng in enumerate(seeds("run")):
        name = rng.choice(sorted(files))
        lines, read = files[name]
        if rng.randrange(2):
            path = write(name, mutated(lines, rng))
        else:
            path = write(name, lines)
            path.write_bytes(damaged(path.read_bytes(), rng))
        with tally.mutation(number, name):
            read()
        write(name, lines)
    tally.check()


MODEL_FILES = (
    "config.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
)


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Run the trainer in this process; a refusal becomes a UserError with what it printed."""
    capsys.readouterr()
    code = main(arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]
    if code == 2:
        raise UserError("\n".join(lines))
    assert code == 0, (code, lines)


def finite(run_directory: Path) -> None:
    exported = load_file(run_directory / "huggingface" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in exported.values()), "weights that are not finite were exported"


def test_model_folder(run_yaml: Path, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally()
    (small,) = ([str(run_yaml), "steps=1", "data.heldout=null", "rollout.max_tokens=4", "rollout.prompts_per_step=2"],)
    for number, rng in enumerate(seeds("model", COUNT if COUNT > 100 else COUNT // 4)):
        folder = shutil.copytree(small_model, tmp_path / "mutated")
        file = folder / rng.choice(MODEL_FILES)
        if not file.is_file():
            file.write_text("{}")
        if file.suffix == ".json" and rng.randrange(4):
            file.write_text(json.dumps(mutated(json.loads(file.read_text()), rng)))
        else:
            file.write_bytes(damaged(file.read_bytes(), rng))
        with tally.mutation(number, file.name):
            run([*small, f"model.path={folder}"], capsys)
            finite(tmp_path / "run")
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    tally.check(both=False)


def test_checkpoint(run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally()
    small = [str(run_yaml), "data.heldout=null", "rollout.max_tokens=4", "rollout.prompts_per_step=2"]
    run([*small, "steps=2"], capsys)
    whole = shutil.copytree(tmp_path / "run", tmp_path / "whole")
    for number, rng in enumerate(seeds("checkpoint", COUNT if COUNT > 100 else COUNT // 8)):
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(whole, tmp_path / "run")
        folder = tmp_path / "run" / "checkpoints" / rng.choice(("step_2", "step_2", "step_1"))
        file = rng.choice(
            [
                *sorted(folder.iterdir()),
                *[folder / "run.json"] * 8,
                folder.parent / "latest",
                tmp_path / "run" / "inputs.json",
            ]
        )
        if file.suffix == ".json" and rng.randrange(4):
            file.write_text(json.dumps(mutated(json.loads(file.read_text()), rng)))
        else:
            file.write_bytes(damaged(file.read_bytes(), rng))
        with tally.mutation(number, file.name):
            run([*small, "steps=3"], capsys)
            finite(tmp_path / "run")
    tally.check(both=False)
