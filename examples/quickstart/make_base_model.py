"""Train the quickstart's small base model from scratch and save it as an ordinary Hugging Face folder.

    python examples/quickstart/make_base_model.py --output runs/quickstart/base_model

The model learns random legal plays of Countdown (countdown.py), some of which miss the target. It then solves some of
the held-out problems, with an entropy well above zero: reinforcement learning can raise the reward, and can lose the
entropy. The same seed and the same number of threads give the same model.
"""

import argparse
import math
import os
import time
from pathlib import Path

# Limits how long idle OpenMP threads spin. If another process has taken a core, spinning makes a step several times
# slower. The OpenMP runtime reads this when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import countdown
import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AddedToken, DynamicCache, GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging as transformers_logging

from megatron_rlvr.verifiers import VerifierPool, build_verifier

# One token per integer and sign, so a play of 4 numbers has 17 tokens and the end-of-sequence token.
WORDS = [*map(str, range(countdown.LARGEST_VALUE + 1)), *countdown.SIGNS, "=", ";", ":", ">", "<eos>", "<pad>", "<unk>"]
TOKEN = {word: index for index, word in enumerate(WORDS)}
# Padded to a multiple of 8, which tensor-parallel ranks can divide.
VOCABULARY_SIZE = math.ceil(len(WORDS) / 8) * 8
FIRST_SIGN = TOKEN[countdown.SIGNS[0]]
MAX_RESPONSE_TOKENS = 18


def make_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer with one token per integer and sign. White space is ignored when encoding and absent when decoding.

    For every Qwen2 folder, transformers uses Qwen2Tokenizer, which splits text into single digits whatever
    tokenizer.json says. Added tokens are matched before that split, the longest first, so all words are added tokens.
    White space and any other text have no token.
    """
    vocabulary = TOKEN | {f"<unused{index}>": index for index in range(len(WORDS), VOCABULARY_SIZE)}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=64,
    )
    plain = [word for word in WORDS if not word.startswith("<")]
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in plain])
    return tokenizer


def make_model(hidden: int, layers: int, ffn: int) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2.

    Heads, key-value heads, vocabulary and ffn are even, for tensor parallelism; so are the layers, for pipeline
    parallelism.
    """
    config = Qwen2Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=ffn,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=TOKEN["<eos>"],
        pad_token_id=TOKEN["<pad>"],
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def prompt_ids(numbers: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Prompts as token ids [count, size + 3]: numbers, ":", target, ">"."""
    signs = [np.full((len(target), 1), TOKEN[word]) for word in (":", ">")]
    return np.concatenate([numbers, signs[0], target[:, None], signs[1]], axis=1)


def response_ids(plays: np.ndarray) -> np.ndarray:
    """Plays [count, size - 1, 4] as token ids [count, 6 * (size - 1)]; the last token ends the text."""
    left, sign, right, value = np.moveaxis(plays, 2, 0)
    equals, separator = np.full_like(left, TOKEN["="]), np.full_like(left, TOKEN[";"])
    tokens = np.stack([left, FIRST_SIGN + sign, right, equals, value, separator], axis=2).reshape(len(plays), -1)
    tokens[:, -1] = TOKEN["<eos>"]
    return tokens


def training_rows(rng: np.random.Generator, count: int, size: int, miss_share: float) -> torch.Tensor:
    """Prompts followed by plays, int64 [count, 7 * size - 3], without held-out problems.

    A share ``miss_share`` of the plays ignores the target and seldom reaches it. It leaves the model with mistakes to
    unlearn and with the entropy of random play.
    """
    rows: list[np.ndarray] = []
    collected = 0
    while collected < count:
        numbers = countdown.random_numbers(rng, count, size)
        plays = countdown.random_plays(rng, numbers)
        target = plays[:, -1, 3]
        ignores = rng.random(count) < miss_share
        plays = np.where(ignores[:, None, None], countdown.random_plays(rng, numbers), plays)
        keep = ~countdown.is_held_out(numbers, target)
        rows.append(np.concatenate([prompt_ids(numbers, target), response_ids(plays)], axis=1)[keep])
        collected += len(rows[-1])
    return torch.from_numpy(np.concatenate(rows)[:count])


def make_optimizers(model: Qwen2ForCausalLM, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the weight matrices, which needs about half of AdamW's steps; AdamW for everything else."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    if not muon_lr:
        matrices, others = [], others + matrices
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0, momentum=0.95))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def train(model: Qwen2ForCausalLM, arguments: argparse.Namespace) -> None:
    """Train on the tokens of the responses. Every batch contains problems of both sizes."""
    rng = np.random.default_rng([arguments.seed, 2])
    four = round(arguments.batch * arguments.four_share)
    batches = {size: rows for size, rows in ((3, arguments.batch - four), (4, four)) if rows}
    tables = {
        size: training_rows(rng, rows * arguments.steps, size, arguments.miss_share) for size, rows in batches.items()
    }
    optimizers = make_optimizers(model, arguments.lr, arguments.muon_lr)
    model.train()
    columns = (
        TextColumn("base model"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} loss {task.fields[loss]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()) as progress:
        bar = progress.add_task("train", total=arguments.steps, loss="-")
        for step in range(arguments.steps):
            cosine = 0.5 * (1 + math.cos(math.pi * step / arguments.steps))
            decay = min(1.0, (step + 1) / arguments.warmup) * (0.05 + 0.95 * cosine)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * decay
            loss_sum = torch.zeros(())
            tokens = 0
            for size, rows in batches.items():
                ids = tables[size][step * rows : (step + 1) * rows]
                prompt = size + 3
                logits = model(input_ids=ids[:, :-1]).logits[:, prompt - 1 :]
                labels = ids[:, prompt:]
                loss_sum = loss_sum + torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), reduction="sum"
                )
                tokens += labels.numel()
            loss = loss_sum / tokens
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            progress.update(bar, advance=1, loss=f"{loss.item():.3f}")
            # Without a terminal the progress bar is not drawn, so print a line instead.
            if not progress.console.is_terminal and (step + 1) % 50 == 0:
                print(f"step {step + 1} of {arguments.steps}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def sample(
    model: Qwen2ForCausalLM, prompts: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one response to each prompt [rows, length] at temperature 1.

    Returns the tokens, int64 [rows, MAX_RESPONSE_TOKENS], padded after the end, and the exact entropy of each token's
    distribution in nats, float32 of the same shape, 0 on padding.
    """
    model.eval()
    cache = DynamicCache(config=model.config)
    alive = torch.ones(len(prompts), dtype=torch.bool)
    tokens, entropies = [], []
    ids = prompts
    for _ in range(MAX_RESPONSE_TOKENS):
        logprob = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].log_softmax(-1)
        probability = logprob.exp()
        ids = torch.multinomial(probability, 1, generator=generator)
        tokens.append(torch.where(alive, ids[:, 0], TOKEN["<pad>"]))
        entropies.append(-(probability * logprob).sum(-1) * alive)
        alive = alive & (ids[:, 0] != TOKEN["<eos>"])
    return torch.stack(tokens, 1), torch.stack(entropies, 1)


def measure(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    problems: list[tuple[list[int], int]],
    samples: int,
    seed: int,
) -> dict[str, float]:
    """pass@1 (also by problem size) and pass@samples of the problems, and the mean entropy over response tokens."""
    generator = torch.Generator().manual_seed(seed)
    verifier = VerifierPool(build_verifier("countdown"))
    solved: dict[int, np.ndarray] = {}
    entropy_sum = token_count = 0.0
    for size in (3, 4):
        group = [problem for problem in problems if len(problem[0]) == size]
        if not group:
            continue
        numbers = np.array([problem[0] for problem in group])
        prompts = torch.from_numpy(prompt_ids(numbers, np.array([target for _, target in group])))
        tokens, entropies = sample(model, prompts.repeat_interleave(samples, 0), generator)
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        answers = [{"numbers": numbers, "target": target} for numbers, target in group for _ in range(samples)]
        rewards = [verdict.reward for verdict in verifier.verify(texts, answers)]
        solved[size] = np.array(rewards).reshape(-1, samples)
        entropy_sum += entropies.sum().item()
        token_count += (tokens != TOKEN["<pad>"]).sum().item()
    everything = np.concatenate(list(solved.values()))
    result = {
        "pass@1": everything.mean(),
        f"pass@{samples}": everything.max(1).mean(),
        "entropy": entropy_sum / token_count,
    }
    return result | {f"pass@1, {size} numbers": rewards.mean() for size, rewards in solved.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Train the quickstart's base model and save it as a Hugging Face folder."
    )
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart/base_model"), help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=256, help="plays per step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate of AdamW")
    parser.add_argument("--muon-lr", type=float, default=0.03, help="peak learning rate of Muon")
    parser.add_argument("--warmup", type=int, default=30, help="steps of linear warm-up")
    parser.add_argument("--four-share", type=float, default=0.35, help="share of plays with 4 numbers; the rest have 3")
    parser.add_argument("--miss-share", type=float, default=0.2, help="share of plays that ignore the target")
    parser.add_argument("--hidden", type=int, default=144)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ffn", type=int, default=512)
    arguments = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    started = time.perf_counter()
    tokenizer = make_tokenizer()
    model = make_model(arguments.hidden, arguments.layers, arguments.ffn)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    train(model, arguments)
    rng = np.random.default_rng([arguments.seed, 3])
    problems = countdown.make_problems(rng, 200, held_out=True, four_share=arguments.four_share)
    figures = measure(model, tokenizer, problems, 16, arguments.seed)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=MAX_RESPONSE_TOKENS,
        eos_token_id=TOKEN["<eos>"],
        pad_token_id=TOKEN["<pad>"],
    )
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print("held-out problems: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    print(f"{arguments.output}: saved after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
