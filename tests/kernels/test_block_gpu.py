"""On a GPU: kernels of a block equal their twins, and a compiled block with them equals one without."""

import copy
import os

import pytest
import torch

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from sbn_kernels.block import norm_backward, norm_quantize, rope_backward
from sbn_kernels.block.reference import norm_backward_reference, norm_quantize_reference, rope_backward_reference

from sbn_lightning import SparseTernaryPrecision, TransformerConfig
from sbn_lightning.backends import blocks
from sbn_lightning.models.transformer import TernaryTransformer


@pytest.mark.parametrize(("tokens", "features"), [(1, 8), (300, 1536), (1000, 896), (513, 4096), (64, 16384)])
@pytest.mark.parametrize("add", [False, True])
def test_norm(tokens: int, features: int, add: bool) -> None:
    torch.manual_seed(0)
    x, residual, dy, dh = (torch.randn(tokens, features, device="cuda").bfloat16() for _ in range(4))
    weight = torch.rand(features, device="cuda") + 0.5
    h, q, scale, rstd = norm_quantize(x, residual if add else None, weight, 1e-6)
    twin = norm_quantize_reference(x, residual if add else None, weight, 1e-6)
    h = h if add else x
    assert torch.equal(h, twin[0])
    torch.testing.assert_close(scale, twin[2], rtol=1e-5, atol=0)
    torch.testing.assert_close(rstd, twin[3], rtol=1e-5, atol=0)
    assert ((q.int() - twin[1].int()).abs() <= 1).all()
    assert (q == twin[1]).float().mean() > 0.99
    dx, dweight = norm_backward(dy, h, dh, weight, rstd)
    twin = norm_backward_reference(dy, h, dh, weight, rstd)
    torch.testing.assert_close(dx, twin[0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(dweight, twin[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("heads", "key_heads", "size"), [(12, 2, 128), (4, 4, 64), (2, 1, 96)])
def test_rope(heads: int, key_heads: int, size: int) -> None:
    torch.manual_seed(0)
    angles = torch.randn(333, size // 2, device="cuda")
    cos, sin = angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), 1)
    dq = torch.randn(3, 333, heads, size, device="cuda").bfloat16().transpose(1, 2)
    dk, dv = (torch.randn(3, key_heads, 333, size, device="cuda").bfloat16() for _ in range(2))
    ours, twin = rope_backward(dq, dk, dv, cos, sin), rope_backward_reference(dq, dk, dv, cos, sin)
    torch.testing.assert_close(ours, twin, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("gradients", ["bf16", "int8"])
def test_a_compiled_block_with_kernels_is_near_one_without(gradients: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"vocab_size": 512, "d_model": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ffn": 512}
    torch.manual_seed(0)
    with torch.device("cuda"):
        first = TernaryTransformer(TransformerConfig(**shape, pattern="2:4", qkv_bias=True))  # type: ignore[arg-type]
        tokens = torch.randint(512, (4, 129))
    results = []
    own = blocks._in_a_training_graph
    for kernels in (True, False):
        torch._dynamo.reset()
        model = copy.deepcopy(first)
        plugin = SparseTernaryPrecision("int8", gradients=gradients)  # type: ignore[arg-type]
        plugin.convert_module(model)
        monkeypatch.setattr(blocks, "_in_a_training_graph", own if kernels else lambda x: False)
        model.compile_blocks(fullgraph=True)
        with plugin.forward_context():
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (ours, gradients_ours), (plain, gradients_plain) = results
    assert abs(ours - plain) < 1e-3 * plain
    for name, wanted in gradients_plain.items():
        assert (gradients_ours[name] - wanted).norm() < 0.05 * wanted.norm(), name
