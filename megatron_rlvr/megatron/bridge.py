"""A Hugging Face model in megatron-core: its configuration, its layers, and the mapping of its weights.

The bridge handles tensors and names. `megatron_rlvr.weights` reads and writes folders.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import RotaryEmbedding
from megatron.core.tensor_parallel import set_defaults_if_not_set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from megatron_rlvr.megatron import device, fusions, layer_spec, lora
from megatron_rlvr.megatron.config import LoRAConfig, ModelConfig, ParallelConfig
from megatron_rlvr.megatron.families import family_of
from megatron_rlvr.megatron.huggingface_config import is_tied, read_config
from megatron_rlvr.megatron.layout_checks import check_layout
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.megatron.rotary import attention_factor, inverse_frequencies
from megatron_rlvr.megatron.transformer_settings import transformer_settings
from megatron_rlvr.megatron.weight_export import WeightExport, adapter_sources, weight_sources
from megatron_rlvr.megatron.weight_loading import TensorReader, load_weights, stored_name
from megatron_rlvr.megatron.weight_shards import local_name


@dataclass(frozen=True)
class WeightFormat:
    """How a weight that is not split over ranks maps to Hugging Face tensors.

    Attributes:
        names: names of the Hugging Face tensors that the weight consists of.
        to_megatron: converts these tensors, in the order of `names`, to the weight.
        to_huggingface: converts the weight to these tensors, by name.
    """

    names: list[str]
    to_megatron: Callable[[list[Tensor]], Tensor]
    to_huggingface: Callable[[Tensor], Iterator[tuple[str, Tensor]]]


class PolicyBridge:
    """Builds the megatron-core model of a Hugging Face folder in the current parallel layout, and maps its weights.

    Args:
        model, parallel: sections of the configuration, with ``auto`` resolved; ``model.path`` is the folder.
        adapters: section ``lora``; None, or a rank of 0, for a model whose own weights are trained.

    Attributes:
        settings: megatron-core's settings that follow from folder and layout; it changes its own `config` later.

    Raises:
        UserError: if the folder is missing, the model is not supported, the layout does not divide the model, or
            ``lora.target_modules`` names a module that it does not have.
    """

    def __init__(self, model: ModelConfig, parallel: ParallelConfig, adapters: LoRAConfig | None = None):
        self.path = Path(model.path)
        self.hf_config = read_config(self.path)
        check_layout(self.hf_config, parallel)
        self.dtype = getattr(torch, model.dtype)
        self.spec_name = model.layer_spec
        layer_spec.check_installed(self.spec_name)
        self.settings = settings = transformer_settings(self.hf_config, model, parallel, self.spec_name)
        fusions.check_fusions(settings)
        self.family = family_of(self.hf_config)
        latent = settings.get("multi_latent_attention", False)
        self.config: TransformerConfig = (MLATransformerConfig if latent else TransformerConfig)(**settings)
        self.adapters = adapters if adapters is not None and adapters.rank else None
        if self.adapters is not None:
            lora.chosen_modules(self.family, self.adapters)

    @property
    def vocab_size(self) -> int:
        """Vocabulary size of the model, without padding."""
        return self.hf_config.vocab_size

    @property
    def context_length(self) -> int:
        """Longest sequence that the model supports, in tokens."""
        return self.hf_config.max_position_embeddings

    @property
    def padded_vocabulary(self) -> int:
        """Rows of the embedding: the vocabulary, padded so that all tensor-parallel ranks have the same number."""
        ranks = self.config.tensor_model_parallel_size
        return -(-self.vocab_size // ranks) * ranks

    def build(self, shapes_only: bool = False) -> list[PolicyModel]:
        """Build this rank's model chunks: one, or one per virtual pipeline stage.

        Weights are not loaded, and adapters have no values yet (`lora.initialize`).

        Args:
            shapes_only: build on the meta device, so that parameters of a model of any size can be counted.
        """
        stages = self.config.virtual_pipeline_model_parallel_size
        return [self._build_chunk(vp_stage, shapes_only) for vp_stage in (range(stages) if stages else [None])]

    def _build_chunk(self, vp_stage: int | None, shapes_only: bool) -> PolicyModel:
        stage = {"ignore_virtual": False, "vp_stage": vp_stage}
        config = self.config
        if shapes_only:  # otherwise megatron-core requests the GPU for every weight, which overrides the meta device
            config = copy.copy(config)
            config.use_cpu_initialization = True
            # On the meta device, torch takes a millisecond to initialize nothing.
            config.init_method = config.output_layer_init_method = config.embedding_init_method = _keep
        with torch.device("meta") if shapes_only else nullcontext(), fusions.output_layer_without_apex():
            model = PolicyModel(
                config=config,
                transformer_layer_spec=layer_spec.layer_spec(
                    config, self.spec_name, self.family, vp_stage, fused_norms=self.adapters is None
                ),
                vocab_size=self.padded_vocabulary,
                max_sequence_length=self.context_length,
                pre_process=parallel_state.is_pipeline_first_stage(**stage),
                post_process=parallel_state.is_pipeline_last_stage(**stage),
                share_embeddings_and_output_weights=is_tied(self.hf_config),
                position_embedding_type="rope",
                vp_stage=vp_stage,
            )
            if self.adapters is not None:
                lora.add_adapters(model, self.family, self.hf_config, self.adapters)
        if config.multi_latent_attention:
            # megatron-core leaves the angles of latent attention to its layers.
            model.rotary_pos_emb = RotaryEmbedding(config.kv_channels, rotary_percent=1.0, use_cpu_initialization=True)
            model.rotary_factor = attention_factor(self.hf_config)
        if not shapes_only:
            # megatron-core knows only some of the types of RoPE, and not all of their parameters.
            model.rotary_pos_emb.inv_freq = inverse_frequencies(self.hf_config, device.device())
        if self.family.embedding_scale is not None:
            model.embedding_scale = self.family.embedding_scale(self.hf_config)
        model.vocabulary = self.vocab_size
        # Under context parallelism a microbatch selects its positions itself, so it needs the angles of all positions.
        model.rotary_pos_emb.cp_group = None
        for parameter in model.parameters():
            # Gradient norms and exports read from these attributes whether tensor-parallel ranks split a parameter.
            set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        return model if shapes_only else model.to(device.device())

    def read_weights(self, model_chunks: Sequence[PolicyModel], reader: TensorReader) -> None:
        """Load the weights that `reader` reads into the chunks of `build`. Each rank reads its own shards.

        Callers use `megatron_rlvr.weights.loading.load_folder`, which first checks the folder and raises user errors.

        Raises:
            KeyError: if a tensor is missing.
            WeightShapeError: if a tensor has another shape than config.json describes.
        """
        load_weights(model_chunks, self.family, self.hf_config, reader)

    def weight_export(self, model_chunks: Sequence[PolicyModel]) -> WeightExport:
        """Prepare exports of the weights of `model_chunks`. Collective over the job."""
        return WeightExport(weight_sources(model_chunks, self.family, self.hf_config), self.hf_config)

    def adapter_export(self, model_chunks: Sequence[PolicyModel]) -> WeightExport:
        """Prepare exports of the adapters of `model_chunks`, by their names in PEFT. Collective over the job."""
        return WeightExport(adapter_sources(model_chunks, self.family), self.hf_config)

    def export(self, model_chunks: Sequence[PolicyModel]) -> Iterator[tuple[str, Tensor]]:
        """Yield every complete Hugging Face tensor on every process, one at a time. Collective over the job.

        Adapters are merged into the weights.
        """
        yield from self.weight_export(model_chunks).tensors()

    def weight_format(self, name: str) -> WeightFormat:
        """Return how the weight `name`, which must not be split over ranks, maps to Hugging Face tensors."""
        entry, names = self.family.table.find(stored_name(local_name(name), self.hf_config))

        def to_huggingface(weight: Tensor) -> Iterator[tuple[str, Tensor]]:
            yield from zip(names, entry.to_huggingface(weight, self.hf_config), strict=True)

        def to_megatron(tensors: list[Tensor]) -> Tensor:
            return entry.to_megatron(tensors, self.hf_config)

        return WeightFormat(names, to_megatron, to_huggingface)


def _keep(weight: Tensor) -> Tensor:
    """Initialize nothing."""
    return weight
