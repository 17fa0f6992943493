"""Values and gradients of the local layers' functions, compared with their definitions in float64."""

import pytest
import torch

from megatron_rlvr.megatron.local_layers import GatedGELU, GatedSiLU, SplitAndRotate


def rotated(heads, angle):
    """Each pair (x_i, x_{i + d/2}) rotated by the angle of its position."""
    pairs = torch.complex(*heads.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


@pytest.mark.parametrize("batch", [1, 2], ids=["angles of all", "angles of each sequence"])
@pytest.mark.parametrize(("groups", "heads"), [(2, 1), (2, 3), (1, 4)])
def test_split_and_rotate(groups, heads, batch):
    torch.manual_seed(0)
    mixed = torch.randn(3, 2, groups, (heads + 2) * 4, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(3, batch, 1, 1, 2, dtype=torch.float64)
    sizes = [heads * 4, 4, 4]

    def apply(mixed):
        return SplitAndRotate.apply(mixed, angle.cos(), angle.sin(), sizes)

    query, key, value = (heads.unflatten(-1, (-1, 4)) for heads in mixed.split(sizes, dim=-1))
    for output, expected in zip(apply(mixed), (rotated(query, angle), rotated(key, angle), value), strict=True):
        torch.testing.assert_close(output, expected.flatten(2, 3))
        assert output.is_contiguous()
    assert torch.autograd.gradcheck(apply, mixed)


ACTIVATIONS = {
    GatedSiLU: lambda x: x * torch.sigmoid(x),
    GatedGELU: lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("function", ACTIVATIONS)
def test_gated_activation(function):
    torch.manual_seed(0)
    joined = torch.randn(3, 2, 10, dtype=torch.float64, requires_grad=True)
    gate, up = joined.chunk(2, dim=-1)
    torch.testing.assert_close(function.apply(joined), ACTIVATIONS[function](gate) * up)
    assert torch.autograd.gradcheck(function.apply, joined)
