"""On a GPU: the SwiGLU's rounded backward, saved gates and the head in 8 bits equal what they stand for."""

import os

import pytest
import torch

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

import sbn_kernels as sk
import sbn_kernels.catalog
from sbn_kernels.gemm import registry
from sbn_kernels.swiglu.reference import gates_of_codes, saved_gates_reference, swiglu_backward_reference
from sbn_kernels.swiglu.rounded import (
    swiglu_backward_of_codes,
    swiglu_backward_of_rounded,
)
from sbn_kernels.swiglu.saved import swiglu_quantize_and_save

from tests.kernels.int8_head import check_cross_entropy, parts_by_kernels_and_twins


@pytest.mark.parametrize(("tokens", "features"), [(1, 1), (77, 300), (1000, 4864), (4096, 8960), (513, 14336)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounded_backward_and_saved_gates(tokens: int, features: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kernels = registry.gradients(0)
    a8 = torch.randint(-127, 128, (tokens, 64), device="cuda").char()
    weight_t = kernels.transpose(torch.randint(-1, 2, (64, features), device="cuda").char())
    product = a8, torch.rand(tokens, device="cuda") * 1e-6, weight_t
    d = kernels.input_gradient(*product, features, dtype)
    x = (3 * torch.randn(tokens, 2 * features, device="cuda")).to(dtype)
    row_scale, token_scale = torch.rand(2 * features, device="cuda") + 0.01, torch.rand(tokens, device="cuda") + 0.01
    seed = torch.tensor([5], device="cuda")
    one = swiglu_backward_of_rounded(*product, x, None, row_scale, token_scale, seed, dtype)
    two = sk.quantize_gradient(sk.swiglu_backward(d, x), row_scale, token_scale, seed)
    for name, ours, expected in zip(one._fields, one, two, strict=True):
        assert torch.equal(ours, expected), name
    q, scale, codes, code_scale = swiglu_quantize_and_save(x)
    for ours, expected in zip((q, scale), sk.swiglu_quantize(x), strict=True):
        assert torch.equal(ours, expected)
    for ours, expected in zip((codes, code_scale), saved_gates_reference(x), strict=True):
        assert torch.equal(ours, expected)
    dx = swiglu_backward_of_codes(d, codes, code_scale)
    twin = swiglu_backward_reference(d, gates_of_codes(codes, code_scale)).to(dtype)
    torch.testing.assert_close(dx, twin, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-9)
    one = swiglu_backward_of_rounded(*product, codes, code_scale, row_scale, token_scale, seed, dtype)
    for name, ours, expected in zip(
        one._fields, one, sk.quantize_gradient(dx, row_scale, token_scale, seed), strict=True
    ):
        assert torch.equal(ours, expected), name


def test_int8_head_equals_its_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 256, device="cuda").bfloat16(), torch.randn(5000, 256, device="cuda")
    target = torch.randint(5000, (300,), device="cuda")
    for by_kernels, by_twins in parts_by_kernels_and_twins(monkeypatch, hidden, weight, target, 200):
        # Exponentials differ in their last bits, so a few codes differ by one.
        assert (by_kernels - by_twins).norm() < 1e-2 * by_twins.norm()


@pytest.mark.parametrize(("tokens", "classes"), [(1, 1), (77, 300), (500, 32000), (64, 151936)])
def test_cross_entropy_equals_its_twin(tokens: int, classes: int) -> None:
    torch.manual_seed(0)
    logits = (5 * torch.randn(tokens, classes, device="cuda")).bfloat16()
    check_cross_entropy(logits, {"rtol": 1e-4, "atol": 1e-4}, 1e-3)
