"""Code that does not know these layers may use in-place operations, integers or autocast."""

import pytest
import torch
from torch import nn

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers.conversion import convert_linears
from sbn_lightning.layers.packed import packed_layer
from sbn_lightning.layers.sparse_linear import SparseBitLinear, SparseLinear

KINDS = [SparseBitLinear, SparseLinear]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16), (16,)])
@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("make", KINDS)
def test_an_operation_in_place_after_a_layer(make, bits, shape, bias):
    torch.manual_seed(0)
    layer = make(16, 8, bias, pattern="2:4", activation_bits=bits)
    x = torch.randn(shape, requires_grad=True)
    other = torch.randn(8)
    expected = torch.relu(layer(x) * 2 + other)
    expected.sum().backward()
    gradients = layer.weight.grad, x.grad
    layer.weight.grad = x.grad = None
    y = layer(x)
    y *= 2
    y += other
    y = nn.ReLU(inplace=True)(y)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(layer.weight.grad, gradients[0])
    assert torch.equal(x.grad, gradients[1])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_tokens_that_are_no_floating_point_numbers_are_refused(dtype):
    x = torch.ones(2, 16).to(dtype)
    layers = [make(16, 8, pattern="2:4") for make in KINDS]
    for layer in (*layers, packed_layer(layers[0])):
        with pytest.raises(ConfigError, match=rf"{type(layer).__name__}\(16, 8\).*{dtype}"):
            layer(x)
    with pytest.raises(RuntimeError):
        nn.Linear(16, 8)(x)


def test_float32_tokens_are_quantised_from_float32_under_autocast():
    """The code of the paper does the same. Rounding the tokens to bfloat16 first would double the error."""
    torch.manual_seed(0)
    layer = SparseBitLinear(512, 256, False, pattern="6:8")
    x = torch.randn(64, 512, requires_grad=True)
    with torch.no_grad():
        exact = layer(x)
        rounded_first = layer(x.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        packed = packed_layer(layer)(x)
    assert y.dtype == packed.dtype == torch.bfloat16
    assert torch.equal(y, exact.bfloat16())
    assert torch.equal(packed, y)
    assert (rounded_first - exact).abs().max() > 2 * (y.float() - exact).abs().max()
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("make", KINDS)
def test_swiglu_of_float32_under_autocast(make):
    torch.manual_seed(0)
    layer = make(16, 8, pattern="2:4")
    x = torch.randn(3, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, swiglu=True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x, swiglu=True), rtol=0.05, atol=0.05)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_a_network_with_activations_in_place_trains():
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(inplace=True), nn.Linear(16, 4, bias=False))
    convert_linears(model, "2:4")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.randn(8, 16)).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
