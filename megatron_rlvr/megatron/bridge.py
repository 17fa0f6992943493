"""Hugging Face folders in and out of megatron-core, through mbridge's weight maps."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors import SafetensorError
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

with warnings.catch_warnings():  # mbridge imports every family it knows, some of which complain about missing extras
    warnings.simplefilter("ignore")
    from mbridge.core.bridge import _MODEL_REGISTRY as BRIDGES
    from mbridge.core.bridge import Bridge

from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import device, layer_spec
from megatron_rlvr.megatron.config import ModelConfig, ParallelConfig
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.weights.huggingface_folder import SHARD_BYTES, check_shapes, tensor_files, write_folder

SUPPORTED = ("qwen2", "qwen3", "llama", "qwen3_moe")
"""Families that the tests hold to transformers; mbridge knows more."""


class PolicyBridge:
    """Carries weights between one Hugging Face folder and megatron-core models of the current parallel layout.

    Args:
        path: folder with config.json and safetensors.
        model, parallel: the configuration; `model.dtype` must be resolved by `resolve_dtype`.

    Raises:
        UserError: for a missing folder, an unknown family, or a layout that does not divide the model.
    """

    def __init__(self, path: str | Path, model: ModelConfig, parallel: ParallelConfig):
        self.path = Path(path)
        self.hf_config = read_config(self.path)
        check_layout(self.hf_config, parallel)
        self.dtype = resolve_dtype(model.dtype)
        self.spec_name = layer_spec.resolve(model.layer_spec)
        if model.router_aux_loss and not is_mixture(self.hf_config):
            raise UserError(f"model.router_aux_loss={model.router_aux_loss} but {path} has no experts: set it to 0")
        self._bridge = _open(self.hf_config, model, self.dtype, self.spec_name, parallel)
        # What mbridge pads on the way in and cuts off on the way out.
        self._bridge.make_vocab_size_divisible_by = parallel.tensor
        self._bridge.vocab_size, self._bridge.padded_vocab_size = self.vocab_size, self.padded_vocabulary

    @property
    def config(self) -> TransformerConfig:
        """megatron-core's configuration of the model."""
        return self._bridge.config

    @property
    def vocab_size(self) -> int:
        return self.hf_config.vocab_size

    @property
    def context_length(self) -> int:
        """Longest sequence that the model was made for."""
        return self.hf_config.max_position_embeddings

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding: tensor-parallel ranks hold equal parts of them."""
        ranks = self.config.tensor_model_parallel_size
        return -(-self.vocab_size // ranks) * ranks

    def build(self, shapes_only: bool = False) -> list[PolicyModel]:
        """This rank's parts of the model on its device, weights not yet loaded: one, or one a virtual pipeline stage.

        With `shapes_only` the parameters are on the meta device: for counting, at any size.
        """
        stages = self.config.virtual_pipeline_model_parallel_size
        return [self._build_part(vp_stage, shapes_only) for vp_stage in (range(stages) if stages else [None])]

    def _build_part(self, vp_stage: int | None, shapes_only: bool) -> PolicyModel:
        where = {"ignore_virtual": False, "vp_stage": vp_stage}
        config = self.config
        if shapes_only:  # else megatron-core would name the GPU for every weight, whatever device is in force
            config = copy.copy(config)
            config.use_cpu_initialization = True
        with torch.device("meta") if shapes_only else nullcontext():
            model = PolicyModel(
                config=config,
                transformer_layer_spec=layer_spec.layer_spec(config, self.spec_name, vp_stage),
                vocab_size=self.padded_vocabulary,
                max_sequence_length=self.hf_config.max_position_embeddings,
                pre_process=parallel_state.is_pipeline_first_stage(**where),
                post_process=parallel_state.is_pipeline_last_stage(**where),
                share_embeddings_and_output_weights=is_tied(self.hf_config),
                position_embedding_type="rope",
                rotary_base=self.hf_config.rope_parameters["rope_theta"],
                vp_stage=vp_stage,
            )
        if self.hf_config.rope_parameters["rope_type"] == "llama3":
            # megatron-core's own scaling takes the factor alone; a model may have other wavelengths, too.
            frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](self.hf_config, device.device())
            model.rotary_pos_emb.inv_freq = frequencies
        model.vocabulary = self.vocab_size
        # Under context parallelism a microbatch says which positions it holds, so the angles of all are asked for.
        model.rotary_pos_emb.cp_group = None
        for parameter in model.parameters():
            # Gradient norms and exports ask every parameter whether it is split over tensor-parallel ranks.
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        return model if shapes_only else model.to(device.device())

    def load(self, parts: Sequence[PolicyModel], path: str | Path | None = None) -> None:
        """Fill the parts of `build` with the weights of the folder (of `path`, if given). Collective over the job.

        Raises:
            UserError: when a tensor is missing or of another shape than config.json says, or a file cannot be read.
        """
        folder = Path(path or self.path)
        check_shapes(tensor_files(folder), self.hf_config)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._bridge.load_weights(
                    [_named_for_bridge(part) for part in parts], str(folder), memory_efficient=True
                )
            except (KeyError, ValueError, OSError, SafetensorError) as error:
                raise UserError(
                    f"weights of {folder} cannot be read as {self.hf_config.model_type}: {error}"
                ) from error

    def export(self, parts: Sequence[PolicyModel]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every Hugging Face tensor, whole, on every process, one at a time. Collective."""
        seen = set()
        with torch.no_grad():
            for name, tensor in self._bridge.export_weights([_named_for_bridge(part) for part in parts]):
                if name not in seen:  # a tied embedding comes from the first and from the last stage
                    seen.add(name)
                    yield name, tensor

    def formats(
        self, name: str
    ) -> tuple[
        list[str],
        Callable[[list[torch.Tensor]], torch.Tensor],
        Callable[[torch.Tensor], Iterator[tuple[str, torch.Tensor]]],
    ]:
        """How one weight of a model in one process is carried over, by its name in the model.

        Returns:
            the Hugging Face tensors it is made of, the weight from these, and these from the weight.
        """
        known = _GroupedExperts.grouped_name(name)

        def to_huggingface(weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
            yield from zip(*self._bridge._weight_to_hf_format(known, weight), strict=True)

        def to_megatron(tensors: list[torch.Tensor]) -> torch.Tensor:
            return self._bridge._weight_to_mcore_format(known, tensors)

        return self._bridge._weight_name_mapping_mcore_to_hf(known), to_megatron, to_huggingface

    def save(
        self, parts: Sequence[PolicyModel], folder: str | Path, write: bool, shard_bytes: int = SHARD_BYTES
    ) -> None:
        """Write a complete Hugging Face folder; only the process with `write` touches the disk. Collective.

        Raises:
            UserError: when the folder cannot be written.
        """
        tensors = self.export(parts)
        if write:
            write_folder(Path(folder), tensors, companions=self.path, shard_bytes=shard_bytes)
        else:
            for _ in tensors:
                pass


def read_config(path: Path) -> Any:
    """The `transformers` configuration of a folder.

    Raises:
        UserError: when the folder or its config.json is missing or unreadable.
    """
    from transformers import AutoConfig

    if not path.is_dir():
        raise UserError(
            f"model.path={path} is not a folder: give a Hugging Face model folder with config.json and safetensors"
        )
    if not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json: give a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers' validators raise what they please
        reason = " ".join(str(error).split())
        raise UserError(f"{path}/config.json cannot be read: {reason}") from error
    _check_supported(path, config)
    return config


def is_tied(hf_config: Any) -> bool:
    """Whether the vocabulary projection is the embedding."""
    return bool(getattr(hf_config, "tie_word_embeddings", False))


def is_mixture(hf_config: Any) -> bool:
    """Whether the feed-forward layers are mixtures of experts."""
    return hf_config.model_type.endswith("_moe")


def _check_supported(path: Path, config: Any) -> None:
    """Refuse what would load and compute something else."""
    if config.model_type not in SUPPORTED:
        raise UserError(f"{path}: model_type {config.model_type!r} is not supported: one of {', '.join(SUPPORTED)}")
    rope = config.rope_parameters
    wrong: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "rope_type": (rope["rope_type"], ("default", "llama3")),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), (1.0,)),
        "hidden_act": (config.hidden_act, ("silu",)),
        "use_sliding_window": (getattr(config, "use_sliding_window", False), (False,)),
        "attention_bias": (getattr(config, "attention_bias", False), (False,)),
        "mlp_bias": (getattr(config, "mlp_bias", False), (False,)),
    }
    if is_mixture(config):
        wrong |= {
            "norm_topk_prob": (config.norm_topk_prob, (True,)),
            "decoder_sparse_step": (config.decoder_sparse_step, (1,)),
            "mlp_only_layers": (config.mlp_only_layers, ([], None)),
        }
    for key, (found, allowed) in wrong.items():
        if found not in allowed:
            raise UserError(f"{path}/config.json: {key}={found!r} is not supported: {' or '.join(map(repr, allowed))}")


def check_layout(hf_config: Any, parallel: ParallelConfig) -> None:
    """Refuse tensor and pipeline sizes that do not divide the model.

    Raises:
        UserError: naming the number that is not divisible.
    """
    divisible = {
        "attention heads": hf_config.num_attention_heads,
        "key/value heads": hf_config.num_key_value_heads,
    }
    for what, count in divisible.items():
        if count % parallel.tensor:
            raise UserError(
                f"parallel.tensor={parallel.tensor} does not divide the model's {count} {what}: choose a divisor"
            )
    mixture = is_mixture(hf_config)
    inner, ranks = ("moe_intermediate_size", "expert_tensor") if mixture else ("intermediate_size", "tensor")
    if getattr(hf_config, inner) % getattr(parallel, ranks):
        raise UserError(
            f"parallel.{ranks}={getattr(parallel, ranks)} does not divide the model's {getattr(hf_config, inner)} "
            "feed-forward size: choose a divisor"
        )
    if parallel.expert > 1 and not mixture:
        raise UserError(f"parallel.expert={parallel.expert} but the model has no experts: set it to 1")
    if mixture and hf_config.num_experts % parallel.expert:
        raise UserError(
            f"parallel.expert={parallel.expert} does not divide the model's {hf_config.num_experts} experts: choose a "
            "divisor"
        )
    if mixture and parallel.tensor > 1 and not parallel.sequence:
        raise UserError("a mixture of experts under parallel.tensor > 1 needs parallel.sequence=true: set it")
    if mixture and parallel.tensor > 1 and parallel.expert == 1 and parallel.expert_tensor != parallel.tensor:
        raise UserError(
            f"parallel.expert=1 with parallel.tensor={parallel.tensor} needs parallel.expert_tensor={parallel.tensor}: "
            "set it, or split the experts with parallel.expert"
        )
    stages = parallel.pipeline * parallel.virtual_pipeline
    if hf_config.num_hidden_layers % stages:
        name = "parallel.pipeline" + (" x parallel.virtual_pipeline" if parallel.virtual_pipeline > 1 else "")
        raise UserError(
            f"{name}={stages} does not divide the model's {hf_config.num_hidden_layers} layers: choose a divisor"
        )


def resolve_dtype(name: str) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on the CPU."""
    if name == "auto":
        name = "bfloat16" if device.on_gpu() else "float32"
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _open(hf_config: Any, model: ModelConfig, dtype: torch.dtype, spec_name: str, parallel: ParallelConfig) -> Bridge:
    overrides: dict[str, Any] = {
        "sequence_parallel": parallel.sequence,
        # Microbatches of one pipeline step have different lengths, so stages send shapes along; only then, it costs.
        "variable_seq_lengths": parallel.pipeline > 1,
        "deallocate_pipeline_outputs": False,
        # The interleaved schedule hides its many small transfers behind computation.
        "batch_p2p_comm": parallel.virtual_pipeline == 1,
        "overlap_p2p_comm": parallel.virtual_pipeline > 1,
        **_recompute(parallel),
        **_experts(hf_config, model, spec_name),
        **_fp8(model, spec_name),
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    if spec_name == "local":
        overrides |= {
            "use_cpu_initialization": not device.on_gpu(),
            "masked_softmax_fusion": False,
            "bias_activation_fusion": False,
            "use_te_activation_func": True,  # that of local_layers.py
            "bias_dropout_fusion": False,
            "apply_rope_fusion": False,
            "persist_layer_norm": False,
            "gradient_accumulation_fusion": False,
        }
    family = BRIDGES[hf_config.model_type]
    names = (_LocalNames,) if spec_name == "local" else ()
    bases = (_Overrides, *names, family)
    return type(f"Policy{family.__name__}", bases, {"_overrides": overrides})(hf_config, dtype=dtype)


def _recompute(parallel: ParallelConfig) -> dict[str, Any]:
    """megatron-core's settings of what the backward pass computes again instead of keeping."""
    if parallel.recompute == "none":
        return {}
    if parallel.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}


def _fp8(model: ModelConfig, spec_name: str) -> dict[str, Any]:
    """megatron-core's settings of matrices that multiply in fp8, which is Transformer Engine's doing.

    Raises:
        UserError: for layers that cannot.
    """
    if model.fp8 == "none":
        return {}
    if spec_name != "transformer_engine":
        raise UserError(
            f"model.fp8={model.fp8} needs Transformer Engine's layers, on a GPU: set model.fp8=none or "
            "model.layer_spec=transformer_engine"
        )
    return {"fp8": model.fp8, "fp8_recipe": model.fp8_recipe}


def _experts(hf_config: Any, model: ModelConfig, spec_name: str) -> dict[str, Any]:
    """megatron-core's settings of a mixture of experts, where they are not the family's."""
    if not is_mixture(hf_config):
        return {}
    balanced = model.router_aux_loss > 0
    return {
        "moe_grouped_gemm": spec_name == "transformer_engine",
        "moe_router_load_balancing_type": "aux_loss" if balanced else "none",
        "moe_aux_loss_coeff": model.router_aux_loss,
    }


class _Overrides:
    """Lets our configuration win over mbridge's defaults, whatever the family sets."""

    _overrides: dict[str, Any]
    _DIRECT_MAPPING: dict[str, str]
    hf_config: Any

    def _build_base_config(self, *args: Any, **kwargs: Any) -> TransformerConfig:
        return super()._build_base_config(*args, **{**kwargs, **self._overrides})  # type: ignore[misc]

    def _adjust_mapping_for_shared_weights(self) -> None:
        # mbridge writes into the class's own map here, so that a tied model would change every later untied one, and
        # only for Qwen.
        self._DIRECT_MAPPING = dict(self._DIRECT_MAPPING)
        if is_tied(self.hf_config):
            self._DIRECT_MAPPING["output_layer.weight"] = self._DIRECT_MAPPING["embedding.word_embeddings.weight"]


class _GroupedExperts:
    """A model of single experts under the names that Transformer Engine gives to grouped ones, which mbridge knows."""

    def __init__(self, model: PolicyModel):
        self.model = model
        self.decoder = model.decoder

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {self.grouped_name(name): tensor for name, tensor in self.model.state_dict().items()}

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((self.grouped_name(name), parameter) for name, parameter in self.model.named_parameters())

    @staticmethod
    def grouped_name(name: str) -> str:
        """The name of an expert's weight in the group; other names as they are."""
        return re.sub(r"\.experts\.local_experts\.(\d+)\.(linear_fc\d)\.weight$", r".experts.\2.weight\1", name)


def _named_for_bridge(model: PolicyModel) -> PolicyModel | _GroupedExperts:
    single = any(".local_experts." in name for name, _ in model.named_parameters())
    return _GroupedExperts(model) if single else model


class _LocalNames:
    """Weight names under the local spec, where norms are modules of their own instead of parts of a fused linear."""

    hf_config: Any

    def _weight_name_mapping_mcore_to_hf(self, name: str) -> list[str]:
        if name.startswith("decoder.layers."):
            name = name.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
            if not is_mixture(self.hf_config):
                name = name.replace(".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")
        return super()._weight_name_mapping_mcore_to_hf(name)  # type: ignore[misc]
