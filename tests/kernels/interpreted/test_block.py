"""Norm with quantisation, its backward, and the backward of rotary positions equal their twins in the interpreter."""

import pytest
import torch
from sbn_kernels.block import norm_backward, norm_quantize, norm_quantize_sums, rope_backward
from sbn_kernels.block.reference import norm_backward_reference, norm_quantize_reference, rope_backward_reference

from sbn_lightning.backends import blocks
from sbn_lightning.backends.integer import KernelBackend
from sbn_lightning.models.rope import apply_rope
from sbn_lightning.sparsity.ternary import apply_swiglu

pytestmark = pytest.mark.usefixtures("poisoned_buffers")


@pytest.mark.parametrize(("tokens", "features", "bits"), [(1, 1, 8), (9, 20, 4), (5, 300, 8), (0, 16, 8)])
@pytest.mark.parametrize("add", [False, True])
def test_norm(tokens: int, features: int, bits: int, add: bool) -> None:
    x, weight = 3 * torch.randn(tokens, features), torch.rand(features) + 0.5
    residual = torch.randn(tokens, features) if add else None
    h, q, scale, rstd = norm_quantize(x, residual, weight, 1e-6, bits)
    twin = norm_quantize_reference(x, residual, weight, 1e-6, bits)
    assert h.shape == (x.shape if add else (0, features))
    h = h if add else x
    assert torch.equal(h, twin[0])
    torch.testing.assert_close(scale, twin[2], rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd, twin[3], rtol=1e-6, atol=0)
    assert ((q.int() - twin[1].int()).abs() <= 1).all()
    assert (q == twin[1]).float().mean() > 0.99 or not tokens
    dy, dh = torch.randn(tokens, features), torch.randn(tokens, features)
    wide = dy.t().contiguous().t()  # rows that are not contiguous
    for ours, expected in zip(
        norm_backward(wide, h, dh, weight, rstd), norm_backward_reference(dy, h, dh, weight, rstd), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 3])
def test_norm_of_a_product_in_parts(parts: int) -> None:
    """The bits are those of the product that is computed first. Rows behind the last token are of no use."""
    tokens, features = 5, 300
    x, weight = torch.randn(tokens, features), torch.rand(features) + 0.5
    sums = torch.randint(-(2**20), 2**20, (parts, 8, features), dtype=torch.int32)
    of_tokens, of_rows = torch.rand(tokens) * 1e-4, torch.rand(features) * 1e-2
    product = sums.sum(0)[:tokens].float() * (of_tokens[:, None] * of_rows)
    ours = norm_quantize_sums(x, sums, of_tokens, of_rows, weight, 1e-6)
    for got, wanted in zip(ours, norm_quantize(x, product, weight, 1e-6), strict=True):
        assert torch.equal(got, wanted)
    for wrong in (sums[:, :4].contiguous(), sums.float(), sums[:0], sums.mT.contiguous().mT):
        with pytest.raises(ValueError, match="sums must be contiguous int32"):
            norm_quantize_sums(x, wrong, of_tokens, of_rows, weight, 1e-6)


def test_norm_backward_is_the_gradient() -> None:
    h, weight = torch.randn(7, 24, dtype=torch.float64), torch.rand(24, dtype=torch.float64)
    dy, dh = torch.randn(7, 24, dtype=torch.float64), torch.randn(7, 24, dtype=torch.float64)
    inputs = h.requires_grad_(), weight.requires_grad_()
    y = torch.nn.functional.rms_norm(h, (24,), weight, 1e-6)
    expected = torch.autograd.grad((y * dy).sum() + (h * dh).sum(), inputs)
    h, weight = h.detach().float(), weight.detach().float()
    rstd = norm_quantize_reference(h, None, weight, 1e-6)[3]
    for ours, wanted in zip(norm_backward(dy.float(), h, dh.float(), weight, rstd), expected, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tokens", "heads", "key_heads", "size"), [(5, 4, 2, 8), (17, 2, 2, 12), (0, 2, 1, 4)])
def test_rope(tokens: int, heads: int, key_heads: int, size: int) -> None:
    angles = torch.randn(tokens + 3, size // 2)
    cos, sin = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), 1)
    cos, sin = cos[:tokens], sin[:tokens]
    dq = torch.randn(2, tokens, heads, size).transpose(1, 2)
    dk, dv = torch.randn(2, key_heads, tokens, size), torch.randn(2, tokens, key_heads, size).transpose(1, 2)
    ours, expected = rope_backward(dq, dk, dv, cos, sin), rope_backward_reference(dq, dk, dv, cos, sin)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    with pytest.raises(ValueError, match="rows and weight must fit"):
        norm_quantize(x, x[1:], weight, 1e-6)
    with pytest.raises(ValueError, match="4 bits"):
        norm_quantize(x, None, weight, 1e-6, 3)
    with pytest.raises(ValueError, match="rstd"):
        norm_backward(x, x, x, weight, torch.ones(2))
    d = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="cos and sin"):
        rope_backward(d, d, d, torch.ones(2, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="do not fit"):
        rope_backward(d, d[..., :2], d[..., :2], torch.ones(3, 4), torch.ones(3, 4))


def test_the_functions_of_a_block_have_the_gradients_of_plain_pytorch() -> None:
    """A norm with the residual on both sides, and heads that are turned by position."""
    norm = torch.nn.RMSNorm(16, 1e-6)
    angles = torch.randn(5, 2)
    tables = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), 1)
    found = []
    inputs = [torch.randn(2, 5, 16, requires_grad=True) for _ in range(2)] + [norm.weight]
    for by_kernels in (True, False):
        for residual in (None, inputs[1]):
            if by_kernels:
                h, y, (codes, scale) = KernelBackend("portable").norm_and_quantize(inputs[0], residual, norm, 8)
                torch.testing.assert_close(codes * scale[:, None], y.detach().flatten(0, 1), rtol=0, atol=0.02)
                heads = KernelBackend("portable").turned_heads(y, *tables, (8, 4, 4), 4)
            else:
                h = inputs[0] if residual is None else inputs[0] + residual
                q, k, v = (x.unflatten(-1, (-1, 4)).transpose(1, 2) for x in norm(h).split((8, 4, 4), -1))
                heads = apply_rope(q, *tables), apply_rope(k, *tables), v
            loss = (h.sin().sum() + sum((head.sin() * (i + 1)).sum() for i, head in enumerate(heads))).square()
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
            found.append([g for g in (*heads, *gradients) if g is not None])
    for ours, expected in zip(found[0] + found[1], found[2] + found[3], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_product_of_gates_and_ups_has_the_gradient_of_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_in_a_training_graph", lambda x: True)
    gate_up = torch.randn(2, 3, 24, requires_grad=True)
    found = []
    for product in (KernelBackend("portable").gated_product, apply_swiglu):
        y = product(gate_up)
        found.append((y, *torch.autograd.grad(y.sin().sum(), gate_up)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
