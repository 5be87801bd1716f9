"""On a GPU from Ampere on, Hopper included, the kernel equals its twin: odd shapes, poisoned outputs, every tile."""

import os

import pytest
import sbn_kernels as sk
import torch

if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from sbn_kernels.gemm.sm80.gemm import SPARSE_NEEDS, TILES, ampere_sparse_gemm, ampere_ternary_gemm

from tests.kernels.ampere.case import make_case

if (reason := SPARSE_NEEDS.missing(torch.cuda.current_device())) is not None:
    pytest.skip(reason, allow_module_level=True)

SHAPES = [
    (1, 4, 1), (1, 132, 8), (33, 64, 129), (128, 32, 256), (300, 1000, 1001), (257, 896, 1216), (1000, 2048, 136),
    (17, 4096, 4096),
]  # fmt: skip


def product(sparse: bool):
    return ampere_sparse_gemm if sparse else ampere_ternary_gemm


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_exact(shape: tuple[int, int, int], sparse: bool, dtype: torch.dtype) -> None:
    case = make_case(*shape, sparse, "cuda")
    for tile in range(-1, len(TILES)) if dtype == torch.bfloat16 else (-1, 0):
        for bias in (False, True):
            torch.full((shape[0], shape[2]), float("nan"), device="cuda", dtype=dtype)  # poison for the next output
            b = case.bias if bias else None
            y = product(sparse)(case.x8, case.scale, case.packed, case.row_scale, shape[2], b, dtype, tile)
            assert torch.equal(y, case.expected(bias, dtype)), (tile, bias)


@pytest.mark.parametrize("sparse", [True, False])
def test_repeated_launches(sparse: bool) -> None:
    """A race shows rarely, hence 20 launches of many programs with long rings."""
    case = make_case(2048, 1280, 2048, sparse, "cuda")
    expected = case.expected(False, torch.bfloat16)
    for tile in range(len(TILES)):
        for _ in range(20):
            y = product(sparse)(case.x8, case.scale, case.packed, case.row_scale, 2048, None, torch.bfloat16, tile)
            assert torch.equal(y, expected), tile


def test_tokens_that_are_not_aligned_are_copied() -> None:
    case = make_case(5, 1000, 9, True, "cuda")
    wide = torch.zeros(5, 1003, device="cuda", dtype=torch.int8)
    wide[:, 3:] = case.x8
    y = ampere_sparse_gemm(wide[:, 3:], case.scale, case.packed, case.row_scale, 9)
    assert torch.equal(y, case.expected(False, torch.bfloat16))


def test_cuda_graph_and_compile() -> None:
    case = make_case(100, 1000, 264, True, "cuda")

    def layer(x: torch.Tensor) -> torch.Tensor:
        return ampere_sparse_gemm(*sk.quantize_tokens(x), case.packed, case.row_scale, 264) * 2

    x = torch.randn(100, 1000, device="cuda", dtype=torch.bfloat16)
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(captured, layer(x))
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
