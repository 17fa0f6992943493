"""What a configuration needs before it can train, each rule in one place: training, plans and the preflight use these.

Every function raises UserError with one line that says what to change.
"""

from __future__ import annotations

from pathlib import Path

from megatron_rlvr.config import Config
from megatron_rlvr.data import load_examples
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron.huggingface_config import read_config
from megatron_rlvr.megatron.layout_checks import check_layout, check_routers, check_world_size
from megatron_rlvr.rollout.tokenization import Tokenization, exceeds_context


def check_engine(config: Config) -> None:
    """Refuse a rollout engine that cannot generate with the layers and the layout of the policy.

    Args:
        config: configuration with every ``auto`` resolved.
    """
    _check_batch_invariance(config)
    engine, expert = config.rollout.engine, config.parallel.expert
    if engine == "sglang" or (engine == "recorded" and not config.data.heldout):
        return
    local, remedy = "rollout.engine=local", "set rollout.engine=sglang"
    if engine == "recorded":
        local = "rollout.engine=recorded evaluates with the local engine, which"
        remedy = "set data.heldout=null, or rollout.engine=sglang"
    if expert > 1:
        raise UserError(
            f"{local} cannot generate with parallel.expert={expert}, because its ranks would have to finish at the "
            f"same token: {remedy}, or parallel.expert=1"
        )
    if config.model.layer_spec != "local":
        raise UserError(
            f"{local} needs model.layer_spec=local, found {config.model.layer_spec}: {remedy} (in a Slurm job "
            "RLVR_SERVERS=colocated or nodes:N), or model.layer_spec=local"
        )


def check_job(config: Config, ranks: int) -> None:
    """Check what needs no GPU and no weights: the layout and the batch of a job of `ranks` processes, and the context.

    The context is checked if the model's config.json is on this machine.
    """
    parallel = config.parallel
    check_world_size(parallel, ranks, "processes", "start a multiple of {}")
    data_parallel = ranks // (parallel.tensor * parallel.pipeline * parallel.context)
    check_groups(config.rollout.prompts_per_step, config.algorithm.minibatches, data_parallel)
    if config.model.layer_spec != "auto":
        check_engine(config)
    if (Path(config.model.path) / "config.json").is_file():
        model = read_config(Path(config.model.path))
        check_layout(model, parallel)
        if config.rollout.routing_replay:
            check_routers(model, config.model.path)
        check_context(config, model.max_position_embeddings)


def check_groups(prompts_per_step: int, minibatches: int, data_parallel: int) -> None:
    """Refuse a number of prompts that the data-parallel ranks cannot share in whole groups in every minibatch."""
    multiple = minibatches * data_parallel
    if prompts_per_step % multiple:
        lower = prompts_per_step // multiple * multiple
        nearest = f"{lower} or {lower + multiple}" if lower else f"{multiple}"
        raise UserError(
            f"rollout.prompts_per_step={prompts_per_step} is not a multiple of {data_parallel} data-parallel ranks x "
            f"algorithm.minibatches={minibatches}, which must share whole groups in every minibatch: the nearest that "
            f"divides is {nearest}"
        )


def check_context(config: Config, positions: int) -> None:
    """Refuse prompts and responses that together can exceed the positions of the model.

    The longest prompt is `data.max_prompt_tokens`, unless the data can be read here and has shorter ones. Training
    measures every prompt (`Tokenization.check_context`).

    Args:
        config: the configuration.
        positions: longest sequence that the model supports, in tokens.
    """
    responses = [("rollout.max_tokens", config.rollout.max_tokens, source.path) for source in config.data.sources()]
    if config.data.heldout and config.evaluation.max_tokens:
        responses.append(("evaluation.max_tokens", config.evaluation.max_tokens, config.data.heldout))
    for setting, response, path in responses:
        prompt, source = config.data.max_prompt_tokens, "data.max_prompt_tokens"
        if not exceeds_context(prompt, response, positions):
            continue
        if (measured := _longest_prompt(config, path)) is not None:
            prompt, source = measured, f"the longest prompt of {path}"
        if exceeds_context(prompt, response, positions):
            remedies = [f"lower {setting} to {positions - prompt}"] if prompt < positions else []
            if source != "data.max_prompt_tokens":
                remedies.append("shorten the prompts")
            elif response < positions:
                remedies.append(f"set {source} to {positions - response} if no prompt is longer")
            remedies.append("use a model whose config.json allows for more")
            raise UserError(
                f"{source} ({prompt} tokens) and {setting}={response} exceed the {positions} positions of the model "
                f"(max_position_embeddings): {', or '.join(remedies)}"
            )


_READ_AT_MOST = 4096
"""Prompts that a plan reads to find the longest one; training reads all."""


def _check_batch_invariance(config: Config) -> None:
    """Refuse ``model.batch_invariant`` where results would still depend on the batch."""
    model, parallel = config.model, config.parallel
    if not model.batch_invariant:
        return
    for setting, value, needed in (
        ("model.layer_spec", model.layer_spec, "local"),
        ("model.dtype", model.dtype, "float32"),
        ("parallel.tensor", parallel.tensor, 1),
        ("parallel.context", parallel.context, 1),
    ):
        if value not in (needed, "auto"):
            raise UserError(
                f"model.batch_invariant needs {setting}={needed}, found {value}: set it, or model.batch_invariant=false"
            )


def _longest_prompt(config: Config, path: str) -> int | None:
    """Return the tokens of the longest prompt of a data set; None if this machine has no data or no tokenizer."""
    folder = Path(config.model.path)
    if not Path(path).is_file() or not list(folder.glob("tokenizer*")):
        return None
    data = config.data
    examples = load_examples(path, prompt_key=data.prompt_key, answer_key=data.answer_key, limit=_READ_AT_MOST)
    tokenization = Tokenization(folder, vocab_size=2**31)
    return max(len(ids) for ids in tokenization.encode_all(examples, data.max_prompt_tokens))
