"""Requests to SGLang's ``/generate`` for all samples of a prompt, and the completions in its replies."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from megatron_rlvr.data.completion import Completion
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.http import Reply
from megatron_rlvr.rollout.sampling import SamplingSettings

UNKNOWN_VERSION = -1
"""The weight version of a server that reports a version that the trainer did not set."""


def sampling_parameters(sampling: SamplingSettings, seed: int) -> dict[str, Any]:
    """Return SGLang's sampling parameters. Servers use the seed only with ``enable_deterministic_inference``."""
    parameters: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "max_new_tokens": sampling.max_tokens,
        "sampling_seed": seed & 0x7FFFFFFF,
        "skip_special_tokens": False,
    }
    if sampling.stop_token_ids:
        parameters["stop_token_ids"] = list(sampling.stop_token_ids)
    else:
        parameters["ignore_eos"] = True
    return parameters


def generate_body(prompt: Sequence[int], sampling: SamplingSettings, seeds: Sequence[int]) -> bytes:
    """Return the JSON of a request for one completion of `prompt` per seed.

    One request carries all samples of a prompt, because each request costs the client more than its tokens do.
    """
    prompts = ",".join([json.dumps(list(prompt))] * len(seeds))
    parameters = json.dumps([sampling_parameters(sampling, seed) for seed in seeds])
    return f'{{"input_ids":[{prompts}],"sampling_params":{parameters},"return_logprob":true}}'.encode()


def read_completions(url: str, reply: Reply, sampling: SamplingSettings) -> list[Completion] | None:
    """Read the completions in a reply of ``/generate``; returns None if the server aborted one of them.

    Raises:
        UserError: if the server refused the request, or the reply is malformed.
    """
    if reply.status != 200:
        raise UserError(f"{url} refused a prompt with status {reply.status}: {reply.excerpt()}")
    try:
        content = reply.json()
        if not isinstance(content, list) or len(content) != sampling.samples:
            raise ValueError(f"it should be a list of {sampling.samples} completions")
        if any(entry["meta_info"]["finish_reason"]["type"] == "abort" for entry in content):
            return None
        return [_read_completion(url, entry, sampling) for entry in content]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{url} sent a malformed reply ({type(error).__name__}: {error}): {reply.excerpt()}; use an SGLang server "
            "of the version that docs/sglang.md names"
        ) from error


def _read_completion(url: str, content: dict[str, Any], sampling: SamplingSettings) -> Completion:
    meta, tokens = content["meta_info"], content["output_ids"]
    reason = meta["finish_reason"]["type"]
    entries = meta["output_token_logprobs"]
    logprobs, scored_tokens = [float(entry[0]) for entry in entries], [entry[1] for entry in entries]
    if not 0 < len(tokens) <= sampling.max_tokens or scored_tokens != tokens or not set(map(type, tokens)) <= {int}:
        raise UserError(f"{url} sent {len(tokens)} tokens with log-probs of {len(scored_tokens)} (or of other tokens)")
    if reason not in ("stop", "length") or not all(map(math.isfinite, logprobs)):
        raise UserError(f"{url} sent a log-prob that is not a number, or the unknown finish reason {reason!r}")
    version = _version(meta["weight_version"])
    spans = [(_version(s["version"]), int(s["end"]) - int(s["start"])) for s in meta.get("weight_versions") or []]
    if spans and sum(length for _, length in spans) != len(tokens):
        raise UserError(f"{url} sent {len(tokens)} tokens with weight versions for another number of tokens: {spans}")
    return Completion(tokens, logprobs, reason, version, tuple(spans) if len(spans) > 1 else ())


def _version(name: object) -> int:
    """Return a weight version as the trainer's number; a server that the trainer did not update reports "default"."""
    return int(str(name)) if str(name).isdecimal() else UNKNOWN_VERSION
