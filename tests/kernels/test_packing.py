"""The packed forms in plain PyTorch: round trips, filler positions, and arguments that ops refuse."""

import pytest
import sbn_kernels as sk
import torch
from sbn_kernels.common.packing import positions24


@pytest.mark.parametrize(("out", "columns"), [(1, 4), (200, 328), (128, 128), (129, 132)])
def test_round_trip(out: int, columns: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(-1, 2, (out, columns), dtype=torch.int8)
    packed = sk.pack_dense(codes)
    assert packed.shape == sk.packed_shape(out, columns)
    assert torch.equal(sk.unpack(packed, out, columns, "dense"), codes)
    mask = (torch.rand(out, columns // 4, 4).argsort(-1) < 2).flatten(-2)
    for kept in (mask, mask & (torch.rand(out, columns) < 0.5)):
        packed = sk.pack_sparse24(codes * kept, kept)
        assert packed.numel() * 32 == 2 * packed.shape[0] * 128 * packed.shape[1] * 128
        assert torch.equal(sk.unpack(packed, out, columns, "sparse24"), codes * kept)


def test_positions_of_every_mask() -> None:
    """For all masks with at most two of four, the positions include the kept ones, the first before the second."""
    for bits in range(16):
        mask = torch.tensor([bits >> i & 1 for i in range(4)], dtype=torch.bool)
        if mask.sum() > 2:
            with pytest.raises(ValueError, match="at most 2"):
                positions24(mask)
            continue
        first, second = (int(p) for p in positions24(mask))
        assert 0 <= first < second <= 3
        assert set(mask.nonzero().flatten().tolist()) <= {first, second}


def test_refusals_name_the_argument() -> None:
    w = torch.randn(8, 8)
    with pytest.raises(ValueError, match="multiple of M=3"):
        sk.prepare_weight(w, 2, 3)
    with pytest.raises(ValueError, match="layout dense"):
        sk.prepare_weight(w, 6, 8, layout="sparse24")
    with pytest.raises(ValueError, match="split_sizes"):
        sk.prepare_weight(w, 2, 4, (3, 3))
    with pytest.raises(ValueError, match="mask_bits"):
        sk.prepare_weight(w, 2, 4, mask_bits=torch.zeros(8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="features > 0"):
        sk.quantize_tokens(torch.randn(3))
    x8, scale = torch.zeros(2, 8, dtype=torch.int8), torch.ones(2)
    packed = sk.pack_dense(torch.zeros(8, 8, dtype=torch.int8))
    with pytest.raises(ValueError, match="row_scale"):
        sk.sparse_gemm(x8, scale, packed, torch.ones(9), 8)
    with pytest.raises(ValueError, match="packed weight"):
        sk.ternary_gemm(x8, scale, packed[:, :, :512], torch.ones(8), 8)
    with pytest.raises(ValueError, match="at most 64 tokens"):
        sk.decode_gemm(torch.zeros(65, 8, dtype=torch.int8), torch.ones(65), packed, torch.ones(8), 8)


def test_a_gradient_is_not_lost_without_a_word() -> None:
    leaf = torch.randn(8, 8, requires_grad=True)
    x8, packed = torch.zeros(2, 8, dtype=torch.int8), sk.pack_dense(torch.zeros(8, 8, dtype=torch.int8))
    with pytest.raises(ValueError, match="no gradient"):
        sk.quantize_tokens(leaf)
    with pytest.raises(ValueError, match="no gradient"):
        sk.swiglu_quantize(leaf)
    with pytest.raises(ValueError, match="no gradient"):
        sk.prepare_weight(leaf, 2, 4)
    with pytest.raises(ValueError, match="no gradient"):
        sk.ternary_gemm(x8, torch.ones(2), packed, torch.ones(8), 8, bias=leaf[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU lacks")
def test_without_a_gpu_the_reason_is_given() -> None:
    capabilities = sk.capabilities()
    assert not capabilities.can("sparse_gemm")
    assert "no CUDA GPU" in str(capabilities)
    with pytest.raises(sk.UnsupportedError, match="no CUDA GPU"):
        sk.quantize_tokens(torch.randn(2, 8))
    with pytest.raises(ValueError, match="unknown op"):
        capabilities.can("magic")


def test_fake_kernels_give_the_shapes_of_the_real_ones() -> None:
    """torch.compile sees the shapes, dtypes and strides of the fake kernels."""
    with torch._subclasses.FakeTensorMode():
        q, scale = sk.quantize_tokens(torch.empty(5, 70, dtype=torch.bfloat16))
        assert (q.shape, q.stride(), q.dtype, scale.shape) == ((5, 70), (80, 1), torch.int8, (5,))
        p = sk.prepare_weight(torch.empty(40, 72), 2, 4, (30, 10), layout="sparse24")
        assert [tuple(t.shape) for t in p] == [(2,), (40,), (40, 9), (40, 72), (1, 1, 1024), (4,)]
        x8 = torch.empty(5, 72, dtype=torch.int8)
        y = sk.sparse_gemm(x8, scale, p.packed, p.row_scale, 40, out_dtype=torch.float32)
        assert (y.shape, y.dtype) == ((5, 40), torch.float32)
        assert sk.int8_gemm(x8, scale, p.codes, p.row_scale).shape == (5, 40)
        ops = torch.ops.sbn_kernels
        named = {"out_dtype": torch.float16, "sparse": True, "out_features": 40, "packed": p.packed, "scale": scale}
        y = ops.hopper_gemm(x8, splits=0, token_tile=0, bias=None, row_scale=p.row_scale, **named)
        assert (y.shape, y.dtype) == ((5, 40), torch.float16)
        y = ops.hopper_gemm_sums(x8, p.packed, 40, True, 1, 64)
        assert (y.shape, y.dtype) == ((1, 64, 40), torch.int32)
        assert ops.dequantize_tokens(x8, scale, torch.float16).dtype == torch.float16
        assert ops.add_weight_gradient(torch.empty(5, 40), x8, scale, p.codes, False, [1, 2]) is None
