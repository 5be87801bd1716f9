"""Device code of the exchange between ranks; ``triton.py`` says what it computes."""

from __future__ import annotations

import triton
import triton.language as tl

from sbn_kernels.common.maxima import larger
from sbn_kernels.prepare.device import (
    _keep_quads,
    _load_nibbles,
    _magnitude,
    _natural,
    _quads,
    _signed,
    _store_dense,
    _store_sparse24,
    _unquad,
)


@triton.jit
def gamma_of_parts_kernel(terms_pointer, counts_pointer, table_pointer, gamma_pointer, row_scale_pointer, stride,
                          BLOCK: tl.constexpr):  # fmt: skip
    """gamma of one part of one weight from the row sums of all ranks, and a copy for each row. One part a program.

    A row of the table is: where the sums of the weight begin in the buffer of a rank; where its counts begin, or -1;
    the rows of the weight that a rank sends; the first row of the part; the rows of the part; the weights in a row; and
    where the row scales of the weight begin. ``stride`` is the length of a rank's buffer.
    """
    part = tl.program_id(0)
    table = table_pointer + part * 7
    sums = tl.load(table)
    counts = tl.load(table + 1)
    padded = tl.load(table + 2)
    first = tl.load(table + 3)
    rows = tl.load(table + 4)
    columns = tl.load(table + 5)
    out = tl.load(table + 6)
    block = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    kept = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        row = first + start + block
        inside = start + block < rows
        where = row // padded * stride + row % padded
        total += tl.load(terms_pointer + sums + where, mask=inside, other=0.0).to(tl.float64)
        counted = inside & (block * 0 + counts >= 0)
        kept += tl.load(counts_pointer + counts + where, mask=counted, other=0).to(tl.float64)
    all_weights = (tl.zeros([], tl.float64) + rows) * columns
    count = tl.where(counts >= 0, tl.maximum(tl.sum(kept, axis=0), 1.0), all_weights)
    gamma = larger((tl.sum(total, axis=0) / count).to(tl.float32), 1e-5)
    tl.store(gamma_pointer + part, gamma)
    for start in range(0, rows, BLOCK):
        row = start + block
        tl.store(row_scale_pointer + out + first + row, tl.zeros([BLOCK], tl.float32) + gamma, mask=row < rows)


@triton.jit
def encode_kernel(w_pointer, row_scale_pointer, mask_pointer, words_pointer, rows, columns, stride, mask_stride,
                  words_stride, N: tl.constexpr, M: tl.constexpr, GIVEN: tl.constexpr, R: tl.constexpr,
                  C: tl.constexpr):  # fmt: skip
    """One tile of 64 rows and 128 columns: latent weights -> mask and codes -> a byte for each four weights."""
    G: tl.constexpr = C // 4
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    group = tl.program_id(1) * G + tl.arange(0, G)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    w = tl.load(w_pointer + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    half_gamma = 0.5 * tl.load(row_scale_pointer + row, mask=row < rows, other=1.0)[:, None]
    w0, w1, w2, w3 = _quads(w, R, C)
    if GIVEN:
        kept = _load_nibbles(mask_pointer, row, group, rows, columns, mask_stride)
    elif N == M:
        kept = tl.full([R, G], 15, tl.int32)
    else:
        k0, k1, k2, k3 = _keep_quads(_magnitude(w0), _magnitude(w1), _magnitude(w2), _magnitude(w3), N, M, R, G)
        kept = k0 | (k1 << 1) | (k2 << 2) | (k3 << 3)
    tail = tl.minimum(tl.maximum(columns - group * 4, 0), 4)
    kept = kept & ((1 << tail) - 1)[None, :]
    byte = tl.where(kept & 1 != 0, _natural(w0, half_gamma), 3)
    byte |= tl.where(kept & 2 != 0, _natural(w1, half_gamma), 3) << 2
    byte |= tl.where(kept & 4 != 0, _natural(w2, half_gamma), 3) << 4
    byte |= tl.where(kept & 8 != 0, _natural(w3, half_gamma), 3) << 6
    there = (row < rows)[:, None] & (group * 4 < columns)[None, :]
    where = row.to(tl.int64)[:, None] * words_stride + group[None, :]
    tl.store(words_pointer + where, byte.to(tl.uint8), mask=there)


@triton.jit
def decode_kernel(words_pointer, bits_pointer, codes_pointer, packed_pointer, rows, columns, padded, rank_stride,
                  words_stride, bits_stride, k_steps, BITS: tl.constexpr, LAYOUT: tl.constexpr, R: tl.constexpr,
                  C: tl.constexpr):  # fmt: skip
    """One tile of 64 rows and 128 columns: the words of all ranks -> codes, mask bits and packed words.

    A rank has ``padded`` rows, and the words of the next rank come ``rank_stride`` bytes later.
    """
    G: tl.constexpr = C // 4
    half = tl.program_id(0)
    k_step = tl.program_id(1)
    row = half * R + tl.arange(0, R)
    column = k_step * C + tl.arange(0, C)
    group = k_step * G + tl.arange(0, G)
    there = (row < rows)[:, None] & (group * 4 < columns)[None, :]
    start = (row // padded).to(tl.int64) * rank_stride + (row % padded).to(tl.int64) * words_stride
    byte = tl.load(words_pointer + start[:, None] + group[None, :], mask=there, other=255).to(tl.int32)
    c0, c1, c2, c3 = byte & 3, byte >> 2 & 3, byte >> 4 & 3, byte >> 6 & 3
    kept = (c0 != 3).to(tl.int32) | (c1 != 3).to(tl.int32) << 1
    kept |= (c2 != 3).to(tl.int32) << 2 | (c3 != 3).to(tl.int32) << 3
    c0, c1 = tl.where(c0 == 3, 0, c0), tl.where(c1 == 3, 0, c1)
    c2, c3 = tl.where(c2 == 3, 0, c2), tl.where(c3 == 3, 0, c3)
    where = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(codes_pointer + where, _unquad(_signed(c0), _signed(c1), _signed(c2), _signed(c3), R, C), mask=inside)
    if BITS:
        low, high = tl.split(tl.reshape(kept, [R, G // 2, 2]))
        eighth = k_step * (C // 8) + tl.arange(0, C // 8)
        bits_there = (row < rows)[:, None] & (eighth * 8 < columns)[None, :]
        bits_where = row.to(tl.int64)[:, None] * bits_stride + eighth[None, :]
        tl.store(bits_pointer + bits_where, (low | (high << 4)).to(tl.uint8), mask=bits_there)
    if LAYOUT == 1:
        _store_dense(packed_pointer, half, k_step, k_steps, c0 | (c1 << 4) | (c2 << 8) | (c3 << 12), R)
    elif LAYOUT == 2:
        _store_sparse24(packed_pointer, half, k_step, k_steps, kept, c0, c1, c2, c3, R, G)
