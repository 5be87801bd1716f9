"""The kernel for mixtures of experts equals its twin on a GPU, in a CUDA graph too, and compiles without one."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("tests/kernels/interpreted/test_grouped.py covers the interpreter", allow_module_level=True)

from sbn_kernels.gemm.grouped import grouped_gemm, grouped_gemm_kernel, pack_grouped
from sbn_kernels.gemm.reference import grouped_gemm_reference

from tests.kernels.test_aot import build, spilled_bytes

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize(
    ("tokens", "features", "warps", "capability"), [(16, 64, 4, 80), (128, 128, 8, 90), (64, 128, 4, 100)]
)  # Nine combinations passed on 2026-11-28; three keep the test short.
def test_the_kernel_compiles_without_spills(tokens, features, warps, capability, tmp_path: Path):
    types = {"x_pointer": "*i8", "packed_pointer": "*u8", "tiles_pointer": "*i32"}
    compiled = build(grouped_gemm_kernel, {"BM": tokens, "BN": features}, capability, types, warps=warps)
    assert spilled_bytes(compiled, tmp_path) <= 16
    assert "mma" in compiled.asm["ptx"]


def case(counts, rest, rows, inner):
    torch.manual_seed(0)
    tokens, experts = sum(counts) + rest, len(counts)
    codes = torch.randint(-1, 2, (experts * rows, inner), dtype=torch.int8, device="cuda")
    x8 = torch.randint(-128, 128, (tokens, inner), dtype=torch.int8, device="cuda")
    scale, row_scale = torch.rand(tokens, device="cuda"), torch.rand(experts * rows, device="cuda")
    return x8, scale, codes, row_scale, torch.tensor(counts, device="cuda")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("counts", "rest", "rows", "inner"),
    [
        ([5], 0, 7, 33),
        ([0, 17, 0, 1], 0, 64, 128),
        ([3, 0, 40], 2, 70, 136),
        ([0, 0], 3, 16, 16),
        ([100, 1, 0, 300] * 8, 5, 1408, 2048),
        ([2048, 1024], 0, 1536, 896),
    ],
)
def test_the_kernel_equals_its_twin(counts, rest, rows, inner, dtype):
    x8, scale, codes, row_scale, numbers = case(counts, rest, rows, inner)
    torch.full((len(x8), rows), float("nan"), device="cuda", dtype=dtype)  # the memory of the next output
    ours = grouped_gemm(x8, scale, pack_grouped(codes), row_scale, numbers, dtype)
    assert torch.equal(ours, grouped_gemm_reference(x8, scale, codes, row_scale, numbers, dtype))


@needs_gpu
def test_a_graph_serves_other_numbers_of_tokens():
    x8, scale, codes, row_scale, numbers = case([20, 0, 12], 0, 96, 160)
    packed = pack_grouped(codes)
    grouped_gemm(x8, scale, packed, row_scale, numbers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = grouped_gemm(x8, scale, packed, row_scale, numbers)
    for counts in ([20, 0, 12], [1, 30, 1], [0, 0, 32]):
        numbers.copy_(torch.tensor(counts))
        graph.replay()
        assert torch.equal(y, grouped_gemm_reference(x8, scale, codes, row_scale, numbers, torch.bfloat16))
