"""A small random model with its tokenizer, and Countdown prompts that the tokenizer covers."""

from __future__ import annotations

import json
import random
from pathlib import Path


def make_small_model(folder: Path, seed: int = 0, tied: bool = True, hidden: int = 32, mixture: bool = False) -> Path:
    """Save a random Qwen2 (Qwen3-MoE if ``mixture``) with the quickstart's tokenizer as a Hugging Face folder."""
    import torch
    from make_base_model import TOKEN, VOCABULARY_SIZE, make_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    make_tokenizer().save_pretrained(folder)
    torch.manual_seed(seed)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": hidden, "norm_topk_prob": True}
    config = AutoConfig.for_model(
        model_type="qwen3_moe" if mixture else "qwen2",
        vocab_size=VOCABULARY_SIZE,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        eos_token_id=TOKEN["<eos>"],
        pad_token_id=TOKEN["<pad>"],
        **(experts if mixture else {}),
    )
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases start at 0 and norms at 1; without noise a test could not see that one of them is lost or swapped.
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(folder)
    return folder


def write_problems(path: Path) -> Path:
    """Write a JSONL file of 64 Countdown prompts that the small model's tokenizer covers."""
    rng = random.Random(7)
    rows = []
    for _ in range(64):
        numbers = [rng.randint(1, 9) for _ in range(rng.choice((3, 4)))]
        target = rng.randint(1, 99)
        prompt = f"{' '.join(map(str, numbers))} : {target} >"
        rows.append({"prompt": prompt, "answer": {"numbers": numbers, "target": target}, "kind": target})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
