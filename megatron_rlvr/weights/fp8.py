"""Weights in blocks of FP8, as SGLang loads them: ``weight``, and one scale per block in ``weight_scale_inv``.

The format is that of DeepSeek-V3 (arXiv 2412.19437, section 3.3.2): blocks of 128 x 128 elements, each with the scale
that maps its largest element to the largest FP8 number (e4m3, 448). The weight is ``weight * weight_scale_inv``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 128
DTYPE = torch.float8_e4m3fn
SCALE_DTYPE = torch.float32
LARGEST = torch.finfo(DTYPE).max
QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
"""``quantization_config`` in the config.json of a folder with such weights."""

# Projections of attention, of feed-forward layers and of experts. Embeddings, output layers, norms and routers stay as
# they are.
_QUANTIZED = re.compile(r"\.(?:\w+_proj(?:_with_mqa)?|experts\.\d+\.w[123])\.weight$")


def is_quantized(name: str) -> bool:
    """Whether the tensor of this Hugging Face name is quantized."""
    return _QUANTIZED.search(name) is not None


def scale_name(name: str) -> str:
    """Return the name of the scales of a quantized tensor."""
    return f"{name}_scale_inv"


def scale_shape(shape: torch.Size) -> torch.Size:
    """Return the shape of the scales of a tensor [rows, columns]: one per block, also for those at an edge."""
    return torch.Size([-(-size // BLOCK) for size in shape])


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight.

    Args:
        weight: floating point [rows, columns].

    Returns:
        float8_e4m3fn [rows, columns], and float32 scales [rows / 128, columns / 128], rounded up.
    """
    rows, columns = scale_shape(weight.shape)
    padding = (0, columns * BLOCK - weight.shape[1], 0, rows * BLOCK - weight.shape[0])
    blocks = functional.pad(weight.float(), padding).view(rows, BLOCK, columns, BLOCK)
    largest = blocks.abs().amax(dim=(1, 3))
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    # Rounding of the quotient can exceed the largest number, which the conversion would turn into NaN.
    quantized = (blocks / scale[:, None, :, None]).clamp(-LARGEST, LARGEST).to(DTYPE)
    return quantized.view(rows * BLOCK, -1)[: weight.shape[0], : weight.shape[1]].contiguous(), scale


def dequantize(quantized: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 weight [rows, columns] of a quantized tensor and its scales."""
    each = scale.repeat_interleave(BLOCK, 0)[: quantized.shape[0]].repeat_interleave(BLOCK, 1)
    return quantized.float() * each[:, : quantized.shape[1]]


class Export(Protocol):
    """Complete Hugging Face tensors, one at a time; `WeightExport` is one."""

    def described(self) -> Iterator[tuple[str, torch.dtype, torch.Size]]:
        """Yield name, dtype and shape of every tensor, in the order of `tensors`."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor by name; it is valid until the next one."""
        ...


class QuantizedExport:
    """An export whose projections are quantized, each followed by its scales.

    Args:
        export: the tensors of the policy.
    """

    def __init__(self, export: Export):
        self._export = export

    def described(self) -> Iterator[tuple[str, torch.dtype, torch.Size]]:
        """See `Export.described`."""
        for name, dtype, shape in self._export.described():
            if is_quantized(name):
                yield name, DTYPE, shape
                yield scale_name(name), SCALE_DTYPE, scale_shape(shape)
            else:
                yield name, dtype, shape

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Export.tensors`."""
        return quantized(self._export.tensors())


def quantized(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by name, the projections quantized and each followed by its scales."""
    for name, tensor in tensors:
        if is_quantized(name):
            weight, scale = quantize(tensor)
            yield name, weight
            yield scale_name(name), scale
        else:
            yield name, tensor


def rounded(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by name, the projections rounded to what their quantized form stands for, in their own dtype."""
    for name, tensor in tensors:
        yield name, dequantize(*quantize(tensor)).to(tensor.dtype) if is_quantized(name) else tensor
