"""On a GPU every kernel equals its twin in ``reference.py``: odd shapes, poisoned outputs, the whole int8 range."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sbn_kernels as sk
import torch
from sbn_kernels.block import norm_quantize, norm_quantize_sums
from sbn_kernels.decode import int8_rows
from sbn_kernels.decode.reference import int8_rows_reference
from sbn_kernels.gemm.reference import gemm_reference as reference
from sbn_kernels.gemm.sm90.gemm import gemm_sums
from sbn_kernels.prepare.reference import codes_reference, gamma_reference, mask_reference
from sbn_kernels.quantize.reference import quantize_tokens_reference
from sbn_kernels.swiglu.reference import swiglu_backward_reference, swiglu_reference

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a CUDA GPU"
)
SHAPES = [
    (1, 4, 1), (1, 132, 8), (33, 64, 129), (128, 32, 256), (300, 1000, 1001), (257, 896, 1216), (1000, 2048, 136),
    (17, 4096, 4096),
]  # fmt: skip
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def needs(op: str) -> None:
    capabilities = sk.capabilities()
    if not capabilities.can(op):
        pytest.skip(capabilities.reasons[op])


def case(tokens: int, columns: int, out: int, sparse: bool) -> tuple[torch.Tensor, ...]:
    """Return tokens of the whole int8 range (with many -128), scales, codes, mask, gamma and bias."""
    torch.manual_seed(tokens + columns + out)
    x8 = torch.randint(-128, 128, (tokens, columns), device="cuda", dtype=torch.int8)
    x8[:, ::5] = -128
    codes = torch.randint(-1, 2, (out, columns), device="cuda", dtype=torch.int8)
    mask = torch.ones_like(codes, dtype=torch.bool)
    if sparse:
        mask = (torch.rand(out, columns // 4, 4, device="cuda").argsort(-1) < 2).flatten(-2)
    scale, row_scale = torch.rand(tokens, device="cuda") + 0.1, torch.rand(out, device="cuda") + 0.1
    bias = torch.randn(out, device="cuda", dtype=torch.bfloat16)
    return x8, scale, codes * mask, mask, row_scale, bias


def poison(tokens: int, out: int, dtype: torch.dtype) -> None:
    """Fill the memory that the next output of this shape will use."""
    torch.full((tokens, out), float("nan"), device="cuda", dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hopper_gemm(shape: tuple[int, int, int], sparse: bool, dtype: torch.dtype) -> None:
    needs("sparse_gemm")
    x8, scale, codes, mask, row_scale, bias = case(*shape, sparse)
    gemm, packed = sk.ternary_gemm, sk.pack_dense(codes)
    if sparse:
        gemm, packed = sk.sparse_gemm, sk.pack_sparse24(codes, mask)
    tiles = (0, 256, 128, 64, 32, 16) if dtype == torch.bfloat16 else (0, 256)
    for tile in tiles:
        for b in (None, bias) if tile in (0, 256) else (None,):
            poison(shape[0], shape[2], dtype)
            y = gemm(x8, scale, packed, row_scale, shape[2], b, dtype, tile)
            assert torch.equal(y, reference(x8, scale, codes, row_scale, b, dtype)), (tile, b is not None)


@pytest.mark.parametrize("sparse", [True, False])
def test_many_tiles_a_program_and_repeated_launches(sparse: bool) -> None:
    """There are more tiles than multiprocessors, so rings and phases wrap. A race shows rarely, hence 20 launches."""
    needs("sparse_gemm")
    x8, scale, codes, mask, row_scale, _ = case(4096, 640, 2048, sparse)
    packed = sk.pack_sparse24(codes, mask) if sparse else sk.pack_dense(codes)
    gemm = sk.sparse_gemm if sparse else sk.ternary_gemm
    expected = reference(x8, scale, codes, row_scale, None, torch.bfloat16)
    for tile in (256, 128, 32):
        for _ in range(20):
            poison(4096, 2048, torch.bfloat16)
            assert torch.equal(gemm(x8, scale, packed, row_scale, 2048, token_tile=tile), expected), tile


@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 33, 64])
@pytest.mark.parametrize(("columns", "out"), [(132, 8), (1000, 1001), (4096, 520)])
@pytest.mark.parametrize("layout", ["dense", "sparse24"])
def test_decode(tokens: int, columns: int, out: int, layout: str) -> None:
    needs("decode" if layout == "dense" else "sparse_gemm")
    x8, scale, codes, mask, row_scale, bias = case(tokens, columns, out, layout == "sparse24")
    packed = sk.pack_sparse24(codes, mask) if layout == "sparse24" else sk.pack_dense(codes)
    for b, portable in ((None, None), (bias, None), (bias, True), (bias, False)):
        if portable and layout == "sparse24":
            continue
        poison(tokens, out, torch.bfloat16)
        y = sk.decode_gemm(x8, scale, packed, row_scale, out, b, layout=layout, portable=portable)
        assert torch.equal(y, reference(x8, scale, codes, row_scale, b, torch.bfloat16)), (b is None, portable)


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 64])
@pytest.mark.parametrize(("columns", "out"), [(132, 8), (896, 1001), (1536, 151936)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_8_bit_head(tokens: int, columns: int, out: int, dtype: torch.dtype) -> None:
    needs("decode")
    x = torch.randn(tokens, columns, device="cuda").to(dtype)
    codes = torch.randint(-127, 128, (out, columns), dtype=torch.int8, device="cuda")
    scale = torch.rand(out, device="cuda")
    poison(tokens, out, dtype)
    y = int8_rows(x, codes, scale).float()
    exact = int8_rows_reference(x.double(), codes, scale).float()
    difference = (y - exact).square().mean().sqrt()
    assert difference < (1e-5 if dtype == torch.float32 else 4e-3) * exact.square().mean().sqrt()


@pytest.mark.parametrize("tokens", [1, 9, 16, 17, 33, 64])
@pytest.mark.parametrize(("columns", "out"), [(132, 8), (1000, 1001), (2304, 264), (4864, 896), (8960, 1536)])
@pytest.mark.parametrize("sparse", [True, False])
def test_parts_of_k(tokens: int, columns: int, out: int, sparse: bool) -> None:
    """The number of parts is chosen or given, and may exceed the number of steps. The workspace is poisoned too."""
    needs("sparse_gemm")
    x8, scale, codes, mask, row_scale, bias = case(tokens, columns, out, sparse)
    gemm, packed = sk.ternary_gemm, sk.pack_dense(codes)
    if sparse:
        gemm, packed = sk.sparse_gemm, sk.pack_sparse24(codes, mask)
    for splits in (0, 2, 3, 5, 16):
        for b, dtype in ((None, torch.bfloat16), (bias, torch.bfloat16), (bias, torch.float32), (None, torch.float16)):
            poison(splits * -(-out // 128) * 128, 64, torch.float32)
            poison(tokens, out, dtype)
            y = gemm(x8, scale, packed, row_scale, out, b, dtype, splits=splits)
            assert torch.equal(y, reference(x8, scale, codes, row_scale, b, dtype)), (splits, b is not None, dtype)


@pytest.mark.parametrize(("tokens", "parts", "tile"), [(65, 5, 64), (200, 8, 128), (512, 2, 128), (130, 1, 64)])
@pytest.mark.parametrize("sparse", [True, False])
def test_sums_of_a_prompt_in_parts(tokens: int, parts: int, tile: int, sparse: bool) -> None:
    """The parts add up to the exact product, and the norm that adds them has the bits of the norm of the product."""
    needs("sparse_gemm")
    columns, out = 2304, 264
    x8, scale, codes, mask, row_scale, _ = case(tokens, columns, out, sparse)
    packed = sk.pack_sparse24(codes, mask) if sparse else sk.pack_dense(codes)
    for _ in range(5):  # a race shows rarely
        poison(parts * 3 * 128, out, torch.float32)
        sums = gemm_sums(x8, packed, out, sparse, parts, tile)
        exact = (x8.double() @ codes.double().T).int()
        assert torch.equal(sums.sum(0, dtype=torch.int32)[:tokens], exact)
    x, weight = torch.randn(tokens, out, device="cuda").bfloat16(), torch.rand(out, device="cuda")
    product = reference(x8, scale, codes, row_scale, None, torch.bfloat16)
    ours = norm_quantize_sums(x, sums, scale, row_scale, weight, 1e-6)
    for got, wanted in zip(ours, norm_quantize(x, product, weight, 1e-6), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("sparse", [True, False])
def test_parts_of_k_in_repeated_launches_and_in_a_graph(sparse: bool) -> None:
    """A race shows rarely, hence many launches. A graph replays both kernels on new tokens."""
    needs("sparse_gemm")
    layout = "sparse24" if sparse else "dense"
    columns, out = 8960, 1536
    x8, scale, codes, mask, row_scale, _ = case(64, columns, out, sparse)
    packed = sk.pack_sparse24(codes, mask) if sparse else sk.pack_dense(codes)
    for tokens in (16, 64):
        few, s = x8[:tokens].clone(), scale[:tokens].clone()
        expected = reference(few, s, codes, row_scale, None, torch.bfloat16)
        for _ in range(50):
            poison(tokens, out, torch.bfloat16)
            assert torch.equal(sk.decode_gemm(few, s, packed, row_scale, out, layout=layout), expected), tokens
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = sk.decode_gemm(few, s, packed, row_scale, out, layout=layout)
        for _ in range(3):
            few.copy_(torch.randint_like(few, -128, 128))
            graph.replay()
            assert torch.equal(y, reference(few, s, codes, row_scale, None, torch.bfloat16)), tokens


def test_parts_of_k_are_for_few_tokens() -> None:
    needs("sparse_gemm")
    x8, scale, codes, _, row_scale, _ = case(65, 256, 64, False)
    packed = sk.pack_dense(codes)
    with pytest.raises(ValueError, match="at most 64 tokens"):
        sk.ternary_gemm(x8, scale, packed, row_scale, 64, splits=2)
    with pytest.raises(ValueError, match="token_tile"):
        sk.ternary_gemm(x8[:9], scale[:9], packed, row_scale, 64, token_tile=16, splits=2)


@pytest.mark.parametrize("shape", [(1, 64, 72), (300, 1000, 1001)], ids=str)
def test_int8_gemm(shape: tuple[int, int, int]) -> None:
    needs("int8_gemm")
    x8, scale, codes, _, row_scale, bias = case(*shape, False)
    for dtype in (torch.bfloat16, torch.float32):
        poison(shape[0], shape[2], dtype)
        y = sk.int8_gemm(x8, scale, codes, row_scale, bias, dtype)
        assert torch.equal(y, reference(x8, scale, codes, row_scale, bias, dtype))


@pytest.mark.parametrize("tokens", [1, 100, 256])
def test_cusparselt(tokens: int) -> None:
    needs("cusparselt")
    x8, scale, codes, _, row_scale, bias = case(tokens, 512, 256, True)
    compressed = sk.compress24(codes)
    for dtype in (torch.bfloat16, torch.float32):
        y = sk.cusparselt_gemm(x8, scale, compressed, row_scale, bias, dtype)
        assert torch.equal(y, reference(x8, scale, codes, row_scale, bias, dtype))
    assert sk.check_cusparselt(codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (3, 1), (5, 896), (1000, 14336), (3, 20000), (0, 64), (4097, 130)], ids=str)
def test_quantize(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(shape, device="cuda") * 10 ** torch.empty(shape[0], 1, device="cuda").uniform_(-6, 3)).to(dtype)
    ours, expected = sk.quantize_tokens(x), quantize_tokens_reference(x)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    q, scale = sk.quantize_tokens(x, 4)
    torch.testing.assert_close(scale, quantize_tokens_reference(x, 4)[1], rtol=1e-5, atol=0)
    assert torch.equal(q, (x.float() / scale[:, None]).round().clamp(-8, 7).to(torch.int8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (3, 1), (5, 4864), (300, 11008), (3, 20000), (0, 64)], ids=str)
def test_swiglu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tokens, features = shape
    x = torch.randn(tokens, 2 * features, device="cuda").to(dtype)
    d = torch.randn(tokens, features, device="cuda").to(dtype)
    product = swiglu_reference(x)
    q, scale = sk.swiglu_quantize(x)
    torch.testing.assert_close(scale, quantize_tokens_reference(product)[1], rtol=1e-5, atol=0)
    error = (q * scale[:, None] - product).abs()
    assert (error <= 0.501 * scale[:, None] + 1e-4 * product.abs()).all()
    torch.testing.assert_close(sk.swiglu_backward(d, x), swiglu_backward_reference(d, x), rtol=2e-2, atol=1e-4)


def test_swiglu_of_gates_that_are_large_denormal_or_not_finite() -> None:
    inf, nan = float("inf"), float("nan")
    gates = [inf, -inf, nan, 3e38, 100.0, 20.0, 0.0, -0.0, 1e-40, -1e-40, -20.0, -86.0, -87.5, -100.0, -3e38]
    x = torch.tensor([[gate, up] for gate in gates for up in (1.0, 1e4)], device="cuda")
    wanted = quantize_tokens_reference(swiglu_reference(x))[1]
    torch.testing.assert_close(sk.swiglu_quantize(x)[1], wanted, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("out", "columns", "n", "m", "layout"),
    [
        (520, 4096, 2, 4, "sparse24"),
        (136, 896, 6, 8, "dense"),
        (70, 70, 3, 7, "dense"),
        (130, 992, 20, 32, "dense"),
        (10, 64, 2, 4, "sparse24"),  # a part with one row, because Triton turns an argument of 1 into a constant
    ],
)
def test_prepare(dtype: torch.dtype, out: int, columns: int, n: int, m: int, layout: str) -> None:
    torch.manual_seed(0)
    w = torch.randn(out, columns, device="cuda")
    w = torch.where(torch.rand_like(w) < 0.3, (2 * w).round() / 2, w).to(dtype)
    splits = (out - 9, 9)
    mask = mask_reference(w, n, m)
    first = sk.prepare_weight(w, n, m, splits, layout=layout, want_stats=True)
    torch.testing.assert_close(first.gamma, gamma_reference(w, mask, splits), rtol=1e-5, atol=0)
    codes = codes_reference(w, first.row_scale, mask)
    assert torch.equal(first.codes, codes)
    assert torch.equal(first.packed, sk.pack_sparse24(codes, mask) if layout == "sparse24" else sk.pack_dense(codes))
    assert first.stats[3] == mask.sum()
    again = sk.prepare_weight(
        w, n, m, splits, mask_bits=first.mask_bits, old_mask_bits=first.mask_bits, layout=layout, want_stats=True
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "a given mask, and run to run"
    nonzero = sk.prepare_weight(w, n, m, splits, gamma_over="nonzero", layout=layout, want_mask=False)
    assert torch.equal(nonzero.codes, codes)
    assert torch.equal(nonzero.packed, first.packed)
    torch.testing.assert_close(nonzero.gamma, gamma_reference(w, mask, splits, "nonzero"), rtol=1e-5, atol=0)
    assert torch.equal(nonzero.row_scale, nonzero.gamma.repeat_interleave(torch.tensor(splits, device="cuda")))


def layer(x: torch.Tensor, packed: torch.Tensor, row_scale: torch.Tensor, out: int) -> torch.Tensor:
    q, scale = sk.quantize_tokens(x)
    return sk.sparse_gemm(q, scale, packed, row_scale, out) * 2


def test_cuda_graph_and_compile() -> None:
    """A graph captured once and replayed on new data equals eager, and so does a function compiled without a break."""
    needs("sparse_gemm")
    p = sk.prepare_weight(torch.randn(264, 1000, device="cuda"), 2, 4, layout="sparse24")
    x = torch.randn(100, 1000, device="cuda", dtype=torch.bfloat16)
    layer(x, p.packed, p.row_scale, 264)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x, p.packed, p.row_scale, 264)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(captured, layer(x, p.packed, p.row_scale, 264))
    compiled = torch.compile(layer, fullgraph=True)
    assert torch.equal(compiled(x, p.packed, p.row_scale, 264), layer(x, p.packed, p.row_scale, 264))


def test_foreign_tokens_and_scales_are_copied_where_they_must_be() -> None:
    """Rows that do not start on 16-byte boundaries are copied, and scales without room after their end."""
    needs("sparse_gemm")
    x8, scale, codes, mask, row_scale, _ = case(5, 1000, 9, True)
    expected = reference(x8, scale, codes, row_scale, None, torch.bfloat16)
    packed = sk.pack_sparse24(codes, mask)
    wide = torch.zeros(5, 1003, device="cuda", dtype=torch.int8)
    wide[:, 3:] = x8
    for tokens in (x8, wide[:, 3:]):
        assert torch.equal(sk.sparse_gemm(tokens, scale, packed, row_scale, 9), expected)
        assert torch.equal(sk.decode_gemm(tokens, scale, packed, row_scale, 9, layout="sparse24"), expected)


def test_no_launch_leaves_the_rounding_to_tritons_default(tmp_path: Path) -> None:
    """Triton 3.9 warns if a launch does not choose about fused multiply-add: 3.10 has another default."""
    code = """
import torch
import sbn_kernels as sk

x = torch.randn(40, 256, device="cuda", dtype=torch.bfloat16)
p = sk.prepare_weight(torch.randn(64, 256, device="cuda"), 2, 4, layout="dense", gamma_over="nonzero", want_stats=True)
sk.prepare_weight(torch.randn(64, 255, device="cuda"), 2, 5)
q, s = sk.quantize_tokens(x)
sk.quantize_tokens(torch.randn(2, 20000, device="cuda"), 4)
sk.swiglu_backward(x[:, :128], x)
sk.swiglu_quantize(x)
sk.int8_gemm(q, s, p.codes, p.row_scale)
sk.decode_gemm(q, s, p.packed, p.row_scale, 64)
sk.decode_gemm(q, s, p.packed, p.row_scale, 64, portable=True)
g = sk.quantize_gradient(torch.randn(40, 64, device="cuda"), p.row_scale, s, torch.tensor([1], device="cuda"))
sk.weight_gradient_gemm(g.channels, g.channel_scale, sk.transpose_tokens(q))
sk.pack_transposed(p.codes)
sk.dequantize_tokens(q, s)
"""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_DEFAULT_FP_FUSION", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert "FP_FUSION" not in done.stderr
