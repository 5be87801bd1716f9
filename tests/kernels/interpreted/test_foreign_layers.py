"""Layers that read the same tokens quantise them once, a foreign SwiGLU is fused, and gradients are rounded in part."""

import copy
import gc

import pytest
import torch
from sbn_kernels.swiglu.triton import (
    swiglu_backward,
    swiglu_pair_backward,
    swiglu_pair_quantize,
    swiglu_quantize,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sbn_lightning.backends import integer, shared_tokens
from sbn_lightning.backends.integer import Gradients, KernelBackend
from sbn_lightning.backends.reference import REFERENCE
from sbn_lightning.layers.conversion import convert_linears
from sbn_lightning.layers.sparse_bit_linear import SparseBitLinear


class Attention(nn.Module):
    """q, k and v read the same tokens, and nothing else happens."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return q * k + v


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def on_kernels(module: nn.Module, gradients: Gradients = "bf16") -> nn.Sequential:
    model = nn.Sequential(module)
    convert_linears(model, "2:4")
    for layer in model.modules():
        if isinstance(layer, SparseBitLinear):
            layer.backend = KernelBackend("portable", gradients=gradients)
            layer.backend.seed = torch.tensor([1])
    return model


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The calls of the quantiser."""
    calls: list[int] = []
    own = integer.sk.quantize_tokens

    def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        calls.append(bits)
        return own(x, bits)

    monkeypatch.setattr(integer.sk, "quantize_tokens", quantize, raising=False)
    shared_tokens._last.entry = None
    return calls


def gradients_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in model.parameters())]
    return [t for t in found if t is not None]


def test_layers_of_the_same_tokens_quantise_once(counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = on_kernels(Attention()), torch.randn(1, 3, 16)
    alone = copy.deepcopy(model)
    shared = gradients_of(model, x)
    assert len(counted) == 1
    monkeypatch.setattr(shared_tokens, "_can_share", lambda x: False)
    counted.clear()
    for ours, expected in zip(shared, gradients_of(alone, x), strict=True):
        assert torch.equal(ours, expected)
    assert len(counted) == 3


def test_what_has_changed_is_quantised_anew(counted: list[int]) -> None:
    model, x = on_kernels(Attention()), torch.randn(3, 16)
    first = model[0].q(x)
    x.mul_(2).add_(1)
    assert not torch.equal(model[0].q(x), first)
    model[0].q(x.clone())
    assert len(counted) == 3
    model[0].k.backend = REFERENCE
    model[0].k.activation_bits = 4
    model[0].k.backend = KernelBackend("portable")
    y = x.clone()
    model[0].q(y), model[0].k(y)
    assert counted[-2:] == [8, 4]
    with torch.inference_mode():
        z = torch.randn(3, 16)
        model[0].q(z), model[0].q(z)
    assert len(counted) == 7


def test_the_memory_of_tokens_goes_with_them() -> None:
    model, x = on_kernels(Attention()), torch.randn(3, 16)
    model(x)
    assert shared_tokens._last.entry is not None
    del x
    gc.collect()
    assert shared_tokens._last.entry is None


def test_hooks_and_checkpointing(counted: list[int]) -> None:
    torch.manual_seed(0)
    model, x = on_kernels(Attention()), torch.randn(3, 16)
    plain = gradients_of(nn.Sequential(nn.Hardtanh(), copy.deepcopy(model)), x)
    counted.clear()
    x = x.clone().requires_grad_()
    y = checkpoint(nn.Sequential(nn.Hardtanh(), model), x, use_reentrant=False)
    y.square().sum().backward()
    assert len(counted) == 2  # once in the forward, once in the recomputation
    assert torch.equal(y, plain[0])
    assert torch.equal(x.grad, plain[1])
    model[0].k.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    counted.clear()
    model(torch.randn(3, 16))
    assert len(counted) == 3  # q, k with its own tokens, and v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_pair_is_what_gates_and_ups_side_by_side_are(dtype: torch.dtype, bits: int) -> None:
    torch.manual_seed(0)
    x, d = (3 * torch.randn(5, 2 * 176)).to(dtype), torch.randn(5, 176).to(dtype)
    gate, up = x.chunk(2, 1)  # rows with a stride
    for ours, expected in zip(swiglu_pair_quantize(gate, up, bits), swiglu_quantize(x, bits), strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(torch.cat(swiglu_pair_backward(d, gate, up.contiguous()), 1), swiglu_backward(d, x))
    with pytest.raises(ValueError, match="must both be"):
        swiglu_pair_quantize(gate, up[:, :4], bits)
    with pytest.raises(ValueError, match="gradient must be"):
        swiglu_pair_backward(d[:, :4], gate, up)


def test_a_foreign_swiglu_is_fused(counted: list[int]) -> None:
    torch.manual_seed(0)
    model, x = on_kernels(MLP()), torch.randn(1, 3, 16)
    plain = copy.deepcopy(model)
    plain[0].down.register_forward_hook(lambda module, args, output: None)  # so it runs its own forward
    ours = gradients_of(model, x)
    assert len(counted) == 1  # gate and up; the last layer quantises in the fused kernel
    counted.clear()
    expected = gradients_of(plain, x)
    assert len(counted) == 2
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "rounded"), [("int8-dx", 1), ("int8-dw", 2)])
def test_one_gradient_is_rounded_and_the_other_one_is_exact(kind: Gradients, rounded: int) -> None:
    """Each product equals that of the mode it comes from; the exact one equals float64 up to float32's rounding."""
    torch.manual_seed(0)
    layer = SparseBitLinear(16, 8, bias=False, pattern="2:4")
    x, dy = torch.randn(12, 16), torch.randn(12, 8)
    found: dict[str, list[Tensor]] = {}
    for gradients in ("bf16", "int8", kind):
        other = copy.deepcopy(layer)
        other.backend = KernelBackend("portable", gradients=gradients)
        other.backend.seed = torch.tensor([7])
        own = x.clone().requires_grad_()
        y = other(own)
        y.backward(dy)
        found[gradients] = [y.detach(), own.grad, other.weight.grad]  # type: ignore[list-item]
    exact = 3 - rounded
    assert torch.equal(found[kind][0], found["bf16"][0])
    assert torch.equal(found[kind][rounded], found["int8"][rounded])
    assert torch.equal(found[kind][exact], found["bf16"][exact])
    assert not torch.equal(found["int8"][exact], found["bf16"][exact])
    double = copy.deepcopy(layer).double()
    own = x.double().requires_grad_()
    double(own).backward(dy.double())
    reference = own.grad if exact == 1 else double.weight.grad
    assert reference is not None
    torch.testing.assert_close(found[kind][exact].double(), reference, rtol=1e-4, atol=1e-5)
