"""What SGLang servers need in order to return the kept set of each token, which SGLang calls its sampling mask.

SGLang 0.5.23 returns them for requests with ``return_sampling_mask``, if ``top_k`` is at most the server's
``sampling_mask_max_tokens``. It cuts after the temperature, by top-k and top-p of the same distribution. Its flashinfer
backend keeps all tokens whose probability equals that of the last one kept, so a set can have more than ``top_k`` ids.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from megatron_rlvr.checked_input import InvalidInputError, field
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.huggingface_config import read_config
from megatron_rlvr.rollout.config import RolloutConfig
from megatron_rlvr.rollout.engines.sglang.config import SGLangConfig
from megatron_rlvr.rollout.engines.sglang.endpoint import Endpoint
from megatron_rlvr.rollout.engines.sglang.launch_arguments import normalized

ARGUMENT = "sampling_mask_max_tokens"
"""SGLang's name of the most ids that a server returns for one token."""
DEFAULT_LIMIT = 4096
"""SGLang's default of `ARGUMENT`."""


def is_cut(rollout: RolloutConfig) -> bool:
    """Whether rollouts for training are drawn under top-p or top-k."""
    return rollout.top_p < 1.0 or rollout.top_k > 0


def requested_top_k(top_k: int, vocabulary: int) -> int:
    """Return the finite ``top_k`` that a request for kept sets must have; the vocabulary cuts nothing."""
    return min(top_k or vocabulary, vocabulary)


def with_kept_sets(rollout: RolloutConfig, model_folder: Path) -> SGLangConfig:
    """Return the servers' configuration with a limit that is large enough for the kept sets.

    Args:
        rollout: section ``rollout`` of the configuration.
        model_folder: Hugging Face folder of the model.

    Raises:
        UserError: if ``rollout.sglang.server`` sets a limit that is too small.
    """
    config = rollout.sglang
    if not is_cut(rollout):
        return config
    vocabulary = read_config(model_folder).vocab_size
    needed = requested_top_k(rollout.top_k, vocabulary)
    if not rollout.top_k and vocabulary > DEFAULT_LIMIT:
        print(
            f"warning: rollout.top_p without rollout.top_k makes SGLang copy {vocabulary} token ids for every token: "
            "set rollout.top_k, for example to 1024",
            file=sys.stderr,
        )
    limit = normalized(config.server).get(ARGUMENT)
    if limit is None:
        # Twice as many as are asked for, because tokens with equal probabilities are kept together.
        return replace(config, server={**config.server, ARGUMENT: max(DEFAULT_LIMIT, min(2 * needed, vocabulary))})
    _check_limit("rollout.sglang.server", limit, needed)
    return config


async def check_server(endpoint: Endpoint, needed: int) -> None:
    """Refuse a server that cannot return kept sets of `needed` ids.

    Raises:
        UserError: if it cannot, or is an SGLang that does not know of them.
        ServerLostError: if it does not answer.
    """
    reply = await endpoint.request("GET", "/server_info", endpoint.config.health_timeout_seconds)
    try:
        limit = field(reply.json(), ARGUMENT, int)
    except InvalidInputError:
        raise UserError(
            f"{endpoint.url} cannot return the tokens that rollout.top_p and rollout.top_k keep: its /server_info has "
            f"no {ARGUMENT}; use the SGLang version that docs/sglang.md names, or set rollout.top_p=1 and "
            "rollout.top_k=0"
        ) from None
    _check_limit(endpoint.url, limit, needed)


def _check_limit(where: str, limit: object, needed: int) -> None:
    if not isinstance(limit, int) or limit < needed:
        raise UserError(
            f"{where} has {ARGUMENT}={limit}, but rollout.top_p and rollout.top_k need sets of up to {needed} tokens: "
            f"start the server with --{ARGUMENT.replace('_', '-')} {needed}, or set rollout.top_k to at most {limit}"
        )
