"""Compare the speed of the operators with eager torch and with the operators of other trainers, on the same tensors.

    python tools/benchmark_ops.py                       all three parts with the defaults, on the GPU if there is one
    python tools/benchmark_ops.py statistics --shapes 1024x32768,512x151936 --dtype float32 --threads 2
    python tools/benchmark_ops.py linear --tokens 2048 --hidden 1024 --vocabulary 65536
    python tools/benchmark_ops.py statistics --device cuda --dtype bfloat16 --shapes 8192x151936 --repeats 20
    python tools/benchmark_ops.py roofline

Contenders run in turn in one process (see contenders.py). Libraries that are not installed are reported and left out.
The extra `bench` installs trl, liger-kernel and cut-cross-entropy. verl needs other versions than the trainer, so
install it with `pip install --no-deps verl==0.9.1 ray tensordict`. On a busy machine, --processor-time --threads 1
gives repeatable figures where wall time does not. Contenders that allocate memory depend on the allocator: run once
with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1, too.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from contenders import Contender, Meter, chosen, measure, measured_on_cpu, measured_on_gpu, report
from peer_operators import THRESHOLDS, linear_peers, peer_statistics
from torch import Tensor

from megatron_rlvr import ops
from megatron_rlvr.ops.vocab_projection import DEFAULT_CHUNK_BYTES

H100_BYTES_PER_SECOND = 3.35e12


def plain_statistics(logits: Tensor, targets: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy in eager torch."""
    logp = torch.log_softmax(logits.to(dtype), -1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def benchmark_statistics(rows: int, width: int, dtype: torch.dtype, repeats: int, only: str, meter: Meter) -> None:
    """Log-prob and entropy of [rows, width] logits, forward and backward."""
    torch.manual_seed(0)
    base = torch.randn(rows, width).mul_(3).to(dtype)
    targets = torch.randint(0, width, (rows,))
    g, h = torch.randn(rows) / rows, torch.full((rows,), 0.01 / rows)

    def contender(name: str, forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Contender:
        def run(logits: Tensor) -> tuple:
            logprob, entropy = forward(logits, targets)
            torch.autograd.backward([logprob, entropy], [g.to(logprob.dtype), h.to(entropy.dtype)])
            return logprob, entropy, logits.grad

        return Contender(name, lambda: (base.clone().requires_grad_(),), run)

    def in_place(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        statistics = ops.token_statistics(logits, targets)
        return statistics.logprob, statistics.entropy

    def copy(logits: Tensor, target: Tensor) -> tuple:
        return (target.copy_(logits),)

    def forward_only(logits: Tensor) -> tuple:
        with torch.no_grad():
            return (ops.token_statistics(logits, targets).logprob,)

    contenders = [contender("token_statistics, in place", in_place), contender("eager torch", plain_statistics)]
    peers = peer_statistics()
    contenders += [replace(contender(name, forward), peer=name.split()[0]) for name, forward in peers.items()]
    if base.is_cuda:
        contenders.append(contender("torch.compile of eager torch", torch.compile(plain_statistics)))
    contenders.append(Contender("token_statistics, forward only", lambda: (base,), forward_only))
    contenders.append(Contender("a copy of the logits", lambda: (base, torch.empty_like(base)), copy))
    contenders = chosen(contenders, only)
    measure(contenders, repeats, meter)
    few = base[:16].clone()
    forwards = dict(peers, **{"token_statistics, in place": in_place, "eager torch": plain_statistics})
    for c in contenders:
        if c.name not in forwards:
            continue
        forward = forwards[c.name]
        with torch.no_grad():
            computed, expected = forward(few, targets[:16]), plain_statistics(few, targets[:16], torch.float64)
        errors = [float((a.double() - b).abs().max()) for a, b in zip(computed, expected, strict=True)]
        c.error = f"log-prob {errors[0]:.1e}, entropy {errors[1]:.1e}"
    report(f"[{rows}, {width}] {dtype}, forward and backward", contenders, base.numel() * base.element_size())


def benchmark_linear(
    tokens: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype,
    repeats: int,
    chunk_bytes: int | None,
    only: str,
    meter: Meter,
) -> None:
    """The clipped objective from hidden states [tokens, width] and a weight [vocabulary, width], with gradients."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).to(dtype)
    weight = (torch.randn(vocabulary, width) / width**0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,))
    old, advantage = torch.full((tokens,), -11.0), torch.randn(tokens)

    def prepare() -> tuple[Tensor, Tensor]:
        # Gradients are allocated beforehand, as in a trainer, so only the memory on top of them is measured.
        h, w = hidden.clone().requires_grad_(), weight.detach().requires_grad_()
        w.grad, main_grad = torch.zeros_like(w), torch.zeros_like(w, dtype=torch.float32)
        w.grad.add_(0.0), main_grad.add_(0.0)  # touch the pages, so that they are resident
        w.main_grad = main_grad
        return h, w

    def fused(h: Tensor, w: Tensor) -> tuple:
        result = ops.fused_linear_objective(
            h, w, targets, old, advantage, THRESHOLDS, chunk_bytes=chunk_bytes, loss_scale=1.0
        )
        result.loss.backward()
        return h.grad, w.main_grad  # type: ignore[attr-defined]

    def unfused(h: Tensor, w: Tensor, statistics_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple:
        logprob, _ = statistics_of(h @ w.T, targets)
        (-ops.clipped_objective(logprob, old, advantage, THRESHOLDS).objective.sum()).backward()
        return h.grad, w.grad

    def in_place(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        statistics = ops.token_statistics(logits, targets)
        return statistics.logprob, statistics.entropy

    def recomputed(h: Tensor, w: Tensor) -> tuple:
        statistics = ops.fused_linear_token_statistics(h, w, targets, chunk_bytes=chunk_bytes)
        (-ops.clipped_objective(statistics.logprob, old, advantage, THRESHOLDS).objective.sum()).backward()
        return h.grad, w.main_grad  # type: ignore[attr-defined]

    contenders = [
        Contender("fused_linear_objective", prepare, fused),
        Contender("unfused: linear, then token_statistics in place", prepare, lambda h, w: unfused(h, w, in_place)),
        Contender("unfused: linear, then eager torch", prepare, lambda h, w: unfused(h, w, plain_statistics)),
        Contender("fused_linear_token_statistics (recomputes)", prepare, recomputed),
    ]
    contenders += linear_peers(hidden, weight, targets, old, advantage)
    contenders = chosen(contenders, only)
    measure(contenders, repeats, meter)
    expected = unfused(*prepare(), plain_statistics)
    for contender in contenders:
        if contender.peer is None:
            gradients = contender.run(*contender.prepare())
            pairs = zip(gradients, expected, strict=True)
            errors = [float((a.float() - b).abs().max() / b.abs().max()) for a, b in pairs]
            contender.error = f"hidden {errors[0]:.1e}, weight {errors[1]:.1e}"
    chunk = chunk_bytes or DEFAULT_CHUNK_BYTES[hidden.device.type]
    report(
        f"hidden [{tokens}, {width}], weight [{vocabulary}, {width}] {dtype}, chunks of {chunk / 2**20:.0f} MiB",
        contenders,
        tokens * vocabulary * hidden.element_size(),
        "gradients compared with eager, relative to the largest",
    )


# Bytes per bf16 logit to and from device memory, forward and backward; those of peers are counted from their source.
TRAFFIC = (
    ("Megatron-RLVR: read; then read and write", 6),
    ("slime, at least", 56),
    ("slime, at most", 96),
    ("verl, about", 144),
)


def roofline() -> None:
    """Print the times that the memory traffic implies on an H100."""
    print(
        "\nComputed, not measured: traffic / 3.35 TB/s (H100 SXM), T = 8192 tokens, bf16 logits, forward + backward\n"
    )
    print("| path | bytes per logit | V/tp = 151936 | V/tp = 18992 (tp 8) |")
    print("|---|---|---|---|")
    for name, traffic in TRAFFIC:
        times = [8192 * v * traffic / H100_BYTES_PER_SECOND * 1e3 for v in (151936, 18992)]
        print(f"| {name} | {traffic} | {times[0]:.2f} ms | {times[1]:.2f} ms |")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, found {text!r}")
    return int(text)


def shapes(text: str) -> list[tuple[int, int]]:
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text) is None:
        raise argparse.ArgumentTypeError(f"must be like 1024x32768,512x151936 (rows x vocabulary), found {text!r}")
    return [(int(rows), int(width)) for rows, width in (shape.split("x") for shape in text.split(","))]


def mebibytes(text: str) -> int:
    try:
        size = int(float(text) * 2**20)
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"must be a positive number of MiB, found {text!r}")
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("statistics", "linear", "roofline")
    parser.add_argument("what", nargs="?", choices=parts, help="default: all of them")
    parser.add_argument("--shapes", type=shapes, default="1024x32768,512x151936", help="ROWSxVOCABULARY,...")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    default_device = "cuda" if ops.backend() == "cuda" else "cpu"
    parser.add_argument("--device", default=default_device, choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--tokens", type=positive, default=2048)
    parser.add_argument("--hidden", type=positive, default=1024)
    parser.add_argument("--vocabulary", type=positive, default=65536)
    parser.add_argument("--chunk-mib", type=mebibytes, dest="chunk_bytes", help="default: that of the operator")
    parser.add_argument(
        "--only", default="", help="only contenders whose name contains one of these words, comma-separated"
    )
    parser.add_argument("--processor-time", action="store_true", help="stable on a busy machine; use --threads 1")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and ops.backend() != "cuda":
        parser.error("--device cuda: no GPU here, or the CUDA kernels were not built (MEGATRON_RLVR_CUDA=1)")
    torch.set_default_device(arguments.device)
    clock = time.process_time if arguments.processor_time else time.perf_counter
    meter = measured_on_gpu if arguments.device == "cuda" else lambda contender: measured_on_cpu(contender, clock)
    torch.set_num_threads(arguments.threads)
    dtype, settings = getattr(torch, arguments.dtype), (arguments.only, meter)
    for part in parts if arguments.what is None else (arguments.what,):
        if part == "statistics":
            for rows, width in arguments.shapes:
                benchmark_statistics(rows, width, dtype, arguments.repeats, *settings)
        elif part == "linear":
            benchmark_linear(
                arguments.tokens,
                arguments.hidden,
                arguments.vocabulary,
                dtype,
                arguments.repeats,
                arguments.chunk_bytes,
                *settings,
            )
        else:
            roofline()


if __name__ == "__main__":
    main()
