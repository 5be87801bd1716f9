"""Plain Triton kernels equal their plain-PyTorch twins in the interpreter: odd shapes, ties, extremes, poison."""

import pytest
import sbn_kernels as sk
import torch
from sbn_kernels.decode import int8_rows
from sbn_kernels.decode.reference import int8_rows_reference
from sbn_kernels.gemm.cusparselt import scale_accumulator
from sbn_kernels.gemm.reference import gemm_reference
from sbn_kernels.prepare.device import TILE_ROWS
from sbn_kernels.prepare.reference import codes_reference, gamma_reference, mask_bits_reference, mask_reference
from sbn_kernels.quantize.reference import quantize_tokens_reference
from sbn_kernels.swiglu.reference import swiglu_backward_reference, swiglu_quantize_reference

pytestmark = pytest.mark.usefixtures("poisoned_buffers")


def with_ties(out: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal weights, a third of them rounded to halves, so that groups hold equal magnitudes."""
    weight = torch.randn(out, columns)
    return torch.where(torch.rand(out, columns) < 0.3, (2 * weight).round() / 2, weight).to(dtype)


def within_one_rounding(ours: torch.Tensor, exact: torch.Tensor) -> bool:
    """Compare up to one step of bfloat16, because the interpreter rounds differently from the hardware."""
    step = exact.abs().float() * 2.0**-7 + 1e-30
    return bool(((ours.float() - exact.float()).abs() <= step).all())


@pytest.mark.parametrize(
    ("dtype", "tokens", "features"),
    [
        (torch.float32, 1, 7),
        (torch.bfloat16, 5, 896),
        (torch.float16, 2, 17000),
        (torch.bfloat16, 0, 64),
        (torch.float32, 17, 130),
    ],
)
@pytest.mark.parametrize("bits", [8, 4])
def test_quantize(dtype: torch.dtype, tokens: int, features: int, bits: int) -> None:
    x = 3 * torch.randn(tokens, features).to(dtype)
    if tokens > 1:
        x[1] = 0
    q, scale = sk.quantize_tokens(x, bits)
    twin_q, twin_scale = quantize_tokens_reference(x, bits)
    assert q.stride(0) % 16 == 0
    if bits == 8:
        assert torch.equal(scale, twin_scale)
        assert torch.equal(q, twin_q)
    else:  # the scale is a mean; sums in another order differ in the last bits
        torch.testing.assert_close(scale, twin_scale, rtol=1e-6, atol=0)
        assert torch.equal(q, (x.float() / scale[:, None]).round().clamp(-8, 7).to(torch.int8))


# The weights whose mean is gamma, and whether a mask is given.
GAMMAS = (("dense", False), ("dense", True), ("kept", False), ("masked", True), ("nonzero", False), ("nonzero", True))


@pytest.mark.parametrize(
    ("dtype", "out", "columns", "n", "m", "splits", "layout"),
    [
        (torch.float32, 70, 96, 2, 4, None, "sparse24"),
        (torch.bfloat16, 12, 136, 6, 8, (4, 6, 2), "dense"),
        (torch.float32, 5, 70, 3, 7, (2, 3), "dense"),
        (torch.bfloat16, 9, 64, 16, 32, None, "dense"),
        (torch.float32, 9, 64, 5, 16, None, "none"),
        (torch.bfloat16, 3, 33, 3, 3, None, "dense"),
        (torch.float32, 6, 128, 1, 2, None, "dense"),
        (torch.float32, 6, 40, 1, 4, None, "sparse24"),
    ],
)
def test_prepare(
    dtype: torch.dtype, out: int, columns: int, n: int, m: int, splits: tuple[int, ...] | None, layout: str
) -> None:
    weight = with_ties(out, columns, dtype)
    fresh = mask_reference(weight, n, m)
    old = torch.rand(out, columns) < 0.5
    # Only the last pass has several rows a program. The other passes start one program a row, which is slow here.
    for over, given in GAMMAS if out <= TILE_ROWS else GAMMAS[:2]:
        mask = fresh & (torch.rand(out, columns) < 0.8) if given else fresh
        prepared = sk.prepare_weight(
            weight, n, m, splits,
            mask_bits=mask_bits_reference(mask) if given else None, old_mask_bits=mask_bits_reference(old),
            layout=layout, gamma_over=over, want_stats=True,
        )  # fmt: skip
        torch.testing.assert_close(prepared.gamma, gamma_reference(weight, mask, splits, over), rtol=1e-6, atol=0)
        assert torch.equal(prepared.row_scale, prepared.gamma.repeat_interleave(torch.tensor(splits or [out])))
        assert torch.equal(prepared.mask_bits, mask_bits_reference(mask))
        threshold = prepared.row_scale
        if over == "nonzero":  # codes depend on the dense gamma, whose last bit comes from the kernel's own sums
            threshold = sk.prepare_weight(weight, n, m, splits).row_scale
        codes = codes_reference(weight, threshold, mask)
        assert torch.equal(prepared.codes, codes)
        without = sk.prepare_weight(
            weight,
            n,
            m,
            splits,
            mask_bits=mask_bits_reference(mask) if given else None,
            gamma_over=over,
            want_mask=False,
        )
        assert torch.equal(without.codes, codes)
        assert torch.equal(without.gamma, prepared.gamma)
        natural = codes_reference(weight, threshold)
        counts = [(old ^ mask).sum(), (natural == 0).sum(), ((natural != 0) & ~mask).sum(), mask.sum()]
        assert prepared.stats.tolist() == [int(count) for count in counts]
        if layout == "dense":
            assert torch.equal(prepared.packed, sk.pack_dense(codes))
        elif layout == "sparse24":
            assert torch.equal(prepared.packed, sk.pack_sparse24(codes, mask))


@pytest.mark.parametrize(("n", "m"), [(6, 8), (2, 6)])
def test_prepare_with_a_number_kept_for_each_row(n: int, m: int) -> None:
    weight = with_ties(37, 48, torch.float32)
    keep = torch.randint(0, m + 1, (37,), dtype=torch.int32)
    prepared = sk.prepare_weight(weight, n, m, keep=keep, layout="dense")
    mask = mask_reference(weight, n, m, keep)
    codes = codes_reference(weight, prepared.row_scale, mask)
    assert torch.equal(prepared.mask_bits, mask_bits_reference(mask))
    assert torch.equal(prepared.codes, codes)
    assert torch.equal(prepared.packed, sk.pack_dense(codes))


def test_prepare_at_the_rounding_edge() -> None:
    """With IEEE division |W| = gamma / 2 rounds to 0 (half to even), and the next larger float rounds to 1."""
    gamma = torch.tensor([0.7, 1.3e-5, 3.0])
    half = (gamma / 2).repeat_interleave(4)
    above = torch.nextafter(half, torch.tensor(torch.inf))
    weight = torch.stack([half, above, -half, -above], 1).reshape(12, 4)
    prepared = sk.prepare_weight(weight, 4, 4, (4, 4, 4), gamma=gamma)
    assert torch.equal(prepared.codes, codes_reference(weight, prepared.row_scale))
    assert prepared.codes.unique().tolist() == [-1, 0, 1]


def test_prepare_all_zero_weight() -> None:
    prepared = sk.prepare_weight(torch.zeros(3, 8), 2, 4, layout="sparse24")
    assert prepared.gamma.item() == pytest.approx(1e-5)
    assert torch.equal(prepared.mask_bits, torch.full((3, 1), 0b00110011, dtype=torch.uint8))
    assert not prepared.codes.any()


def gemm_case(tokens: int, columns: int, out: int) -> tuple[torch.Tensor, ...]:
    x8 = torch.randint(-128, 128, (tokens, columns), dtype=torch.int8)
    x8[:, ::5] = -128
    codes = torch.randint(-1, 2, (out, columns), dtype=torch.int8)
    scale, row_scale, bias = torch.rand(tokens) + 0.1, torch.rand(out) + 0.1, torch.randn(out)
    return x8, scale, codes, row_scale, bias, gemm_reference(x8, scale, codes, row_scale)


@pytest.mark.parametrize(("tokens", "columns", "out"), [(1, 64, 70), (33, 130, 129), (0, 32, 16), (70, 96, 40)])
def test_int8_gemm(tokens: int, columns: int, out: int) -> None:
    x8, scale, codes, row_scale, bias, exact = gemm_case(tokens, columns, out)
    assert torch.equal(sk.int8_gemm(x8, scale, codes, row_scale, out_dtype=torch.float32), exact)
    assert torch.equal(sk.int8_gemm(x8, scale, codes, row_scale, bias, torch.float32), exact + bias)
    assert within_one_rounding(sk.int8_gemm(x8, scale, codes, row_scale, bias), exact + bias)


@pytest.mark.parametrize(("tokens", "columns", "out"), [(1, 64, 70), (7, 300, 129), (33, 128, 64), (0, 32, 16)])
def test_portable_decode(tokens: int, columns: int, out: int) -> None:
    x8, scale, codes, row_scale, bias, exact = gemm_case(tokens, columns, out)
    y = sk.decode_gemm(x8, scale, sk.pack_dense(codes), row_scale, out, bias, torch.float32)
    assert torch.equal(y, exact + bias)


@pytest.mark.parametrize(("tokens", "columns", "out"), [(1, 64, 70), (7, 300, 129), (33, 128, 64), (0, 32, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter's dot does not know bfloat16
def test_8_bit_head(tokens: int, columns: int, out: int, dtype: torch.dtype) -> None:
    x = torch.randn(2 * tokens, columns).to(dtype)[::2]
    codes = torch.randint(-127, 128, (out, columns), dtype=torch.int8)
    scale = torch.rand(2 * out)[::2]
    y = int8_rows(x, codes, scale)
    assert y.dtype == dtype
    twin = int8_rows_reference(x, codes, scale).float()
    assert y.shape == twin.shape
    # Sums are in another order.
    assert (y.float() - twin).norm() <= (1e-6 if dtype == torch.float32 else 1e-3) * twin.norm()


def test_scaling_of_an_int32_product() -> None:
    x8, scale, codes, row_scale, bias, exact = gemm_case(5, 64, 70)
    acc = torch.zeros(16, 70, dtype=torch.int32)
    acc[:5] = x8.int() @ codes.int().t()
    assert torch.equal(scale_accumulator(acc, scale, row_scale, bias, 5, torch.float32), exact + bias)


def test_vectors_may_have_any_strides() -> None:
    x8, scale, codes, _, bias, _ = gemm_case(5, 64, 70)
    gamma = torch.rand(1)
    row_scale, tokens, twice = gamma.expand(70), torch.stack([scale, -scale], 1)[:, 0], torch.stack([bias, -bias], 1)
    exact = gemm_reference(x8, scale, codes, row_scale, bias)
    assert torch.equal(sk.int8_gemm(x8, tokens, codes, row_scale, twice[:, 0], torch.float32), exact)
    packed = sk.pack_dense(codes)
    assert torch.equal(sk.decode_gemm(x8, tokens, packed, row_scale, 70, twice[:, 0], torch.float32), exact)
    acc = x8.int() @ codes.int().t()
    assert torch.equal(scale_accumulator(acc, tokens, row_scale, twice[:, 0], 5, torch.float32), exact)
    weight, keep = with_ties(9, 16, torch.float32), torch.tensor([3], dtype=torch.int32).expand(9)
    assert torch.equal(sk.prepare_weight(weight, 2, 4, keep=keep).codes, sk.prepare_weight(weight, 3, 4).codes)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("features", [40, 20000])
def test_nan_in_a_token_comes_through(bits: int, features: int) -> None:
    """A NaN scale makes all outputs of its token NaN. Outputs of other tokens do not change."""
    x = torch.randn(3, features)
    clean = sk.quantize_tokens(x, bits)
    x[1, 3] = torch.nan
    q, scale = sk.quantize_tokens(x, bits)
    assert scale.isnan().tolist() == [False, True, False]
    assert torch.equal(q[::2], clean[0][::2])
    gate_up = torch.cat([x, torch.ones_like(x)], 1)
    assert sk.swiglu_quantize(gate_up, bits)[1].isnan().tolist() == [False, True, False]
    assert sk.swiglu_quantize(gate_up.roll(features, 1), bits)[1].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("over", ["dense", "kept", "masked", "nonzero"])
def test_nan_in_a_weight_comes_through(over: str) -> None:
    weight = torch.randn(6, 16)
    weight[2, 5] = torch.nan
    mask = torch.ones(6, 16, dtype=torch.bool)
    mask[:, ::4] = False
    prepared = sk.prepare_weight(weight, 2, 4, (2, 4), mask_bits=mask_bits_reference(mask), gamma_over=over)  # type: ignore[arg-type]
    assert prepared.gamma.isnan().tolist() == [False, True]


def test_layout_sparse24_has_no_portable_decode() -> None:
    x8, scale, codes, row_scale, _, _ = gemm_case(1, 64, 70)
    with pytest.raises(sk.UnsupportedError, match="sparse24"):
        sk.decode_gemm(x8, scale, sk.pack_dense(codes), row_scale, 70, layout="sparse24")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "features"), [(1, 1), (5, 176), (3, 2500), (0, 8)])
@pytest.mark.parametrize("bits", [8, 4])
def test_swiglu(dtype: torch.dtype, tokens: int, features: int, bits: int) -> None:
    x = (3 * torch.randn(tokens, 2 * features)).to(dtype)
    d = torch.randn(tokens, features).to(dtype)
    q, scale = sk.swiglu_quantize(x, bits)
    twin_q, twin_scale = swiglu_quantize_reference(x, bits)
    torch.testing.assert_close(scale, twin_scale, rtol=1e-5, atol=0)
    assert (q.int() - twin_q.int()).abs().amax() <= 1 if tokens else q.shape == (0, features)
    assert (q != twin_q).float().sum() <= 0.002 * q.numel() + 1  # exp may differ in the last bit
    assert q.stride(0) % 16 == 0
    expected = swiglu_backward_reference(d, x)
    dx = sk.swiglu_backward(d, x)
    assert dx.dtype == dtype
    torch.testing.assert_close(dx, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


def test_swiglu_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="2 features"):
        sk.swiglu_quantize(torch.randn(2, 7))
    with pytest.raises(ValueError, match="8 or 4 bits"):
        sk.swiglu_quantize(torch.randn(2, 8), 2)
    with pytest.raises(ValueError, match="gradient must be"):
        sk.swiglu_backward(torch.randn(2, 8), torch.randn(2, 8))
