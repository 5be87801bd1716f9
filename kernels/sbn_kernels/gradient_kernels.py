"""Device code of the backward's quantisation: maxima, scales, stochastic rounding in both orders. See ``gradients``."""

from __future__ import annotations

import triton
import triton.language as tl

LEVELS = 127 * 2**15 - 2
SMALLEST = 1e-30
ROUNDS = 7
_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: added to |v| < 2^22, the sum's low bits are round(v)
_MAGIC_BITS = tl.constexpr(0x4B400000)
_LEVELS = tl.constexpr(float(LEVELS))
_STEPS = tl.constexpr(LEVELS / 2**15)
_SMALLEST = tl.constexpr(SMALLEST)
_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def _magnitude(value):
    """Bits of |value|: they order as the magnitudes do, infinity above all of them and NaN above infinity."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


# numbers that vary from call to call and that no vector of loads depends on are not specialised on
@triton.jit(do_not_specialize=["rows", "span"])
def gradient_maxima_kernel(
    dy_pointer, row_scale_pointer, token_scale_pointer, max_pointer, rows, columns, dy_stride, first_channel, span,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Largest |dy * row_scale| of each token, |dy * token_scale| of each channel: C columns of ``span`` rows a program.

    ``max`` starts as zeros: tokens, then from ``first_channel`` on channels. A maximum does not depend on the order of
    its operands.
    """
    column = tl.program_id(0) * C + tl.arange(0, C)
    first = tl.program_id(1) * span
    largest = tl.zeros([R, C], tl.int32)
    if TOKENS:
        row_scale = tl.load(row_scale_pointer + column, mask=column < columns, other=0.0)
    for start in range(first, tl.minimum(first + span, rows), R):
        row = start + tl.arange(0, R)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        where = dy_pointer + row.to(tl.int64)[:, None] * dy_stride + column[None, :]
        dy = tl.load(where, mask=inside, other=0.0).to(tl.float32)
        if TOKENS:
            of_token = tl.max(_magnitude(dy * row_scale[None, :]), axis=1)
            tl.atomic_max(max_pointer + row, of_token, mask=row < rows, sem="relaxed")
        if CHANNELS:
            token_scale = tl.load(token_scale_pointer + row, mask=row < rows, other=0.0)
            largest = tl.maximum(largest, _magnitude(dy * token_scale[:, None]))
    if CHANNELS:
        where = max_pointer + first_channel + column
        tl.atomic_max(where, tl.max(largest, axis=0), mask=column < columns, sem="relaxed")


@triton.jit(do_not_specialize=["tokens", "channels"])
def gradient_scales_kernel(
    max_pointer, token_scale_pointer, channel_scale_pointer, tokens, channels, first_channel, BLOCK: tl.constexpr
):  # fmt: skip
    """Scales from the bits of maxima; the bits of 2^15 / scale take the maxima's place."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(max_pointer + i, mask=i < first_channel + channels, other=0)
    largest = tl.maximum(bits, tl.full(bits.shape, _SMALLEST, tl.float32).to(tl.int32, bitcast=True))
    largest = largest.to(tl.float32, bitcast=True)
    scale = tl.div_rn(largest, tl.full(bits.shape, _STEPS, tl.float32))
    inverse = tl.div_rn(tl.full(bits.shape, _LEVELS, tl.float32), largest)
    tl.store(token_scale_pointer + i, scale, mask=i < tokens)
    channel = i - first_channel
    tl.store(channel_scale_pointer + channel, scale, mask=(channel >= 0) & (channel < channels))
    tl.store(max_pointer + i, inverse.to(tl.int32, bitcast=True), mask=i < first_channel + channels)


@triton.jit
def _add_draw(value, draw):
    """Value in 2^-15 of a step, rounded half to even, plus draw, as int32 with the bits of the magic number.

    Bits 15 to 22 are the code, bit 7 of it flipped: bit 22 is the magic number's lowest.
    """
    return (value + _MAGIC).to(tl.int32, bitcast=True) + draw.to(tl.int32, bitcast=True)


@triton.jit
def _byte(fixed, J: tl.constexpr):
    """Bits 15 to 22 moved to byte J."""
    if J == 3:
        return (fixed << 9) & -16777216
    elif J == 2:
        return (fixed << 1) & 0xFF0000
    else:
        return (fixed >> (15 - 8 * J)) & (255 << 8 * J)


@triton.jit(do_not_specialize=["rows", "stream"])
def quantize_gradient_kernel(
    dy_pointer, row_scale_pointer, token_scale_pointer, inverse_pointer, seed_pointer, a_pointer, b_pointer,
    rows, columns, dy_stride, a_stride, b_stride, first_channel, stream,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One tile of 8 R tokens and C channels, rounded twice: ``a`` [tokens, channels] int8, ``b`` transposed.

    Eight tensors [R, C], one for each token of every eight: a call of the generator serves eight tokens of a channel,
    and eight codes of ``b`` become one word of 64 bits before they are transposed.
    """
    tiles = tl.cdiv(columns, C)
    octet = tl.program_id(0) // tiles * R + tl.arange(0, R)
    column = tl.program_id(0) % tiles * C + tl.arange(0, C)
    there = column < columns
    row_scale = tl.load(row_scale_pointer + column, mask=there, other=0.0)[None, :]
    if CHANNELS:
        channel_inverse = tl.load(inverse_pointer + first_channel + column, mask=there, other=0)
        channel_inverse = channel_inverse.to(tl.float32, bitcast=True)[None, :]
        low = tl.zeros([R, C], tl.int32)
        high = tl.zeros([R, C], tl.int32)
    random = tl.philox(tl.load(seed_pointer), column[None, :], octet[:, None], stream, 0, _ROUNDS)
    for j in tl.static_range(8):
        row = octet * 8 + j
        inside = (row < rows)[:, None] & there[None, :]
        where = dy_pointer + row.to(tl.int64)[:, None] * dy_stride + column[None, :]
        dy = tl.load(where, mask=inside, other=0.0).to(tl.float32)
        draw = random[j // 2] >> 17 if j % 2 else random[j // 2] & 0x7FFF
        if TOKENS:
            inverse = tl.load(inverse_pointer + row, mask=row < rows, other=0).to(tl.float32, bitcast=True)[:, None]
            a = (_add_draw(dy * row_scale * inverse, draw) - _MAGIC_BITS) >> 15
            where = a_pointer + row.to(tl.int64)[:, None] * a_stride + column[None, :]
            tl.store(where, a.to(tl.int8), mask=inside)
        if CHANNELS:
            token_scale = tl.load(token_scale_pointer + row, mask=row < rows, other=0.0)[:, None]
            byte = _byte(_add_draw(dy * token_scale * channel_inverse, draw), j % 4)
            if j < 4:
                low |= byte
            else:
                high |= byte
    if CHANNELS:
        b_words = b_pointer.to(tl.pointer_type(tl.int64), bitcast=True)
        where = b_words + column.to(tl.int64)[:, None] * (b_stride // 8) + octet[None, :]
        low, high = low ^ -2139062144, high ^ -2139062144  # bit 7 of every byte
        words = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
        tl.store(where, tl.trans(words), mask=there[:, None] & (octet * 8 < rows)[None, :])
