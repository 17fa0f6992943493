"""Times the operators against eager torch and against what other trainers offer on the same tensors.

    python tools/benchmark_ops.py statistics --shapes 1024x32768,512x151936 --dtype float32 --threads 2
    python tools/benchmark_ops.py linear --tokens 2048 --hidden 1024 --vocabulary 65536
    python tools/benchmark_ops.py statistics --device cuda --dtype bfloat16 --shapes 8192x151936 --repeats 20
    python tools/benchmark_ops.py roofline

Contenders run in turn, repetition by repetition, in one process, so that a busy machine disturbs all of them alike; the
ratio is that of the medians. Peak memory is what the process's resident set grew by over one call (Linux); on a GPU it
is what torch allocated on top, and times are those between two events of the stream. Peers are
taken where they are installed and named where they are not: the extra `bench` brings trl, liger-kernel and
cut-cross-entropy; verl wants other versions than the trainer, so `pip install --no-deps verl==0.9.1 ray tensordict`.
On a machine that others use too, --processor-time --threads 1 repeats well where the clock on the wall does not.
The allocator matters to those who allocate: run once with MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1 too.
"""

from __future__ import annotations

import argparse
import importlib
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from megatron_rlvr import ops
from megatron_rlvr.ops.vocab_projection import DEFAULT_CHUNK_BYTES

H100_BYTES_PER_SECOND = 3.35e12
Clock = Callable[[], float]
Meter = Callable[["Contender"], tuple[float, int]]
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Contender:
    """``prepare()`` makes fresh inputs, untimed; ``run(inputs)`` is timed and returns what ``error`` looks at."""

    name: str
    prepare: Callable[[], tuple]
    run: Callable[..., tuple]
    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    error: str = ""
    peer: str | None = None  # whose code it is; it may fail here, ours may not


def resident(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measured_on_cpu(contender: Contender, clock: Clock) -> tuple[float, int]:
    """Seconds, and bytes of memory on top, of one call."""
    inputs = contender.prepare()
    CLEAR_REFS.write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    start = clock()
    kept = contender.run(*inputs)
    seconds = clock() - start
    del kept
    return seconds, resident("VmHWM") - before


def measured_on_gpu(contender: Contender) -> tuple[float, int]:
    inputs = contender.prepare()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda._sleep(20_000_000)  # about 10 ms, in which the host gets ahead: what is measured is the GPU's time
    begin.record()
    kept = contender.run(*inputs)
    end.record()
    torch.cuda.synchronize()
    del kept
    return begin.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - before


def measure(contenders: list[Contender], repeats: int, meter: Meter) -> None:
    for contender in list(contenders):  # once untimed: what a first call loads is nobody's running cost
        try:
            contender.run(*contender.prepare())
        except Exception as error:
            if contender.peer is None:
                raise
            print(f"{contender.peer}: does not run here ({type(error).__name__}: {str(error).splitlines()[0]})")
            contenders.remove(contender)
    for _ in range(repeats):
        for contender in contenders:
            seconds, peak = meter(contender)
            contender.seconds.append(seconds)
            contender.peak_bytes.append(peak)


def report(title: str, contenders: list[Contender], unit_bytes: int, error: str = "error to float64") -> None:
    ours = statistics.median(contenders[0].seconds)
    where = torch.cuda.get_device_name() if ops.backend() == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"\n{title}; ours is {ops.backend()}, {where}, torch {torch.__version__}\n")
    print(f"| | median ms | fastest ms | time / ours | peak extra MiB | of the logits | {error} |")
    print("|---|---|---|---|---|---|---|")
    for c in contenders:
        middle, peak = statistics.median(c.seconds), statistics.median(c.peak_bytes)
        print(
            f"| {c.name} | {middle * 1e3:.2f} | {min(c.seconds) * 1e3:.2f} | {middle / ours:.2f} "
            f"| {peak / 2**20:.1f} | {peak / unit_bytes:.1%} | {c.error} |"
        )


def plain_statistics(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def peer_statistics() -> dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Log-prob and entropy as other trainers compute them from logits, both with gradient."""
    found: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}
    try:
        trl = importlib.import_module("trl.trainer.utils")
        found["trl selective_log_softmax_and_entropy"] = lambda x, t: trl.selective_log_softmax_and_entropy(x, t)
    except ImportError as error:
        print(f"trl: not measured ({error})")
    try:
        verl = importlib.import_module("verl.utils.torch_functional")
        found["verl logprobs_from_logits + entropy_from_logits"] = lambda x, t: (
            verl.logprobs_from_logits(x, t),
            verl.entropy_from_logits(x),
        )
    except ImportError as error:
        print(f"verl: not measured ({error})")
    return found


def exact(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return plain_statistics_double(logits.double(), targets)


def plain_statistics_double(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits, -1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def chosen(contenders: list[Contender], only: str) -> list[Contender]:
    """Those whose name holds one of the comma-separated words; the first stays, ratios are to it."""
    return contenders[:1] + [c for c in contenders[1:] if any(word in c.name for word in only.split(","))]


def benchmark_statistics(rows: int, width: int, dtype: torch.dtype, repeats: int, only: str, meter: Meter) -> None:
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

    def ours(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        found = ops.token_statistics(logits, targets)
        return found.logprob, found.entropy

    def copy(logits: Tensor, target: Tensor) -> tuple:
        return (target.copy_(logits),)

    def forward_only(logits: Tensor) -> tuple:
        with torch.no_grad():
            return (ops.token_statistics(logits, targets).logprob,)

    contenders = [contender("ours, in place", ours), contender("eager torch", plain_statistics)]
    peers = peer_statistics()
    contenders += [replace(contender(name, forward), peer=name.split()[0]) for name, forward in peers.items()]
    if base.is_cuda:
        contenders.append(contender("torch.compile of eager torch", torch.compile(plain_statistics)))
    contenders.append(Contender("ours, forward only", lambda: (base,), forward_only))
    contenders.append(Contender("a copy of the logits", lambda: (base, torch.empty_like(base)), copy))
    contenders = chosen(contenders, only)
    measure(contenders, repeats, meter)
    few = base[:16].clone()
    forwards = dict(peers, **{"ours, in place": ours, "eager torch": plain_statistics})
    for c in contenders:
        if c.name not in forwards:
            continue
        forward = forwards[c.name]
        with torch.no_grad():
            found, expected = forward(few, targets[:16]), exact(few, targets[:16])
        errors = [float((a.double() - b).abs().max()) for a, b in zip(found, expected, strict=True)]
        c.error = f"log-prob {errors[0]:.1e}, entropy {errors[1]:.1e}"
    report(f"[{rows}, {width}] {dtype}, forward and backward", contenders, base.numel() * base.element_size())


THRESHOLDS = SimpleNamespace(
    upper=SimpleNamespace(slope=-0.25, intercept=0.5), lower=SimpleNamespace(slope=-0.13, intercept=0.3)
)


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
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).to(dtype)
    weight = (torch.randn(vocabulary, width) / width**0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (tokens,))
    old, advantage = torch.full((tokens,), -11.0), torch.randn(tokens)

    def prepare() -> tuple[Tensor, Tensor]:
        # gradients exist beforehand, as a trainer's do: what is measured is what comes on top
        h, w = hidden.clone().requires_grad_(), weight.detach().requires_grad_()
        w.grad, w.main_grad = torch.zeros_like(w), torch.zeros_like(w, dtype=torch.float32)
        w.grad.add_(0.0), w.main_grad.add_(0.0)  # make the pages resident
        return h, w

    def fused(h: Tensor, w: Tensor) -> tuple:
        found = ops.fused_linear_objective(
            h, w, targets, old, advantage, THRESHOLDS, chunk_bytes=chunk_bytes, loss_scale=1.0
        )
        found.loss.backward()
        return h.grad, w.main_grad

    def unfused(h: Tensor, w: Tensor, statistics_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple:
        logprob, _ = statistics_of(h @ w.T, targets)
        (-ops.clipped_objective(logprob, old, advantage, THRESHOLDS).objective.sum()).backward()
        return h.grad, w.grad

    def in_place(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        found = ops.token_statistics(logits, targets)
        return found.logprob, found.entropy

    def recomputed(h: Tensor, w: Tensor) -> tuple:
        found = ops.fused_linear_token_statistics(h, w, targets, chunk_bytes=chunk_bytes)
        (-ops.clipped_objective(found.logprob, old, advantage, THRESHOLDS).objective.sum()).backward()
        return h.grad, w.main_grad

    contenders = [
        Contender("ours, fused_linear_objective", prepare, fused),
        Contender("unfused: linear, then token_statistics in place", prepare, lambda h, w: unfused(h, w, in_place)),
        Contender("unfused: linear, then eager torch", prepare, lambda h, w: unfused(h, w, plain_statistics)),
        Contender("ours, fused_linear_token_statistics (recomputes)", prepare, recomputed),
    ]
    contenders += linear_peers(hidden, weight, targets, old, advantage)
    contenders = chosen(contenders, only)
    measure(contenders, repeats, meter)
    expected = unfused(*prepare(), plain_statistics)
    for contender in contenders:
        if contender.peer is None:
            found = contender.run(*contender.prepare())
            errors = [float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)]
            contender.error = f"hidden {errors[0]:.1e}, weight {errors[1]:.1e}"
    chunk = chunk_bytes or DEFAULT_CHUNK_BYTES[hidden.device.type]
    report(
        f"hidden [{tokens}, {width}], weight [{vocabulary}, {width}] {dtype}, chunks of {chunk / 2**20:.0f} MiB",
        contenders,
        tokens * vocabulary * hidden.element_size(),
        "gradients beside eager, relative to the largest",
    )


def linear_peers(hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantage: Tensor) -> list[Contender]:
    found: list[Contender] = []

    def prepare() -> tuple[Tensor, Tensor]:
        return hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    try:
        liger = importlib.import_module("liger_kernel.chunked_loss")
        loss = liger.LigerFusedLinearGRPOLoss(beta=0.0, compiled=hidden.is_cuda, use_ref_model=False, loss_type="grpo")
        shape = (16, hidden.shape[0] // 16)

        def run_liger(h: Tensor, w: Tensor) -> tuple:
            out = loss(
                h.view(*shape, -1),
                w,
                targets.view(shape),
                torch.ones(shape),
                advantage[: shape[0]],
                old_per_token_logps=old.view(shape),
            )
            out[0].backward()
            return h.grad, w.grad

        found.append(
            Contender("liger-kernel LigerFusedLinearGRPOLoss (no entropy)", prepare, run_liger, peer="liger-kernel")
        )
    except ImportError as error:
        print(f"liger-kernel: not measured ({error})")
    try:
        cce = importlib.import_module("cut_cross_entropy")

        def run_cce(h: Tensor, w: Tensor) -> tuple:
            nll = cce.linear_cross_entropy(h, w, targets, reduction="none", impl=implementation)
            nll.sum().backward()
            return h.grad, w.grad

        implementation = "cce" if hidden.is_cuda else "torch_compile"
        found.append(
            Contender(f"cut-cross-entropy {implementation} (no entropy)", prepare, run_cce, peer="cut-cross-entropy")
        )
    except ImportError as error:
        print(f"cut-cross-entropy: not measured ({error})")
    if hidden.is_cuda:
        try:
            kernels = importlib.import_module("verl.utils.kernel.linear_cross_entropy")

            def run_verl(h: Tensor, w: Tensor) -> tuple:
                logprob, _ = kernels.linear_cross_entropy(h, w, targets, 1.0, "none")
                (-ops.clipped_objective(logprob.view(-1), old, advantage, THRESHOLDS).objective.sum()).backward()
                return h.grad, w.grad

            found.append(Contender("verl linear_cross_entropy", prepare, run_verl, peer="verl"))
        except ImportError as error:
            print(f"verl: not measured ({error})")
    return found


# Bytes that a bf16 logit moves to and from device memory, forward and backward; peers as counted from their source.
TRAFFIC = (
    ("ours: read; then read and write", 6),
    ("slime, at least", 56),
    ("slime, at most", 96),
    ("verl, about", 144),
)


def roofline() -> None:
    print(
        "\nComputed, not measured: traffic / 3.35 TB/s (H100 SXM), T = 8192 tokens, bf16 logits, forward + backward\n"
    )
    print("| path | bytes a logit | V/tp = 151936 | V/tp = 18992 (tp 8) |")
    print("|---|---|---|---|")
    for name, traffic in TRAFFIC:
        times = [8192 * v * traffic / H100_BYTES_PER_SECOND * 1e3 for v in (151936, 18992)]
        print(f"| {name} | {traffic} | {times[0]:.2f} ms | {times[1]:.2f} ms |")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, found {text!r}")
    return int(text)


def shapes(text: str) -> list[tuple[int, int]]:
    found = re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be like 1024x32768,512x151936 (rows x vocabulary), found {text!r}")
    return [(int(rows), int(width)) for rows, width in (shape.split("x") for shape in text.split(","))]


def mebibytes(text: str) -> int:
    try:
        found = int(float(text) * 2**20)
    except (ValueError, OverflowError):
        found = 0
    if found <= 0:
        raise argparse.ArgumentTypeError(f"must be a positive number of MiB, found {text!r}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("statistics", "linear", "roofline"))
    parser.add_argument("--shapes", type=shapes, default="1024x32768,512x151936", help="ROWSxVOCABULARY,...")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--tokens", type=positive, default=2048)
    parser.add_argument("--hidden", type=positive, default=1024)
    parser.add_argument("--vocabulary", type=positive, default=65536)
    parser.add_argument("--chunk-mib", type=mebibytes, dest="chunk_bytes", help="default: that of the operator")
    parser.add_argument(
        "--only", default="", help="only contenders whose name holds one of these words, comma-separated"
    )
    parser.add_argument("--processor-time", action="store_true", help="steady on a busy machine; use --threads 1")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and ops.backend() != "cuda":
        parser.error("--device cuda: no GPU here, or the CUDA kernels were not built (MEGATRON_RLVR_CUDA=1)")
    torch.set_default_device(arguments.device)
    clock = time.process_time if arguments.processor_time else time.perf_counter
    meter = measured_on_gpu if arguments.device == "cuda" else lambda contender: measured_on_cpu(contender, clock)
    torch.set_num_threads(arguments.threads)
    dtype, settings = getattr(torch, arguments.dtype), (arguments.only, meter)
    if arguments.what == "statistics":
        for rows, width in arguments.shapes:
            benchmark_statistics(rows, width, dtype, arguments.repeats, *settings)
    elif arguments.what == "linear":
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
