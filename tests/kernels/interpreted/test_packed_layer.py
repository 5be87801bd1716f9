import pytest
import torch

from sbn_lightning import SparseBitLinear
from sbn_lightning.layers.packed import packed_layer


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [3, 70])  # the decode kernel, the dense int8 kernel
def test_packed_layer_equals_its_reference(bits: int, tokens: int) -> None:
    torch.manual_seed(0)
    layer = packed_layer(SparseBitLinear(96, 72, pattern="2:4", split_sizes=(40, 32), activation_bits=bits))
    x = torch.randn(2, tokens // 2, 96)
    layer.backend = "reference"
    expected = layer(x)
    layer.backend = "kernels"
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    assert layer._packed is not None


def test_packed_layer_passes_a_gradient_on() -> None:
    """The kernels compute no gradient, so the reference takes over where a gradient is needed."""
    torch.manual_seed(0)
    layer = packed_layer(SparseBitLinear(96, 72, pattern="2:4"))
    found = []
    for layer.backend in ("reference", "kernels"):
        x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
        layer(x).sum().backward()
        found.append(x.grad)
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)
