"""Device code of the backward's quantisation: maxima, scales, stochastic rounding in both orders.

``reference.py`` has the formulas, ``triton.py`` the launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sbn_kernels.common.maxima import larger, magnitude
from sbn_kernels.gradients.reference import LEVELS, ROUNDS, SMALLEST

_MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2^23: added to |v| < 2^22, it leaves round(v) in the low bits of the sum
# PTX: bits 16 to 23 of four words become the bytes of one word, bit 7 of each byte flipped
_PACK = tl.constexpr(
    "{ .reg .b32 t, u; prmt.b32 t, $1, $2, 0x0062; prmt.b32 u, $3, $4, 0x0062; prmt.b32 t, t, u, 0x5410; "
    "xor.b32 $0, t, 0x80808080; }"
)
_LEVELS = tl.constexpr(float(LEVELS))
_STEPS = tl.constexpr(LEVELS / 2**15)
_SMALLEST = tl.constexpr(SMALLEST)
_ROUNDS = tl.constexpr(ROUNDS)


# Not specialised: numbers that vary from call to call and that no vector of loads depends on.
@triton.jit(do_not_specialize=["rows", "span"])
def gradient_maxima_kernel(
    dy_pointer, row_scale_pointer, token_scale_pointer, max_pointer, rows, columns, dy_stride, first_channel, span,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The largest |dy * row_scale| of each token and |dy * token_scale| of each channel.

    A program takes C columns of ``span`` rows. ``max`` starts as zeros; it holds the tokens, and from ``first_channel``
    on the channels. A maximum does not depend on the order of its operands, so atomics keep the result fixed.
    """
    column = tl.program_id(0) * C + tl.arange(0, C)
    first = tl.program_id(1) * span
    largest = tl.zeros([R, C], tl.float32)
    if TOKENS:
        row_scale = tl.load(row_scale_pointer + column, mask=column < columns, other=0.0)
    for start in range(first, tl.minimum(first + span, rows), R):
        row = start + tl.arange(0, R)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        where = dy_pointer + row.to(tl.int64)[:, None] * dy_stride + column[None, :]
        dy = tl.load(where, mask=inside, other=0.0).to(tl.float32)
        if CHANNELS:
            token_scale = tl.load(token_scale_pointer + row, mask=row < rows, other=0.0)
            largest = larger(largest, tl.abs(dy * token_scale[:, None]))
        if TOKENS:
            # reduced as floats within a thread, where |.| is part of the instruction and costs nothing
            eights = tl.reshape(tl.abs(dy * row_scale[None, :]), [R, C // 8, 8])
            of_token = tl.max(magnitude(tl.reduce(eights, 2, larger)), axis=1)
            tl.atomic_max(max_pointer + row, of_token, mask=row < rows, sem="relaxed")
    if CHANNELS:
        where = max_pointer + first_channel + column
        of_channel = tl.max(magnitude(largest), axis=0)
        tl.atomic_max(where, of_channel, mask=column < columns, sem="relaxed")


@triton.jit(do_not_specialize=["tokens", "channels"])
def gradient_scales_kernel(
    max_pointer, token_scale_pointer, channel_scale_pointer, tokens, channels, first_channel, BLOCK: tl.constexpr
):  # fmt: skip
    """Scales from the bits of maxima; the bits of 2^15 / scale replace the maxima."""
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
def _multiply_wide(value, FACTOR: tl.constexpr, PTX: tl.constexpr):
    """The upper and the lower 32 bits of a product of uint32. PTX: one instruction, where the compiler makes two."""
    factor = tl.full([1, 1], FACTOR, tl.uint32)
    if PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$1, $0}, p; }",
            "=r,=r,r,r", [value, factor], dtype=(tl.uint32, tl.uint32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.umulhi(value, factor), tl.mul(value, factor, sanitize_overflow=False)


@triton.jit
def philox(seed, c0, c1, c2, ROUNDS: tl.constexpr, PTX: tl.constexpr):
    """Four uint32 of Philox-4x32, as ``tl.philox(seed, c0, c1, c2, 0, ROUNDS)`` has them."""
    key = seed.to(tl.uint64, bitcast=True)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    c0, c1 = c0.to(tl.uint32), c1.to(tl.uint32)
    c2, c3 = tl.zeros([1, 1], tl.uint32) + c2.to(tl.uint32), tl.zeros([1, 1], tl.uint32)
    for _ in tl.static_range(ROUNDS):
        high_a, low_a = _multiply_wide(c0, 0xD2511F53, PTX)
        high_b, low_b = _multiply_wide(c2, 0xCD9E8D57, PTX)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def rounded(value, draw):
    """2 * (round(value) + draw / 2), uint32; ``value`` is in 2^-15 of a step and is rounded half to even.

    Bits 16 to 23 of the result are the code, with bit 7 of the code flipped, because the lowest bit of the magic number
    is bit 22 before the doubling. The lowest bit of ``draw`` may be anything: nothing below it can carry.
    """
    return (value + _MAGIC).to(tl.uint32, bitcast=True) * 2 + draw


@triton.jit
def codes_of(rounded, PTX: tl.constexpr):
    """The codes as int8. PTX: three byte permutations for four codes, where the compiler shifts each by itself."""
    if PTX:
        return tl.inline_asm_elementwise(
            _PACK, "=r,r,r,r,r", [rounded], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return ((rounded >> 16) ^ 0x80).to(tl.int8)


@triton.jit
def word_of(r0, r1, r2, r3, PTX: tl.constexpr):
    """The codes of four tokens in one word, the first token in the lowest byte."""
    if PTX:
        return tl.inline_asm_elementwise(
            _PACK, "=r,r,r,r,r", [r0, r1, r2, r3], dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low = ((r0 >> 16) & 0xFF) | ((r1 >> 8) & 0xFF00)
        return (low | (r2 & 0xFF0000) | ((r3 << 8) & 0xFF000000)) ^ 0x80808080


@triton.jit(do_not_specialize=["rows", "stream"])
def quantize_gradient_kernel(
    dy_pointer, row_scale_pointer, token_scale_pointer, inverse_pointer, seed_pointer, a_pointer, b_pointer,
    rows, columns, dy_stride, a_stride, b_stride, first_channel, stream,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Rounds one tile of 8 R tokens and C channels twice: ``a`` [tokens, channels] int8, and ``b`` transposed.

    The tile is eight tensors [R, C], one for each token of every eight. One call of the generator serves eight tokens
    of a channel, and eight codes of ``b`` become one word of 64 bits before they are transposed. Everything is read
    before anything is written: the compiler moves no load above a store, so reading and writing in turn would wait for
    memory eight times.
    """
    tiles = tl.cdiv(columns, C)
    octet = tl.program_id(0) // tiles * R + tl.arange(0, R)
    column = tl.program_id(0) % tiles * C + tl.arange(0, C)
    there = column < columns
    gradients = ()
    inverses = ()
    token_scales = ()
    for j in tl.static_range(8):
        row = octet * 8 + j
        inside = (row < rows)[:, None] & there[None, :]
        where = dy_pointer + row.to(tl.int64)[:, None] * dy_stride + column[None, :]
        gradients += (tl.load(where, mask=inside, other=0.0),)
        if TOKENS:
            inverse = tl.load(inverse_pointer + row, mask=row < rows, other=0)
            inverses += (inverse.to(tl.float32, bitcast=True)[:, None],)
        if CHANNELS:
            token_scales += (tl.load(token_scale_pointer + row, mask=row < rows, other=0.0)[:, None],)
    if TOKENS:
        row_scale = tl.load(row_scale_pointer + column, mask=there, other=0.0)[None, :]
    if CHANNELS:
        channel_inverse = tl.load(inverse_pointer + first_channel + column, mask=there, other=0)
        channel_inverse = channel_inverse.to(tl.float32, bitcast=True)[None, :]
    random = philox(tl.load(seed_pointer), column[None, :], octet[:, None], stream, _ROUNDS, PTX)
    for_channels = ()
    for j in tl.static_range(8):
        row = octet * 8 + j
        dy = gradients[j].to(tl.float32)
        draw = random[j // 2] >> 16 if j % 2 else (random[j // 2] << 1) & 0xFFFF
        if TOKENS:
            a = codes_of(rounded(dy * row_scale * inverses[j], draw), PTX)
            where = a_pointer + row.to(tl.int64)[:, None] * a_stride + column[None, :]
            tl.store(where, a, mask=(row < rows)[:, None] & there[None, :])
        if CHANNELS:
            for_channels += (rounded(dy * token_scales[j] * channel_inverse, draw),)
    if CHANNELS:
        b_words = b_pointer.to(tl.pointer_type(tl.uint64), bitcast=True)
        where = b_words + column.to(tl.int64)[:, None] * (b_stride // 8) + octet[None, :]
        low = word_of(for_channels[0], for_channels[1], for_channels[2], for_channels[3], PTX)
        high = word_of(for_channels[4], for_channels[5], for_channels[6], for_channels[7], PTX)
        words = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
        tl.store(where, tl.trans(words), mask=there[:, None] & (octet * 8 < rows)[None, :])
