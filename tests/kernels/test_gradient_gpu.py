"""Backward kernels on a GPU equal their twins bit for bit, and products equal float64; outputs are poisoned."""

import os

import pytest
import sbn_kernels as sk
import torch
from sbn_kernels.gradients.reference import dequantize_reference, input_gradient_reference, weight_gradient_reference
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="needs a CUDA GPU"
)
SHAPES = [(1, 1, 1), (1, 132, 8), (5, 7, 9), (33, 64, 129), (130, 1000, 1001), (257, 896, 1216), (1000, 136, 2048)]
TUNED = [(0, 8, 16), (5, 7, 9), (257, 896, 1216)]  # where the plain Triton product runs too: it tunes itself for each
LAUNCHES = [(9999, 1), (0, 1), (0, 2), (0, 5), (3, 2), (7, 4)]  # tiles done whole, parts of each other tile
DTYPES = [torch.bfloat16, torch.float32, torch.float16]


def seed(value: int = 1234567890123) -> Tensor:
    return torch.tensor([value], device="cuda")


def gradient(tokens: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return dy with magnitudes over seven decades, gamma of each channel, and the scale of each token."""
    torch.manual_seed(tokens + channels)
    size = 10 ** torch.empty(tokens, 1, device="cuda").uniform_(-6, 1)
    dy = (torch.randn(tokens, channels, device="cuda") * size).to(dtype)
    return dy, torch.rand(channels, device="cuda") + 0.01, torch.rand(tokens, device="cuda") + 0.01


def int8(rows: int, columns: int) -> Tensor:
    return torch.randint(-128, 128, (rows, columns), device="cuda", dtype=torch.int8)


def poison(rows: int, columns: int, dtype: torch.dtype = torch.int8) -> None:
    """Fill the memory that the next output of this shape will use."""
    torch.full((rows, -(-columns // 16) * 16), 77, device="cuda", dtype=dtype)


@pytest.mark.parametrize("shape", [(tokens, out) for tokens, _, out in SHAPES] + [(0, 64), (4099, 520)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_gradient(shape: tuple[int, int], dtype: torch.dtype) -> None:
    dy, gamma, scale = gradient(*shape, dtype)
    if shape[0] > 2:
        dy[1] = 0
    if shape[1] > 2:
        dy[:, 2] = 0
    twin = sk.quantize_gradient_reference(dy, gamma, scale, seed(), 3)
    poison(*shape)
    poison(shape[1], shape[0])
    both = sk.quantize_gradient(dy, gamma, scale, seed(), 3)
    for name, ours, expected in zip(both._fields, both, twin, strict=True):
        assert torch.equal(ours, expected), name
    assert shape[0] == 0 or both.tokens.stride(0) % 16 == both.channels.stride(0) % 16 == 0
    tokens = sk.quantize_gradient(dy, gamma, scale, seed(), 3, want_channels=False)
    channels = sk.quantize_gradient(dy, gamma, scale, seed(), 3, want_tokens=False)
    assert torch.equal(tokens.tokens, both.tokens)
    assert torch.equal(tokens.token_scale, both.token_scale)
    assert torch.equal(channels.channels, both.channels)
    assert torch.equal(channels.channel_scale, both.channel_scale)
    assert tokens.channels.numel() == channels.tokens.numel() == 0


def test_strided_and_seen_from_far() -> None:
    """The input has columns that are not contiguous, rows with a stride, or addresses beyond 2^31 elements."""
    dy, gamma, scale = gradient(40, 30, torch.bfloat16)
    expected = sk.quantize_gradient(dy, gamma, scale, seed())
    wide = torch.empty(40, 60_000_000, dtype=torch.bfloat16, device="cuda")[:, :30]
    for view in (dy.t().contiguous().t(), torch.cat([dy, dy], 1)[:, :30], wide.copy_(dy)):
        ours = sk.quantize_gradient(view, gamma, scale, seed())
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradients_stay_visible(value: float) -> None:
    dy, gamma, scale = gradient(70, 40, torch.bfloat16)
    clean = sk.quantize_gradient(dy, gamma, scale, seed())
    dy[13, 5] = value
    q = sk.quantize_gradient(dy, gamma, scale, seed())
    assert (~q.token_scale.isfinite()).nonzero().tolist() == [[13]]
    assert (~q.channel_scale.isfinite()).nonzero().tolist() == [[5]]
    keep = torch.arange(70, device="cuda") != 13
    assert torch.equal(q.tokens[keep], clean.tokens[keep])
    x8 = int8(70, 24)
    dw = sk.weight_gradient_gemm(q.channels, q.channel_scale, sk.transpose_tokens(x8))
    assert (~dw.isfinite()).any(1).nonzero().tolist() == [[5]]
    assert not dw[5].isfinite().any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_input_gradient(shape: tuple[int, int, int]) -> None:
    tokens, columns, out = shape
    torch.manual_seed(1)
    a8, scale = int8(tokens, out), torch.rand(tokens, device="cuda") + 0.1
    codes = torch.randint(-1, 2, (out, columns), device="cuda", dtype=torch.int8)
    packed = sk.pack_transposed(codes)
    assert torch.equal(packed, sk.pack_dense(codes.t()))
    for dtype in DTYPES:
        exact = input_gradient_reference(a8, scale, codes, dtype)
        weights = [packed] if sk.capabilities().can("ternary_gemm") else []
        if dtype == torch.float32 and shape in TUNED:
            weights.append(codes.t().contiguous())
        for weight in weights:
            poison(tokens, columns, dtype)
            assert torch.equal(sk.input_gradient_gemm(a8, scale, weight, columns, dtype), exact)


@pytest.mark.parametrize("shape", [*SHAPES, (0, 8, 16), (5000, 520, 300), (1030, 2056, 4104)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_gradient(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, columns, out = shape
    torch.manual_seed(1)
    x8, b8, scale = int8(tokens, columns), int8(tokens, out).clamp(min=-127), torch.rand(out, device="cuda") + 0.1
    b8t, x8t = sk.transpose_tokens(b8), sk.transpose_tokens(x8)
    assert torch.equal(b8t, b8.t())
    assert torch.equal(x8t, x8.t())
    exact = weight_gradient_reference(b8.t(), scale, x8, dtype)
    if dtype == torch.float32 and shape in TUNED:
        assert torch.equal(sk.weight_gradient_gemm(b8t, scale, x8t, dtype, portable=True), exact)
    if not sk.capabilities().can("ternary_gemm"):
        return
    for launch in (None, *((tile, whole, parts) for tile in (256, 128) for whole, parts in LAUNCHES)):
        torch.full((out, columns), float("nan"), device="cuda", dtype=dtype)
        assert torch.equal(sk.weight_gradient_gemm(b8t, scale, x8t, dtype, launch=launch), exact), launch
        if dtype == torch.float32:
            before = torch.randn(out, columns, device="cuda") * exact.abs().amax().clamp(min=1)
            total = before.clone()
            assert sk.weight_gradient_gemm(b8t, scale, x8t, into=total, launch=launch) is total
            assert torch.equal(total, before + exact), launch


def test_weight_gradient_again_and_again() -> None:
    """There are more tiles than multiprocessors, so rings and phases wrap. A race shows rarely, hence 20 launches."""
    if not sk.capabilities().can("ternary_gemm"):
        pytest.skip("Hopper only")
    torch.manual_seed(0)
    b8t, x8t = int8(4096, 1500).clamp(min=-127), int8(3000, 1500)
    scale = torch.rand(4096, device="cuda")
    exact = weight_gradient_reference(b8t, scale, x8t.t(), torch.float32)
    for launch in (None, (256, 9999, 1), (128, 9999, 1), (256, 0, 3), (256, 264, 2)):
        for _ in range(20):
            torch.full((4096, 3000), float("nan"), device="cuda")
            assert torch.equal(sk.weight_gradient_gemm(b8t, scale, x8t, launch=launch), exact), launch


def test_weight_gradient_beyond_int32() -> None:
    """All factors have their largest value, and there are more tokens than an int32 sum can hold."""
    tokens = 150_000
    b8t = torch.full((24, tokens), -127, device="cuda", dtype=torch.int8)
    x8t = torch.full((40, tokens), -128, device="cuda", dtype=torch.int8)
    scale = torch.ones(24, device="cuda")
    for portable in (True, None):
        dw = sk.weight_gradient_gemm(b8t, scale, x8t, portable=portable)
        torch.testing.assert_close(dw, torch.full_like(dw, 127.0 * 128 * tokens), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (1000, 896), (0, 64), (4099, 1030)], ids=str)
def test_transpose_and_dequantize(shape: tuple[int, int]) -> None:
    x8, scale = int8(*shape), torch.rand(shape[0], device="cuda")
    poison(shape[1], shape[0])
    out = sk.transpose_tokens(x8)
    assert torch.equal(out, x8.t())
    assert shape[0] == 0 or out.stride(0) % 16 == 0
    for dtype in DTYPES:
        assert torch.equal(sk.dequantize_tokens(x8, scale, dtype), dequantize_reference(x8, scale, dtype))


def backward(dy: Tensor, gamma: Tensor, scale: Tensor, seed: Tensor, packed: Tensor, x8: Tensor) -> list[Tensor]:
    q = sk.quantize_gradient(dy, gamma, scale, seed, 7)
    dx = sk.input_gradient_gemm(q.tokens, q.token_scale, packed, x8.shape[1])
    return [dx, sk.weight_gradient_gemm(q.channels, q.channel_scale, sk.transpose_tokens(x8))]


def test_cuda_graph_and_compile() -> None:
    """A replayed graph and a compiled function equal eager, with new seeds and data. Other seeds differ."""
    if not sk.capabilities().can("ternary_gemm"):
        pytest.skip("Hopper only")
    dy, gamma, scale = gradient(100, 264, torch.bfloat16)
    x8, where = int8(100, 520), seed(0)
    packed = sk.pack_transposed(torch.randint(-1, 2, (264, 520), device="cuda", dtype=torch.int8))
    args = (dy, gamma, scale, where, packed, x8)
    backward(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backward(*args)
    compiled = torch.compile(backward, fullgraph=True)
    seen = []
    for step in range(3):
        where.fill_(step)
        dy.copy_(torch.randn_like(dy))
        graph.replay()
        eager = backward(*args)
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(compiled(*args), eager, strict=True))
        where.fill_(step + 1000)
        seen.append(any(not torch.equal(a, b) for a, b in zip(backward(*args), eager, strict=True)))
    assert all(seen)
