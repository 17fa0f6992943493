"""Sample completions of a prompt from a Hugging Face folder; verify them if the prompt is a Countdown problem.

    python examples/quickstart/sample.py examples/quickstart/base_model "3 5 7 : 22 >"

Completions of any other prompt are printed without a verdict.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from megatron_rlvr.errors import UserError, first_line
from megatron_rlvr.exit_status import EXIT_DONE, user_errors_reported
from megatron_rlvr.rollout.tokenizer_folder import load_tokenizer
from megatron_rlvr.verifiers import build_verifier

_COUNTDOWN = re.compile(r"\s*(\d+(?:\s+\d+)+)\s*:\s*(\d+)\s*>\s*")


def sample_texts(folder: Path, prompt: str, count: int, temperature: float, max_tokens: int, seed: int) -> list[str]:
    """Sample ``count`` completions of ``prompt``; returns their texts without special tokens."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no Hugging Face model there (no config.json); pass a folder with config.json and weights"
        )
    tokenizer = load_tokenizer(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{folder} has no model that can be loaded ({reason}): copy the folder again") from error
    inputs = tokenizer(prompt, return_tensors="pt")
    decoded = tokenizer.decode(inputs.input_ids[0], skip_special_tokens=True)
    if "".join(decoded.split()) != "".join(prompt.split()):
        raise UserError(
            f"the model's tokenizer reads the prompt {prompt!r} as {decoded!r}: its vocabulary lacks some words; "
            "use words that it has"
        )
    torch.manual_seed(seed)
    with torch.no_grad():
        output = model.generate(
            **inputs,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            num_return_sequences=count,
            max_new_tokens=max_tokens,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def countdown_answer(prompt: str) -> dict[str, object] | None:
    """The answer to verify against if the prompt has the form "3 5 7 : 22 >", else None."""
    match = _COUNTDOWN.fullmatch(prompt)
    return {"numbers": [int(number) for number in match[1].split()], "target": int(match[2])} if match else None


def run(arguments: argparse.Namespace) -> None:
    """Sample, and print the distinct completions, the most frequent first."""
    if arguments.samples < 1 or arguments.max_tokens < 1 or arguments.seed < 0 or not arguments.temperature > 0:
        raise UserError("--samples and --max-tokens must be at least 1, --temperature above 0, --seed at least 0")
    texts = sample_texts(
        arguments.model,
        arguments.prompt,
        arguments.samples,
        arguments.temperature,
        arguments.max_tokens,
        arguments.seed,
    )
    answer = countdown_answer(arguments.prompt)
    verify = build_verifier("countdown")
    correct = 0.0
    for text, times in Counter(texts).most_common():
        reward = verify(text, answer) if answer is not None else 0.0
        correct += times * reward
        mark = "" if answer is None else "right  " if reward else "wrong  "
        print(f"{times:4d}x  {mark}{text}")
    if answer is not None:
        print(f"{correct:.0f} of {len(texts)} samples are right")


@user_errors_reported
def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Sample completions of a prompt from a Hugging Face folder.")
    parser.add_argument("model", type=Path, help="folder with config.json, weights and tokenizer")
    parser.add_argument("prompt", nargs="?", default="3 5 7 : 22 >")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-tokens", type=int, default=18)
    parser.add_argument("--seed", type=int, default=0)
    transformers_logging.disable_progress_bar()
    run(parser.parse_args(arguments))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
