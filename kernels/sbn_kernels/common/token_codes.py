"""Device code that turns float32 values in registers into int8 codes: shared by every kernel that quantises tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from sbn_kernels.common.maxima import larger, magnitude

_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds |v| < 2^22 to an integer, half to even


@triton.jit
def token_codes(x, scale, inverse, BITS: tl.constexpr, FUSED: tl.constexpr):
    """clamp(round(x / scale)) as int8. Clamping first gives the same and keeps the rounding trick in range."""
    high: tl.constexpr = 127.0 if BITS == 8 else 7.0
    if FUSED:
        q = x * inverse
        q = tl.fma(tl.fma(-q, scale, x), inverse, q)
    else:
        q = tl.div_rn(x, scale)
    q = tl.minimum(tl.maximum(q, -high - 1.0), high)
    # The integer is the lowest byte of the sum. A conversion takes the unit of exponentials, which is slow.
    return (q + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def store_codes(
    q_row, x, scale, inverse, features,
    BITS: tl.constexpr, START: tl.constexpr, BLOCK: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Stores the codes of BLOCK columns of a row, from START on."""
    column = START + tl.arange(0, BLOCK)
    tl.store(q_row + column, token_codes(x, scale, inverse, BITS, FUSED), mask=column < features)


@triton.jit
def token_scale(reduced, columns, BITS: tl.constexpr):
    """The scale from max|x| (8 bits) or from sum|x| (4 bits)."""
    if BITS == 8:
        return tl.div_rn(larger(reduced, 1e-5), tl.full(reduced.shape, 127.0, tl.float32))
    mean = tl.div_rn(reduced, tl.zeros_like(reduced) + columns)
    return tl.div_rn(larger(mean, 1e-5), tl.full(reduced.shape, 2.6457513110645907, tl.float32))


@triton.jit
def largest(x, axis: tl.constexpr, keep_dims: tl.constexpr):
    """max|x|, or NaN if there is one."""
    bits = tl.max(magnitude(x), axis=axis, keep_dims=keep_dims)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def reduced_row(x, BITS: tl.constexpr):
    """The number that :func:`token_scale` takes, for a row or a part of a row: max|x| for 8 bits, sum|x| for 4."""
    return largest(x, 0, True) if BITS == 8 else tl.sum(tl.abs(x), axis=0, keep_dims=True)
