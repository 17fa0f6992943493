"""Requests to SGLang's ``/generate`` for all samples of a prompt, and the completions in its replies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_rlvr.checked_input import InvalidInputError, checked, describe, field
from megatron_rlvr.data.completion import Completion, checked_completion
from megatron_rlvr.data.routes import RouterShape, Routes, decoded_routes
from megatron_rlvr.errors import UserError
from megatron_rlvr.rollout.engines.sglang.http import LARGEST_REPLY, Reply
from megatron_rlvr.rollout.sampling import SamplingSettings

UNKNOWN_VERSION = -1
"""The weight version of a server that reports a version that the trainer did not set."""


def sampling_parameters(sampling: SamplingSettings, seed: int) -> dict[str, Any]:
    """Return SGLang's sampling parameters. Servers use the seed only with ``enable_deterministic_inference``.

    If `sampling` asks for kept sets, its ``top_k`` must be set: servers refuse to return them without it.
    """
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
    kept = ',"return_sampling_mask":true' if sampling.returns_kept else ""
    routes = ',"return_routed_experts":true' if sampling.routers else ""
    return f'{{"input_ids":[{prompts}],"sampling_params":{parameters},"return_logprob":true{kept}{routes}}}'.encode()


def prefill_body(prompt: Sequence[int]) -> bytes:
    """Return the JSON of a request that computes `prompt` into the prefix cache and generates nothing.

    SGLang computes prompts that arrive together once each, equal or not. It sends such a request itself for
    ``sampling_params.n``, which allows one seed only (TokenizerManager._handle_batch_request).
    """
    return json.dumps({"input_ids": [list(prompt)], "sampling_params": [{"max_new_tokens": 0}]}).encode()


def largest_reply(sampling: SamplingSettings, prompt_tokens: int = 0) -> int:
    """Return the maximum size of a reply of ``/generate``, in bytes; larger ones are not read.

    A token takes about 40 bytes: its id twice, and its log-prob with up to 20 digits. Each id of its kept set takes 8.
    The routes of a token take 4 bytes per layer and expert in base64, which makes 3 bytes 4.
    """
    kept = 12 * sampling.top_k if sampling.returns_kept else 0
    routes = 6 * sampling.routers.layers * sampling.routers.chosen if sampling.routers else 0
    tokens = (256 + kept + routes) * sampling.max_tokens + routes * prompt_tokens
    return min(LARGEST_REPLY + tokens * sampling.samples, 2**32)


def read_completions(
    url: str, reply: Reply, sampling: SamplingSettings, prompt_tokens: int = 0
) -> list[Completion] | None:
    """Read the completions in a reply of ``/generate``; returns None if the server aborted one of them.

    Args:
        url: URL of the server.
        reply: its reply.
        sampling: what was requested.
        prompt_tokens: length of the prompt, which routes include.

    Raises:
        UserError: if the server refused the request, or the reply is malformed.
    """
    if reply.status != 200:
        raise UserError(f"{url} refused a prompt with status {reply.status}: {reply.excerpt()}")
    try:
        content = reply.json()
        if not isinstance(content, list) or len(content) != sampling.samples:
            raise InvalidInputError(f"it should be a list of {sampling.samples} completions")
        metas = [field(entry, "meta_info", dict) for entry in content]
        reasons = [field(field(meta, "finish_reason", dict), "type", str) for meta in metas]
        if "abort" in reasons:
            return None
        return [
            _read_completion(*parts, sampling, prompt_tokens) for parts in zip(content, metas, reasons, strict=True)
        ]
    except InvalidInputError as error:
        raise UserError(
            f"{url} sent a malformed reply ({error}): {reply.excerpt()}; use an SGLang server of the version that "
            "docs/sglang.md names"
        ) from error


def _read_completion(
    content: dict[str, Any], meta: dict[str, Any], reason: str, sampling: SamplingSettings, prompt_tokens: int
) -> Completion:
    tokens, entries = field(content, "output_ids", list), field(meta, "output_token_logprobs", list)
    if not all(isinstance(entry, list) and len(entry) >= 2 for entry in entries):
        raise InvalidInputError("'output_token_logprobs' has entries that are not [log-prob, token, ...]")
    if [entry[1] for entry in entries] != tokens:
        raise InvalidInputError(f"{len(tokens)} tokens with log-probs of {len(entries)} (or of other tokens)")
    if "weight_version" not in meta:
        raise InvalidInputError("no 'weight_version'")
    spans = []
    for span in checked(meta.get("weight_versions") or [], list, "weight_versions"):
        start, end = (field(span, name, int, at_least=0, at_most=sampling.max_tokens) for name in ("start", "end"))
        if end <= start or "version" not in span:
            raise InvalidInputError(f"the span {describe(span)} of a weight version")
        spans.append((_version(span["version"]), end - start))
    logprobs: Any = [entry[0] for entry in entries]
    kept = None
    if sampling.returns_kept:
        # The log-probs above are those of the whole vocabulary.
        if "output_token_sampling_mask" not in meta:
            raise InvalidInputError(
                "no 'output_token_sampling_mask', the tokens that rollout.top_p and rollout.top_k kept"
            )
        kept, logprobs = meta["output_token_sampling_mask"], meta.get("output_token_sampling_logprobs")
    completion = checked_completion(
        token_ids=tokens,
        logprobs=logprobs,
        finish_reason=reason,
        weight_version=_version(meta["weight_version"]),
        spans=spans,
        max_tokens=sampling.max_tokens,
        kept=kept,
        routes=_read_routes(meta, prompt_tokens + len(tokens) - 1, sampling.routers) if sampling.routers else None,
    )
    return completion if len(spans) > 1 else replace(completion, version_spans=())


def _read_routes(meta: dict[str, Any], tokens: int, routers: RouterShape) -> Routes:
    """Read the routes of a sequence's first `tokens` tokens.

    A server that runs out of memory retracts a sequence: later it computes the sequence anew, and reports the routes of
    this second pass with the log-probs of the first. Such routes are left out.
    """
    if meta.get("routed_experts") is None:
        raise InvalidInputError("no 'routed_experts', the routes that rollout.routing_replay needs")
    routes = decoded_routes(meta["routed_experts"], tokens, routers, of_server=True)
    return Routes(routes.experts[:0]) if field(meta, "num_retractions", int, at_least=0) else routes


def _version(name: object) -> int:
    """Return a weight version as the trainer's number; a server that the trainer did not update reports "default"."""
    text = name if isinstance(name, str) else describe(name).removeprefix("int ")
    return int(text) if len(text) < 19 and text.isascii() and text.isdecimal() else UNKNOWN_VERSION
