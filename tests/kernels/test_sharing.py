"""Kernels that make room for collectives compute the same bits with other numbers of programs."""

from __future__ import annotations

import os

import pytest
import sbn_kernels as sk
import torch
from sbn_kernels.runtime.sharing import LEAST_STEPS, beside_collectives, programs

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a CUDA GPU"
)


@pytest.mark.parametrize("tiles", [1, 100, 132, 500, 768, 8960])
@pytest.mark.parametrize("steps", [1, 12, 128])
def test_programs_have_one_tile_or_a_few_short_ones(tiles, steps):
    assert programs(132, tiles, steps) == min(132, tiles)
    with beside_collectives():
        count = programs(132, tiles, steps)
        assert min(132, tiles) <= count <= tiles
        if steps >= LEAST_STEPS:
            assert count == tiles
        elif count > 132:  # The longest programs have steps enough, and less than a tile more.
            most = -(-tiles // count)
            assert LEAST_STEPS <= most * steps < LEAST_STEPS + steps
    assert programs(132, tiles, steps) == min(132, tiles)


@needs_gpu
@pytest.mark.parametrize(("tokens", "out", "columns"), [(16384, 1536, 8960), (16384, 17920, 1536), (4096, 2048, 1536)])
def test_products_are_equal(tokens, out, columns):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("persistent kernels are those of Hopper")
    torch.manual_seed(0)
    weight = torch.randn(out, columns, device="cuda")
    x8 = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8, device="cuda")
    scale = torch.rand(tokens, device="cuda")
    dy = torch.randint(-127, 128, (out, tokens), dtype=torch.int8, device="cuda")
    rows = torch.rand(out, device="cuda")
    x8t = x8.t().contiguous()

    def products():
        found = []
        for pattern, layout, product in ((2, "sparse24", sk.sparse_gemm), (4, "dense", sk.ternary_gemm)):
            made = sk.prepare_weight(weight, pattern, 4, layout=layout)
            found.append(product(x8, scale, made.packed, rows, out))
        return [*found, sk.weight_gradient_gemm(dy, rows, x8t)]

    alone = products()
    with beside_collectives():
        beside = products()
    assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))
