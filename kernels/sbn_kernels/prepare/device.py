"""Device code of weight preparation; ``triton.py`` says what it computes and in how many passes."""

from __future__ import annotations

import triton
import triton.language as tl

from sbn_kernels.common.maxima import larger

TILE_ROWS = 64
TILE_COLUMNS = 128
_LARGEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def row_sums_kernel(w_pointer, mask_pointer, row_scale_pointer, sum_pointer, count_pointer, columns, stride,
                    mask_stride, MASKED: tl.constexpr, NONZERO: tl.constexpr, COUNT: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    """Sum of |W| over a row, one row a program.

    MASKED: only weights that the mask keeps. NONZERO: only weights that do not round to zero. COUNT: also counts them.
    """
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    kept = tl.zeros([BLOCK], tl.int32)
    for start in range(0, columns, BLOCK):
        column = start + block
        w = tl.abs(tl.load(w_pointer + row * stride + column, mask=column < columns, other=0.0).to(tl.float32))
        counts = column < columns
        if MASKED:
            byte = tl.load(mask_pointer + row * mask_stride + column // 8, mask=column < columns, other=0).to(tl.int32)
            counts = counts & ((byte >> (column % 8)) & 1 != 0)
        if NONZERO:
            counts = counts & ((w > 0.5 * tl.load(row_scale_pointer + row)) | (w != w))
        total += tl.where(counts, w, 0.0)
        kept += counts.to(tl.int32)
    tl.store(sum_pointer + row, tl.sum(total, axis=0))
    if COUNT:
        tl.store(count_pointer + row, tl.sum(kept, axis=0))


@triton.jit
def gamma_kernel(sum_pointer, count_pointer, gamma_pointer, row_scale_pointer, part, first, rows, columns,
                 KEPT: tl.constexpr, GIVEN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """gamma of one part from its row sums, in float64, and a copy for each of its rows. One program.

    KEPT: divides by the number of weights that count, else by rows * columns. GIVEN: gamma is there already.
    """
    block = tl.arange(0, BLOCK)
    if GIVEN:
        gamma = tl.load(gamma_pointer + part)
    else:
        total = tl.zeros([BLOCK], tl.float64)
        kept = tl.zeros([BLOCK], tl.float64)
        for start in range(0, rows, BLOCK):
            row = start + block
            total += tl.load(sum_pointer + first + row, mask=row < rows, other=0.0).to(tl.float64)
            if KEPT:
                kept += tl.load(count_pointer + first + row, mask=row < rows, other=0).to(tl.float64)
        count = (tl.zeros([], tl.float64) + rows) * columns
        if KEPT:
            count = tl.maximum(tl.sum(kept, axis=0), 1.0)
        gamma = larger((tl.sum(total, axis=0) / count).to(tl.float32), 1e-5)
        tl.store(gamma_pointer + part, gamma)
    for start in range(0, rows, BLOCK):
        row = start + block
        tl.store(row_scale_pointer + first + row, tl.zeros([BLOCK], tl.float32) + gamma, mask=row < rows)


@triton.jit
def _top_n(magnitude, N: tl.constexpr, M: tl.constexpr):
    """Bool mask of the N largest of the last dimension (length M), the lower index first on a tie.

    ``magnitude`` holds the bits of |W| as int32, which order as the values do. The function takes the N largest one
    after the other, or drops the M - N smallest, whichever are fewer.
    """
    index = tl.arange(0, M)[None, None, :]
    if 2 * N <= M:
        for _ in tl.static_range(N):
            best = tl.max(magnitude, axis=2, keep_dims=True)
            chosen = tl.min(tl.where(magnitude == best, index, M), axis=2, keep_dims=True)
            magnitude = tl.where(index == chosen, -1, magnitude)
        return magnitude < 0
    else:
        for _ in tl.static_range(M - N):
            least = tl.min(magnitude, axis=2, keep_dims=True)
            dropped = tl.max(tl.where(magnitude == least, index, -1), axis=2, keep_dims=True)
            magnitude = tl.where(index == dropped, _LARGEST, magnitude)
        return magnitude != _LARGEST


@triton.jit
def _ranked(magnitude, keep, M: tl.constexpr):
    """Bool mask of the ``keep`` largest of the last dimension; ``keep`` may differ by row ([rows, 1, 1])."""
    index = tl.arange(0, M)[None, None, :]
    rank = tl.zeros_like(magnitude)
    for j in tl.static_range(M):
        other = tl.sum(tl.where(index == j, magnitude, 0), axis=2, keep_dims=True)
        ahead = (other > magnitude) | ((other == magnitude) & (j < index))
        rank += ahead.to(tl.int32)
    return rank < keep


@triton.jit
def mask_kernel(w_pointer, keep_pointer, bits_pointer, rows, columns, groups, stride, bits_stride,
                N: tl.constexpr, M: tl.constexpr, PADDED: tl.constexpr, KEEP: tl.constexpr,
                GROUPS: tl.constexpr):  # fmt: skip
    """Fresh mask bits for any M <= 32, 8 groups (whole bytes) at a time; GROUPS is a multiple of 8.

    A group of PADDED >= M lanes holds M weights, and lanes beyond M rank last. A sum over lanes puts bits into bytes.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    lane = tl.arange(0, PADDED)[None, None, :]
    column = group * M + lane
    inside = (lane < M) & (group < groups)
    w = tl.load(w_pointer + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    magnitude = tl.where(inside, w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, -1)
    keep = tl.full([1, 1, 1], N, tl.int32)
    if KEEP:
        keep = tl.load(keep_pointer + row + tl.zeros([1, 1, 1], tl.int32))
    kept = (_ranked(magnitude, keep, PADDED) & inside).to(tl.int32)
    # a group spans at most 5 bytes: byte j of the group is the sum of its lanes' bits there, added into memory
    first = tl.reshape(group * M // 8, [GROUPS])
    for j in tl.static_range(5):
        here = column // 8 == group * M // 8 + j
        byte = tl.reshape(tl.sum(tl.where(here, kept << (column % 8), 0), axis=2), [GROUPS])
        there = (byte != 0) & (first + j < bits_stride)
        word = (first + j) // 4
        shift = ((first + j) % 4) * 8
        tl.atomic_or(bits_pointer + row * (bits_stride // 4) + word, byte << shift, mask=there)


@triton.jit
def _quads(x, R: tl.constexpr, C: tl.constexpr):
    """[R, C] -> four [R, C / 4]: columns 0, 1, 2, 3 of every four. Free where one thread holds all four."""
    even, odd = tl.split(tl.reshape(x, [R, C // 4, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _unquad(x0, x1, x2, x3, R: tl.constexpr, C: tl.constexpr):
    """Inverse of _quads."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [R, C])


@triton.jit
def _ahead(a, b):
    """1 where ``a``, which has the lower index, ranks before ``b``."""
    return (a >= b).to(tl.int32)


@triton.jit
def _ranks4(a0, a1, a2, a3):
    """Rank (0 = largest) of each of four magnitudes among them."""
    g01, g02, g03 = _ahead(a0, a1), _ahead(a0, a2), _ahead(a0, a3)
    g12, g13, g23 = _ahead(a1, a2), _ahead(a1, a3), _ahead(a2, a3)
    return 3 - g01 - g02 - g03, 2 + g01 - g12 - g13, 1 + g02 + g12 - g23, g03 + g13 + g23


@triton.jit
def _first_four_of_eight(a, b0, b1, b2, b3):
    """The number of the later four magnitudes that rank before ``a``."""
    return 4 - _ahead(a, b0) - _ahead(a, b1) - _ahead(a, b2) - _ahead(a, b3)


@triton.jit
def _merge(low, high, R: tl.constexpr, G: tl.constexpr):
    return tl.reshape(tl.join(low, high), [R, G])


@triton.jit
def _keep_quads(m0, m1, m2, m3, N: tl.constexpr, M: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """Fresh top-N mask (0 or 1) of quads [R, G] for M = 2, 4 or 8, by comparisons within a thread and its neighbour."""
    if M == 2:
        g01, g23 = _ahead(m0, m1), _ahead(m2, m3)
        k0, k1, k2, k3 = g01, 1 - g01, g23, 1 - g23
    elif M == 4:
        r0, r1, r2, r3 = _ranks4(m0, m1, m2, m3)
        k0, k1, k2, k3 = (r0 < N).to(tl.int32), (r1 < N).to(tl.int32), (r2 < N).to(tl.int32), (r3 < N).to(tl.int32)
    else:
        a0, b0 = tl.split(tl.reshape(m0, [R, G // 2, 2]))
        a1, b1 = tl.split(tl.reshape(m1, [R, G // 2, 2]))
        a2, b2 = tl.split(tl.reshape(m2, [R, G // 2, 2]))
        a3, b3 = tl.split(tl.reshape(m3, [R, G // 2, 2]))
        r0, r1, r2, r3 = _ranks4(a0, a1, a2, a3)
        s0, s1, s2, s3 = _ranks4(b0, b1, b2, b3)
        r0 += _first_four_of_eight(a0, b0, b1, b2, b3)
        r1 += _first_four_of_eight(a1, b0, b1, b2, b3)
        r2 += _first_four_of_eight(a2, b0, b1, b2, b3)
        r3 += _first_four_of_eight(a3, b0, b1, b2, b3)
        s0 += _ahead(a0, b0) + _ahead(a1, b0) + _ahead(a2, b0) + _ahead(a3, b0)
        s1 += _ahead(a0, b1) + _ahead(a1, b1) + _ahead(a2, b1) + _ahead(a3, b1)
        s2 += _ahead(a0, b2) + _ahead(a1, b2) + _ahead(a2, b2) + _ahead(a3, b2)
        s3 += _ahead(a0, b3) + _ahead(a1, b3) + _ahead(a2, b3) + _ahead(a3, b3)
        k0 = _merge((r0 < N).to(tl.int32), (s0 < N).to(tl.int32), R, G)
        k1 = _merge((r1 < N).to(tl.int32), (s1 < N).to(tl.int32), R, G)
        k2 = _merge((r2 < N).to(tl.int32), (s2 < N).to(tl.int32), R, G)
        k3 = _merge((r3 < N).to(tl.int32), (s3 < N).to(tl.int32), R, G)
    return k0, k1, k2, k3


@triton.jit
def _load_nibbles(pointer, row, group, rows, columns, stride):
    """Mask bits of the quads [R, G] from packed bytes, 4 bits each; bits beyond the end are zero."""
    there = (row < rows)[:, None] & (group * 4 < columns)[None, :]
    where = pointer + row.to(tl.int64)[:, None] * stride + (group // 2)[None, :]
    return (tl.load(where, mask=there, other=0).to(tl.int32) >> (4 * (group % 2))[None, :]) & 15


@triton.jit
def _magnitude(w):
    """The bits of |W|, which order as the values do."""
    return w.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _natural(w, half):
    """The code of W before the mask: 0, 1, 2 for 0, +1, -1.

    round(W / gamma), halves to even, is non-zero exactly when |W| > gamma / 2: the quotient of the next float above
    gamma / 2 already rounds to more than 1/2.
    """
    return tl.where(tl.abs(w) > half, tl.where(w < 0, 2, 1), 0)


@triton.jit
def _signed(code):
    return tl.where(code == 2, -1, code).to(tl.int8)


@triton.jit
def _popcount4(nibble):
    pairs = nibble - ((nibble >> 1) & 5)
    return (pairs & 3) + (pairs >> 2)


@triton.jit
def _half_block(half, k_step, k_steps):
    """The first word of 64 rows of a k step. Words: (32 w + 4 g + t) * 4 + word, rows: 16 w + 8 r0 + g; see packing."""
    return (half // 2).to(tl.int64) * k_steps * 1024 + k_step * 1024 + (half % 2) * 512


@triton.jit
def _store_dense(packed_pointer, half, k_step, k_steps, quads, R: tl.constexpr):
    """Stores words of layout ``dense`` from the quads [R, 32] of one half and k step.

    A quad holds the codes 0, 1, 2 of 4 columns, 4 bits each.
    """
    w_ = tl.arange(0, 4)[:, None, None, None]
    g_ = tl.arange(0, 8)[None, :, None, None]
    j_ = tl.arange(0, 4)[None, None, :, None]
    t_ = tl.arange(0, 4)[None, None, None, :]
    # quads are [j, r1, t]; bits of the two r1, then of the two r0, come together
    words = tl.reshape(quads, [R * 4, 2, 4])
    words = tl.sum(words << (2 * tl.arange(0, 2)[None, :, None]), axis=1)
    words = tl.reshape(words, [4, 2, 8 * 4 * 4])
    words = tl.sum(words << (16 * tl.arange(0, 2)[None, :, None]), axis=1)
    words = tl.reshape(words, [4, 8, 4, 4])
    tl.store(packed_pointer + _half_block(half, k_step, k_steps) + (32 * w_ + 4 * g_ + t_) * 4 + j_, words)


@triton.jit
def _store_sparse24(packed_pointer, half, k_step, k_steps, kept, c0, c1, c2, c3, R: tl.constexpr, G: tl.constexpr):
    """Stores words of layout ``sparse24`` of one half and k step, from quads [R, G]: kept bits, and codes 0, 1, 2."""
    second = tl.where(kept & 8 != 0, 3, tl.where(kept & 4 != 0, 2, 1))
    first = tl.where(kept & 1 != 0, 0, tl.where(kept & 2 != 0, 1, 2))
    first = tl.minimum(first, second - 1)
    low = tl.where(first == 0, c0, tl.where(first == 1, c1, c2))
    high = tl.where(second == 1, c1, tl.where(second == 2, c2, c3))
    # quads are [jj, r1, t, b1]
    even, odd = tl.split(tl.reshape(low | (high << 4), [R, G // 2, 2]))
    pair = tl.reshape(even | (odd << 8), [R * 2, 2, 4])
    pair = tl.sum(pair << (2 * tl.arange(0, 2)[None, :, None]), axis=1)
    pair = tl.reshape(pair, [4, 2, 8 * 2 * 4])
    words = tl.sum(pair << (16 * tl.arange(0, 2)[None, :, None]), axis=1)
    words = tl.reshape(words, [4, 8, 2, 4])
    w_ = tl.arange(0, 4)[:, None, None, None]
    g_ = tl.arange(0, 8)[None, :, None, None]
    t_ = tl.arange(0, 4)[None, None, None, :]
    jj_ = tl.arange(0, 2)[None, None, :, None]
    base = packed_pointer + _half_block(half, k_step, k_steps)
    tl.store(base + (32 * w_ + 4 * g_ + t_) * 4 + 2 * jj_, words)
    # positions: [row, jj * 2 + half, 8 quads]
    nibble = tl.reshape(first | (second << 2), [R, 4, 8])
    metadata = tl.sum(nibble << (4 * tl.arange(0, 8)[None, None, :]), axis=2)
    r_ = tl.arange(0, R)[:, None]
    q_ = tl.arange(0, 4)[None, :]
    thread = 32 * (r_ // 16) + 4 * (r_ % 8) + 2 * (q_ % 2) + r_ // 8 % 2
    tl.store(base + thread * 4 + 2 * (q_ // 2) + 1, metadata)


@triton.jit
def prepare_kernel(
    w_pointer, row_scale_pointer, mask_pointer, old_pointer, keep_pointer, bits_pointer, codes_pointer,
    packed_pointer, stats_pointer, rows, columns, k_steps, stride, mask_stride, old_stride, bits_stride,
    N: tl.constexpr, M: tl.constexpr, GIVEN: tl.constexpr, KEEP: tl.constexpr, OLD: tl.constexpr,
    BITS: tl.constexpr, CODES: tl.constexpr, LAYOUT: tl.constexpr, STATS: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One tile of 64 rows and 128 columns: mask, ternary codes, packed words, statistics.

    After the load, everything works on quads: four tensors [R, C / 4], one for each column of every four.
    """
    G: tl.constexpr = C // 4
    half = tl.program_id(0)
    k_step = tl.program_id(1)
    row = half * R + tl.arange(0, R)
    column = k_step * C + tl.arange(0, C)
    group = k_step * G + tl.arange(0, G)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    w = tl.load(w_pointer + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    half_gamma = 0.5 * tl.load(row_scale_pointer + row, mask=row < rows, other=1.0)[:, None]
    w0, w1, w2, w3 = _quads(w, R, C)
    # kept bits are cleared for columns beyond in_features and rows beyond out_features
    tail = tl.minimum(tl.maximum(columns - group * 4, 0), 4)
    valid = tl.where((row < rows)[:, None], ((1 << tail) - 1)[None, :], 0)
    if GIVEN:
        kept = _load_nibbles(mask_pointer, row, group, rows, columns, mask_stride)
    elif N == M and not KEEP:
        kept = tl.full([R, G], 15, tl.int32)
    elif M <= 8 and not KEEP:
        k0, k1, k2, k3 = _keep_quads(_magnitude(w0), _magnitude(w1), _magnitude(w2), _magnitude(w3), N, M, R, G)
        kept = k0 | (k1 << 1) | (k2 << 2) | (k3 << 3)
    else:
        magnitude = tl.reshape(_magnitude(w), [R, C // M, M])
        if KEEP:
            keep = tl.load(keep_pointer + row, mask=row < rows, other=M)[:, None, None]
            chosen = _ranked(magnitude, keep, M)
        else:
            chosen = _top_n(magnitude, N, M)
        k0, k1, k2, k3 = _quads(tl.reshape(chosen.to(tl.int32), [R, C]), R, C)
        kept = k0 | (k1 << 1) | (k2 << 2) | (k3 << 3)
    kept = kept & valid
    n0, n1 = _natural(w0, half_gamma), _natural(w1, half_gamma)
    n2, n3 = _natural(w2, half_gamma), _natural(w3, half_gamma)
    c0 = n0 * (kept & 1)
    c1 = n1 * (kept >> 1 & 1)
    c2 = n2 * (kept >> 2 & 1)
    c3 = n3 * (kept >> 3 & 1)
    if BITS:
        low, high = tl.split(tl.reshape(kept, [R, G // 2, 2]))
        byte = k_step * (C // 8) + tl.arange(0, C // 8)
        there = (row < rows)[:, None] & (byte * 8 < columns)[None, :]
        where = row.to(tl.int64)[:, None] * bits_stride + byte[None, :]
        tl.store(bits_pointer + where, (low | (high << 4)).to(tl.uint8), mask=there)
    if CODES:
        where = row.to(tl.int64)[:, None] * columns + column[None, :]
        codes = _unquad(_signed(c0), _signed(c1), _signed(c2), _signed(c3), R, C)
        tl.store(codes_pointer + where, codes, mask=inside)
    if STATS:
        nonzero = (n0 != 0).to(tl.int32) | (n1 != 0).to(tl.int32) << 1 | (n2 != 0).to(tl.int32) << 2
        nonzero = (nonzero | (n3 != 0).to(tl.int32) << 3) & valid
        if OLD:
            old = _load_nibbles(old_pointer, row, group, rows, columns, old_stride) & valid
            tl.atomic_add(stats_pointer, tl.sum(_popcount4(old ^ kept)).to(tl.int64))
        tl.atomic_add(stats_pointer + 1, tl.sum(_popcount4(valid & ~nonzero)).to(tl.int64))
        tl.atomic_add(stats_pointer + 2, tl.sum(_popcount4(nonzero & ~kept)).to(tl.int64))
        tl.atomic_add(stats_pointer + 3, tl.sum(_popcount4(kept)).to(tl.int64))
    if LAYOUT == 1:
        _store_dense(packed_pointer, half, k_step, k_steps, c0 | (c1 << 4) | (c2 << 8) | (c3 << 12), R)
    elif LAYOUT == 2:
        _store_sparse24(packed_pointer, half, k_step, k_steps, kept, c0, c1, c2, c3, R, G)


@triton.jit
def pack_transposed_kernel(codes_pointer, packed_pointer, rows, columns, k_steps, stride):
    """One half and k step of layout ``dense`` of the codes transposed: 64 columns and 128 rows of ``codes``."""
    half = tl.program_id(0)
    k_step = tl.program_id(1)
    column = half * 64 + tl.arange(0, 64)
    quads = tl.zeros([32, 64], tl.int32)
    for j in tl.static_range(4):
        row = k_step * 128 + 4 * tl.arange(0, 32) + j
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        where = codes_pointer + row.to(tl.int64)[:, None] * stride + column[None, :]
        code = tl.load(where, mask=inside, other=0).to(tl.int32)
        quads |= tl.where(code < 0, 2, code) << (4 * j)
    _store_dense(packed_pointer, half, k_step, k_steps, tl.trans(quads), 64)
