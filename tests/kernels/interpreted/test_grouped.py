"""The kernel for mixtures of experts equals its twin in the interpreter, and a packed layer runs on it."""

import pytest
import torch
from sbn_kernels.gemm.grouped import grouped_gemm, pack_grouped, tile_table
from sbn_kernels.gemm.reference import grouped_gemm_reference

from sbn_lightning.backends.integer import KernelBackend
from sbn_lightning.backends.reference import REFERENCE
from sbn_lightning.layers.experts_linear import SparseBitExperts
from sbn_lightning.layers.packed import packed_layer
from sbn_lightning.sparsity.config import SparsityConfig


@pytest.mark.parametrize(
    ("counts", "rest", "rows", "inner"),
    [
        ([5], 0, 7, 33),
        ([0, 17, 0, 1], 0, 64, 128),
        ([3, 0, 40], 2, 70, 136),
        ([0, 0], 3, 16, 16),
        ([16, 16, 16], 0, 5, 260),
        ([0, 0, 0], 0, 8, 32),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_its_twin(counts, rest, rows, inner, dtype):
    torch.manual_seed(0)
    tokens, experts = sum(counts) + rest, len(counts)
    codes = torch.randint(-1, 2, (experts * rows, inner), dtype=torch.int8)
    x8 = torch.randint(-128, 128, (tokens, inner), dtype=torch.int8)
    scale, row_scale = torch.rand(tokens), torch.rand(experts * rows)
    arguments = torch.tensor(counts), dtype
    ours = grouped_gemm(x8, scale, pack_grouped(codes), row_scale, *arguments)
    exact = grouped_gemm_reference(x8, scale, codes, row_scale, *arguments)
    assert ours.shape == (tokens, rows)
    if dtype == torch.float32:
        assert torch.equal(ours, exact)
    else:  # The interpreter rounds to bfloat16 differently from torch.
        torch.testing.assert_close(ours, exact, rtol=2.0**-7, atol=0)


def test_tiles_cover_each_token_once():
    counts = torch.tensor([0, 33, 16, 1])
    table = tile_table(counts, 53, 16).tolist()
    covered = [(row, group) for group, start, stop in table for row in range(start, min(start + 16, stop))]
    groups = [1] * 33 + [2] * 16 + [3] + [4] * 3
    assert sorted(covered) == list(enumerate(groups))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packed": torch.zeros(8, 3, dtype=torch.uint8)}, "packed must be uint8"),
        ({"counts": torch.tensor([1, 1, 1])}, "counts must be int64"),
        ({"row_scale": torch.ones(3)}, "row_scale must be float32"),
        ({"x8": torch.zeros(2, 16)}, "tokens must be int8"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = {
        "x8": torch.zeros(2, 16, dtype=torch.int8),
        "scale": torch.ones(2),
        "packed": pack_grouped(torch.zeros(8, 16, dtype=torch.int8)),
        "row_scale": torch.ones(8),
        "counts": torch.tensor([1, 1]),
    }
    with pytest.raises(ValueError, match=message):
        grouped_gemm(**(good | change))


@pytest.mark.parametrize("backend", ["int8", "grouped"])
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_experts_on_kernels_equal_the_reference(backend, bits):
    torch.manual_seed(0)
    layer = SparseBitExperts(3, 32, (20, 12), sparsity=SparsityConfig("2:4", activation_bits=bits))
    packed = packed_layer(layer)
    x, counts = torch.randn(9, 32), torch.tensor([4, 0, 5])
    with torch.no_grad():
        expected = packed(x, counts)
        packed.backend = backend
        torch.testing.assert_close(packed(x, counts), expected, rtol=1e-6, atol=1e-6)
        packed.backend = "reference"
        assert torch.equal(packed(x, counts), layer(x, counts))


def test_experts_with_latent_weights_train_on_kernels():
    torch.manual_seed(0)
    layer = SparseBitExperts(3, 32, (20, 12), sparsity=SparsityConfig("2:4"))
    x, counts = torch.randn(9, 64), torch.tensor([4, 0, 5])
    found = {}
    for backend in (REFERENCE, KernelBackend("portable")):
        layer.backend = backend
        tokens = x.clone().requires_grad_()
        y = layer(tokens, counts, swiglu=True)
        y.square().sum().backward()
        found[backend.name] = y.detach(), tokens.grad, layer.weight.grad
        layer.weight.grad = None
    for ours, expected in zip(found["int8"], found["reference"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert layer.weight.shape == (96, 32)
    assert found["int8"][2][32:64].abs().max() == 0  # the expert without tokens
