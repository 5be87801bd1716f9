"""Backward kernels equal their twins in the interpreter: odd shapes, strides, zero tokens, poison, NaN."""

import pytest
import sbn_kernels as sk
import torch
from sbn_kernels.gradients.reference import dequantize_reference, input_gradient_reference, weight_gradient_reference
from sbn_kernels.gradients.weight_gradient import add_parts
from torch import Tensor

pytestmark = pytest.mark.usefixtures("poisoned_buffers")


def int8(rows: int, columns: int) -> Tensor:
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8)


def gradient(tokens: int, channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    dy = torch.randn(tokens, channels) * 10 ** torch.empty(tokens, 1).uniform_(-6, 1)
    return dy.to(dtype), torch.rand(channels) + 0.01, torch.rand(tokens) + 0.01


KEY = -4611686018427375559  # Its two halves differ, and both have bits that are set.


@pytest.mark.parametrize(
    ("dtype", "tokens", "channels", "key"),
    [
        (torch.float32, 1, 1, 0),
        (torch.bfloat16, 5, 7, 0),
        (torch.bfloat16, 5, 7, KEY),
        (torch.float32, 0, 20, KEY),
        (torch.float16, 130, 70, KEY),  # A program rounds 128 tokens and 64 channels.
        (torch.bfloat16, 9, 260, 0),  # A program finds the maxima of 8 tokens and 256 channels.
        (torch.float32, 16, 64, KEY),  # Whole blocks of channels need no mask.
    ],
)
def test_quantize_gradient(dtype: torch.dtype, tokens: int, channels: int, key: int) -> None:
    dy, gamma, scale = gradient(tokens, channels, dtype)
    if tokens > 1:
        dy[1], dy[:, 2] = 0, 0
    seed = torch.tensor(key)
    twin = sk.quantize_gradient_reference(dy, gamma, scale, seed, 3)
    both = sk.quantize_gradient(dy, gamma, scale, seed, 3)
    for name, ours, expected in zip(both._fields, both, twin, strict=True):
        assert torch.equal(ours, expected), name
    assert tokens == 0 or both.tokens.stride(0) % 16 == both.channels.stride(0) % 16 == 0
    one = sk.quantize_gradient(dy, gamma, scale, seed, 3, want_channels=False)
    other = sk.quantize_gradient(dy.t().contiguous().t(), gamma, scale, seed, 3, want_tokens=False)
    assert one.channels.numel() == one.channel_scale.numel() == other.tokens.numel() == other.token_scale.numel() == 0
    assert torch.equal(one.tokens, both.tokens)
    assert torch.equal(one.token_scale, both.token_scale)
    assert torch.equal(other.channels, both.channels)
    assert torch.equal(other.channel_scale, both.channel_scale)


@pytest.mark.parametrize("key", [0, KEY])
def test_another_stream_and_another_seed_round_in_another_way(key: int) -> None:
    dy, gamma, scale = gradient(5, 7)
    seed = torch.tensor(key)
    one = sk.quantize_gradient(dy, gamma, scale, seed, 3)
    assert not torch.equal(sk.quantize_gradient(dy, gamma, scale, seed, 4).tokens, one.tokens)
    assert not torch.equal(sk.quantize_gradient(dy, gamma, scale, seed + 1, 3).channels, one.channels)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_non_finite_gradients_stay_visible(value: float) -> None:
    dy, gamma, scale = gradient(20, 30)
    seed = torch.tensor([5])
    clean = sk.quantize_gradient(dy, gamma, scale, seed)
    dy[13, 5] = value
    q = sk.quantize_gradient(dy, gamma, scale, seed)
    twin = sk.quantize_gradient_reference(dy, gamma, scale, seed)
    for both in (q, twin):
        assert (~both.token_scale.isfinite()).nonzero().tolist() == [[13]]
        assert (~both.channel_scale.isfinite()).nonzero().tolist() == [[5]]
        assert torch.equal(both.tokens[:13], clean.tokens[:13])
        assert torch.equal(both.tokens[14:], clean.tokens[14:])
    codes = torch.randint(-1, 2, (30, 8), dtype=torch.int8)
    dx = sk.input_gradient_gemm(q.tokens, q.token_scale, codes.t().contiguous(), 8, torch.float32)
    dw = sk.weight_gradient_gemm(q.channels, q.channel_scale, sk.transpose_tokens(int8(20, 8)))
    assert not dx[13].isfinite().any()
    assert not dw[5].isfinite().any()
    assert dx.isfinite().sum() == 19 * 8
    assert dw.isfinite().sum() == 29 * 8


@pytest.mark.parametrize(("tokens", "columns", "out"), [(1, 1, 1), (5, 70, 9), (131, 40, 66), (0, 8, 16)])
def test_products(tokens: int, columns: int, out: int) -> None:
    """dX and dW equal their twins."""
    a8, x8, b8 = int8(tokens, out), int8(tokens, columns), int8(tokens, out).clamp(min=-127)
    codes = torch.randint(-1, 2, (out, columns), dtype=torch.int8)
    token_scale, channel_scale = torch.rand(tokens) + 0.1, torch.rand(out) + 0.1
    dx = sk.input_gradient_gemm(a8, token_scale, codes.t().contiguous(), columns, torch.float32)
    assert torch.equal(dx, input_gradient_reference(a8, token_scale, codes, torch.float32))
    dw = sk.weight_gradient_gemm(sk.transpose_tokens(b8), channel_scale, sk.transpose_tokens(x8))
    assert torch.equal(dw, weight_gradient_reference(b8.t(), channel_scale, x8, torch.float32))
    before = torch.randn(out, columns)
    total, version = before.clone(), before._version
    sk.weight_gradient_gemm(sk.transpose_tokens(b8), channel_scale, sk.transpose_tokens(x8), into=total)
    assert torch.equal(total, before + dw)
    assert total._version > version


def test_ones_for_dx() -> None:
    """With int8 codes, given ones change nothing. With packed words, which need no ones, they are refused."""
    a8, token_scale = int8(5, 9), torch.rand(5)
    codes, ones = torch.randint(-1, 2, (70, 9), dtype=torch.int8), torch.ones(70)
    given = sk.input_gradient_gemm(a8, token_scale, codes, 70, torch.float32, unit_scale=ones)
    assert torch.equal(given, sk.input_gradient_gemm(a8, token_scale, codes, 70, torch.float32))
    with pytest.raises(ValueError, match="packed words need none"):
        sk.input_gradient_gemm(a8, token_scale, sk.pack_dense(codes), 70, unit_scale=ones)


@pytest.mark.parametrize(("group", "whole"), [(1, 0), (2, 4), (4, 5), (16, 3)])
def test_adding_parts_of_split_sums(group: int, whole: int) -> None:
    """Tiles from ``whole`` on are written, in the order of bands of ``group`` row tiles. Others are not touched."""
    rows, columns = 3 * 128 + 5, 256 + 21
    order = [(r, c) for first in range(0, 4, group) for c in range(2) for r in range(first, min(4, first + group))]
    parts = torch.randint(-(2**29), 2**29, (3, 8 - whole, 128, 256), dtype=torch.int32)
    scale, y = torch.rand(rows), torch.full((4 * 128, 512), 7.0)
    expected = y.clone()
    for other, (r, c) in enumerate(order[whole:]):
        expected[128 * r : 128 * (r + 1), 256 * c : 256 * (c + 1)] = parts[:, other].sum(0).float()
    expected = torch.where(expected == 7.0, expected, expected * torch.cat([scale, scale])[:512, None])
    ours = y[:rows, :columns].contiguous()
    add_parts(parts, scale, ours, whole, group)
    assert torch.equal(ours, expected[:rows, :columns])
    before = torch.randn(rows, columns)
    total = before.clone()
    add_parts(parts, scale, total, whole, group, add=True)
    assert torch.equal(total, torch.where(ours == 7.0, before, before + ours))


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (300, 130), (0, 16)])
def test_transpose_and_dequantize(shape: tuple[int, int]) -> None:
    x8, scale = int8(*shape), torch.rand(shape[0])
    out = sk.transpose_tokens(x8)
    assert torch.equal(out, x8.t())
    assert shape[0] == 0 or out.stride(0) % 16 == 0
    assert torch.equal(sk.transpose_tokens(out.t()), x8.t())
    assert torch.equal(sk.dequantize_tokens(x8, scale, torch.float32), dequantize_reference(x8, scale, torch.float32))


@pytest.mark.parametrize("shape", [(1, 1), (70, 33), (130, 300)])
def test_pack_transposed(shape: tuple[int, int]) -> None:
    codes = torch.randint(-1, 2, shape, dtype=torch.int8)
    assert torch.equal(sk.pack_transposed(codes), sk.pack_dense(codes.t()))
    wide = torch.cat([codes, codes], 1)[:, : shape[1]]
    assert torch.equal(sk.pack_transposed(wide), sk.pack_dense(codes.t()))
