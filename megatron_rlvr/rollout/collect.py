"""A step's rollout: draw prompts, have them completed, verify, and hand the batch to the model's other processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rlvr.backend import parallel
from megatron_rlvr.config import Config
from megatron_rlvr.data import Example, PromptSampler, load_examples
from megatron_rlvr.data.batch import RolloutBatch
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engine import Completion, RolloutEngine, SamplingPolicy
from megatron_rlvr.rollout.recording import record, replay
from megatron_rlvr.rollout.sampling import sample_seed
from megatron_rlvr.rollout.tokenization import Tokenization
from megatron_rlvr.verifiers import Verdict, VerifierPool

EVALUATION_SEED = 2**31  # no training step reaches this number, so evaluation never draws a training sample's numbers


@dataclass(frozen=True)
class RolloutTimes:
    """Seconds that a rollout spent in the engine and in the verifier."""

    generate: float
    verify: float


class RolloutCollector:
    """Draws this data-parallel rank's prompts and turns them into verified rollouts.

    Prompts, seeds and minibatches of a step are the same whatever the data-parallel size: rank d of D owns prompt
    slots d, d + D, ... of each minibatch.

    Raises:
        UserError: for data that cannot be read, or sizes that do not divide.
    """

    def __init__(
        self,
        config: Config,
        layout: parallel.Layout,
        engine: RolloutEngine,
        tokenization: Tokenization,
        verifiers: VerifierPool,
    ):
        self.config, self.layout, self.engine = config, layout, engine
        self.tokenization, self.verifiers = tokenization, verifiers
        self.sampling = SamplingPolicy.for_training(config.rollout, tokenization.stop_token_ids)
        self.train = self._load(config.data.train)
        self.heldout = self._load(config.data.heldout, config.evaluation.prompts) if config.data.heldout else None
        self.sampler = PromptSampler(len(self.train[0]), config.rollout.prompts_per_step, config.seed)
        a_minibatch = config.rollout.prompts_per_step // config.algorithm.minibatches
        if a_minibatch % layout.data_size:
            raise UserError(
                f"a minibatch has {a_minibatch} prompts (rollout.prompts_per_step / algorithm.minibatches), which "
                f"{layout.data_size} data-parallel ranks do not divide: change one of the two"
            )
        self.slots = [
            slot
            for start in range(0, config.rollout.prompts_per_step, a_minibatch)
            for slot in range(start + layout.data_rank, start + a_minibatch, layout.data_size)
        ]

    def collect(self, step: int) -> tuple[RolloutBatch, RolloutTimes]:
        """This rank's rollouts of a step, under the weights the engine holds. Collective over the model replica."""
        examples, prompts = self.train
        indices = self.sampler.indices(step)
        chosen = [indices[slot] for slot in self.slots]
        heads = [prompts[i] for i in chosen]
        samples = self.sampling.samples
        seeds = [sample_seed(self.config.seed, step, slot, s) for slot in self.slots for s in range(samples)]
        if self.config.rollout.engine == "recorded":
            folder = Path(self.config.rollout.recording or "")
            generate = lambda: replay(folder, step, self.slots, samples)  # noqa: E731
        else:
            generate = lambda: self.engine.generate(heads, self.sampling, seeds)  # noqa: E731
        completions, texts, verdicts, times = self._verified([examples[i] for i in chosen], samples, generate)
        rewards = [v.reward for v in verdicts]
        if self.config.rollout.record and self.layout.is_leader:
            folder = Path(self.config.run_directory) / "rollouts"
            record(folder, step, self.slots, [examples[i].prompt for i in chosen], completions, texts, rewards)
        return RolloutBatch.from_completions(heads, completions, rewards, self.tokenization.padding), times

    def evaluate(self) -> dict[str, float]:
        """pass@k for k = 1, 2, 4 ... on held-out prompts, with the same seeds every time. Collective over the job."""
        assert self.heldout is not None
        examples, prompts = self.heldout
        settings = self.config.evaluation
        mine = range(self.layout.data_rank, len(examples), self.layout.data_size)
        sampling = replace(self.sampling, samples=settings.samples, temperature=settings.temperature)
        seeds = [sample_seed(self.config.seed, EVALUATION_SEED, i, s) for i in mine for s in range(settings.samples)]

        def generate() -> list[Completion]:
            return self.engine.generate([prompts[i] for i in mine], sampling, seeds)

        completions, _, verdicts, _ = self._verified([examples[i] for i in mine], settings.samples, generate)
        solved = [
            sum(v.reward > 0.5 for v in verdicts[g : g + settings.samples])
            for g in range(0, len(verdicts), settings.samples)
        ]
        powers = [2**e for e in range(settings.samples.bit_length()) if 2**e <= settings.samples]
        sums = {f"pass@{k}": math.fsum(pass_at_k(settings.samples, c, k) for c in solved) for k in powers}
        sums["reward"] = math.fsum(v.reward for v in verdicts) / settings.samples
        sums["response_tokens"] = sum(len(c.token_ids) for c in completions) / settings.samples
        totals = parallel.sum_over_job(sums, contributes=self.layout.is_leader)
        return {name: total / len(examples) for name, total in totals.items()}

    def _verified(
        self, examples: Sequence[Example], samples: int, generate: Callable[[], list[Completion]]
    ) -> tuple[list[Completion], list[str], list[Verdict], RolloutTimes]:
        """Generate where the engine wants it, verify on the leader, share with the replica's other processes."""
        began = time.perf_counter()
        completions: list[Completion] = []
        texts: list[str] = []
        verdicts: list[Verdict] = []
        if self.engine.collective or self.layout.is_leader:
            completions = generate()
        generated = time.perf_counter()
        if self.layout.is_leader:
            texts = self.tokenization.decode(completions)
            verdicts = self.verifiers.verify(texts, [e.answer for e in examples for _ in range(samples)])
        # Context-parallel ranks hold the same weights: each generates for itself, and the leader's word is taken.
        known = self.engine.collective and self.config.parallel.context == 1
        shared = (None if known else completions, verdicts)
        received, verdicts = parallel.share_with_model_peers(shared if self.layout.is_leader else None)
        times = RolloutTimes(generated - began, time.perf_counter() - generated)
        return (completions if received is None else received), texts, verdicts, times

    def _load(self, path: str, limit: int | None = None) -> tuple[list[Example], list[list[int]]]:
        data = self.config.data
        keys = {} if data.prompt_key is None else {"prompt_key": data.prompt_key}
        examples = load_examples(path, answer_key=data.answer_key, limit=limit, **keys)
        return examples, self.tokenization.encode_all(examples, data.max_prompt_tokens)


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k completions solves a prompt, from `solved` of `samples`.

    1 - C(n - c, k) / C(n, k); Chen et al., arXiv 2107.03374, equation 1.
    """
    if samples - solved < k:
        return 1.0
    return 1.0 - math.prod((samples - solved - i) / (samples - i) for i in range(k))
