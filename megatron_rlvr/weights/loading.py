"""Load a Hugging Face folder into this rank's model chunks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError

from megatron_rlvr.checked_input import one_line
from megatron_rlvr.errors import UserError
from megatron_rlvr.megatron import waiting
from megatron_rlvr.megatron.bridge import PolicyBridge
from megatron_rlvr.megatron.model import PolicyModel
from megatron_rlvr.megatron.weight_loading import WeightShapeError
from megatron_rlvr.weights.huggingface_folder import FolderReader, tensor_files
from megatron_rlvr.weights.shape_checks import FolderWeights, check_shapes, rounding, unused_warning
from megatron_rlvr.weights.whole_weights import is_finite


def load_folder(bridge: PolicyBridge, model_chunks: Sequence[PolicyModel], found: FolderWeights) -> None:
    """Load the weights of the bridge's folder into model chunks, and warn of what it does not load as it is.

    Collective over the job. Args and errors are those of `read_folder`.
    """
    folder = bridge.path
    if (unused := unused_warning(found)) and dist.get_rank() == 0:
        print(f"warning: {folder}: {unused}", file=sys.stderr)
    if (rounded := rounding(found.dtypes, bridge.dtype)) and dist.get_rank() == 0:
        print(f"warning: {folder}: {rounded}; model.dtype=float32 keeps them", file=sys.stderr)
    read_folder(bridge, model_chunks, found)


def read_folder(bridge: PolicyBridge, model_chunks: Sequence[PolicyModel], found: FolderWeights) -> None:
    """Read the weights of the bridge's folder into model chunks; each rank reads its shards. Collective over the job.

    Args:
        bridge: the bridge that built the chunks.
        model_chunks: this rank's model chunks.
        found: what the folder holds, from `check_folder`.

    Raises:
        UserError: if a file cannot be read; on every process, if a weight is not finite in the dtype of the model.
    """
    folder = bridge.path
    try:
        with FolderReader(found.files) as reader:
            bridge.read_weights(model_chunks, reader)
    except KeyError as error:
        raise UserError(
            f"{folder} lacks {error.args[0]}, which {bridge.hf_config.model_type} needs: download the model again"
        ) from None
    except WeightShapeError as error:
        raise UserError(f"{folder}: {error}: the weights belong to another model; download both again") from None
    except (TypeError, RuntimeError, OSError, SafetensorError) as error:
        raise UserError(
            f"weights of {folder} cannot be read as {bridge.hf_config.model_type}: {one_line(error)}"
        ) from error
    _check_finite(model_chunks, folder)


def check_folder(bridge: PolicyBridge) -> FolderWeights:
    """Check from the headers of the files that the bridge's folder has the weights that config.json describes.

    Call this before building a model: one of other sizes may need more memory than there is.

    Raises:
        UserError: if a file cannot be read, or the folder has other weights.
    """
    return check_shapes(tensor_files(bridge.path), bridge.hf_config)


def _check_finite(model_chunks: Sequence[PolicyModel], folder: Path) -> None:
    """Refuse weights that are not finite in the dtype of the model. Collective over the job."""
    bad = next((n for chunk in model_chunks for n, weight in chunk.named_parameters() if not is_finite(weight)), None)
    if waiting.any_rank(bad is not None, f"every process to read {folder}"):
        which = f"the weight {bad} has" if bad is not None else "weights of another process have"
        raise UserError(f"{folder}: {which} values that are NaN or infinite: download or save the model again")
