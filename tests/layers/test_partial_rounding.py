"""A layer whose rounding is partly in effect: its product, its gradients, and what does not change."""

import copy

import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F

from sbn_lightning.core.errors import ConfigError
from sbn_lightning.layers import SparseBitLinear
from sbn_lightning.sparsity.ternary import apply_swiglu, quantize_activations


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return SparseBitLinear(16, 8, pattern="2:4")


@pytest.mark.parametrize(("weights", "tokens"), [(0.0, 0.0), (0.25, 0.75), (1.0, 0.5), (0.5, 1.0)])
@pytest.mark.parametrize("gradient", ["dense", "masked"])
def test_product_and_gradients_are_the_formula(layer, weights, tokens, gradient):
    layer.gradient = gradient
    layer.set_rounding(weights, tokens)
    x = torch.randn(3, 5, 16, requires_grad=True)
    dy = torch.randn(3, 5, 8)
    layer(x).backward(dy)

    kept = layer.weight.detach() * layer.mask
    effective = kept + weights * (layer.effective_weight() - kept)
    quantised, scale = quantize_activations(x, 8)
    rounded = x.detach() + tokens * (quantised * scale - x.detach())
    torch.testing.assert_close(layer(x), F.linear(rounded, effective, layer.bias))
    torch.testing.assert_close(x.grad, dy @ effective)
    dw = torch.einsum("abo,abi->oi", dy, rounded)
    torch.testing.assert_close(layer.weight.grad, dw * layer.mask if gradient == "masked" else dw)


def test_swiglu_and_autocast(layer):
    layer.set_rounding(0.5, 0.5)
    gate_up = torch.randn(4, 32)
    torch.testing.assert_close(layer(gate_up, swiglu=True), layer(apply_swiglu(gate_up)))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(gate_up, swiglu=True).dtype == torch.bfloat16


def test_the_whole_rounding_is_the_layer_as_it_was_to_the_last_bit(layer):
    x = torch.randn(4, 16)
    before = layer(x)
    keys = list(layer.state_dict())
    layer.set_rounding(0.5, 0.5)
    assert layer.rounding == (0.5, 0.5)
    assert not torch.equal(layer(x), before)
    assert list(layer.state_dict()) == keys
    layer.set_rounding()
    assert layer.rounding == (1.0, 1.0)
    assert torch.equal(layer(x), before)


def test_a_copy_has_shares_of_its_own(layer):
    layer.set_rounding(0.5, 0.5)
    other = copy.deepcopy(layer)
    layer.set_rounding(0.25, 0.25)
    assert other.rounding == (0.5, 0.5)


def test_a_compiled_layer_follows_the_shares_without_compiling_again(layer):
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, backend=graphs)
    x = torch.randn(4, 16)
    for share in (0.25, 0.5, 0.75):
        layer.set_rounding(share, share)
        torch.testing.assert_close(compiled(x), layer(x))
    assert graphs.frame_count == 1


def test_shares_out_of_range_are_refused(layer):
    with pytest.raises(ConfigError, match=r"rounding of tokens=1.5 is outside 0..1"):
        layer.set_rounding(0.5, 1.5)
