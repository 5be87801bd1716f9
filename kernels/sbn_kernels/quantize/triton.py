"""Quantises each token to int8 codes in one pass over memory; :mod:`.reference` has the formulas.

The row of a token is read once into registers, reduced, quantised and written. Rows of more than 16,384 values are read
twice, the second time mostly from L2.

The quotient is rounded like an IEEE division, halves to even, so 8-bit codes and scales equal the reference bit for
bit. 4-bit scales equal it up to the last bits of the mean, whose summation order differs. A division takes more
arithmetic than the memory traffic leaves room for, so the kernel computes one reciprocal a row and one exact residual a
value (Markstein): three multiply-adds. The interpreter has no fused multiply-add and divides.

Rows of the result start on 16-byte boundaries, as TMA needs: the row stride is the number of values rounded up to 16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.common.buffers import empty_tokens, empty_vector
from sbn_kernels.common.checks import FLOAT_DTYPES, check_bits, refuse_gradients
from sbn_kernels.common.integers import ceil_div, next_power_of_2
from sbn_kernels.common.maxima import larger
from sbn_kernels.common.overlap import begin
from sbn_kernels.common.token_codes import largest, token_codes, token_scale
from sbn_kernels.runtime.capability import Needs, interpreting, multiprocessors, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

_LOOP_BLOCK = 8192
NEEDS = Needs("quantize", least=(0, 0), interpreter=True)


@triton.jit
def _load_rows(x_pointer, row, column, rows, columns, x_stride):
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(x_pointer + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def quantize_rows_kernel(
    x_pointer, q_pointer, scale_pointer, rows, columns, x_stride, q_stride,
    BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, FUSED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Quantises ROWS whole rows at a time in registers, while the next rows are being loaded."""
    begin(EARLY)
    local = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    coming = _load_rows(x_pointer, tl.program_id(0) * ROWS + local, column, rows, columns, x_stride)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + local
        x = coming.to(tl.float32)
        coming = _load_rows(x_pointer, row + tl.num_programs(0) * ROWS, column, rows, columns, x_stride)
        if BITS == 8:
            scale = token_scale(largest(x, 1, False), columns, BITS)
        else:
            scale = token_scale(tl.sum(tl.abs(x), axis=1), columns, BITS)
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        q = token_codes(x, scale[:, None], inverse[:, None], BITS, FUSED)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        tl.store(q_pointer + row.to(tl.int64)[:, None] * q_stride + column[None, :], q, mask=inside)
        tl.store(scale_pointer + row, scale, mask=row < rows)


@triton.jit
def quantize_long_rows_kernel(
    x_pointer, q_pointer, scale_pointer, columns, x_stride, q_stride,
    BITS: tl.constexpr, BLOCK: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Quantises one row a program, in blocks: one pass to reduce, one to quantise."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK)
    reduced = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + block
        x = tl.abs(tl.load(x_pointer + row * x_stride + column, mask=column < columns, other=0.0).to(tl.float32))
        reduced = larger(reduced, x) if BITS == 8 else reduced + x
    if BITS == 8:
        scale = token_scale(largest(reduced, 0, True), columns, BITS)
    else:
        scale = token_scale(tl.sum(reduced, axis=0, keep_dims=True), columns, BITS)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    for start in range(0, columns, BLOCK):
        column = start + block
        x = tl.load(x_pointer + row * x_stride + column, mask=column < columns, other=0.0).to(tl.float32)
        q = token_codes(x, scale, inverse, BITS, FUSED)
        tl.store(q_pointer + row * q_stride + column, q, mask=column < columns)
    tl.store(scale_pointer + row + tl.arange(0, 1), scale)


_quantize_rows = Launcher(quantize_rows_kernel, enable_fp_fusion=True, overlaps=True)
_quantize_long_rows = Launcher(quantize_long_rows_kernel, enable_fp_fusion=True)


@kernel_op("quantize_tokens")
def _quantize_tokens(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    require(NEEDS, x)
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, columns = x.shape
    q = empty_tokens(rows, columns, x.device)
    scale = empty_vector(rows, x.device)
    if rows == 0:
        return q, scale
    fused = not interpreting()
    block = next_power_of_2(columns)
    strides = (x.stride(0), q.stride(0))
    if block <= 16384:
        per = max(1, 2048 // block)
        warps = min(16, max(4, per * block // 512))
        programs = ceil_div(rows, per)
        if x.is_cuda:  # as many programs as fit at once, so that the loop over rows has next rows to load
            programs = min(programs, multiprocessors(x.device.index) * max(1, 32 // warps))
        _quantize_rows((programs, 1, 1), (x, q, scale), (rows, columns, *strides), (bits, per, block, fused), warps)
    else:
        _quantize_long_rows((rows, 1, 1), (x, q, scale), (columns, *strides), (bits, _LOOP_BLOCK, fused), 16)
    return q, scale


@kernel_fake("quantize_tokens")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    return empty_tokens(rows, columns, x.device), empty_vector(rows, x.device)


def quantize_tokens(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Quantises each row of ``x`` to signed integers.

    Args:
        x: ``[tokens, features]``, float32, bfloat16 or float16; any number of rows, 0 included.
        bits: 8, or 4 for the range [-8, 7], which is stored as int8 too.

    Returns:
        int8 ``[tokens, features]`` whose row stride is ``features`` rounded up to 16, and the scale, float32
        ``[tokens]``: integers times scale approximate ``x``.

    Raises:
        ValueError: If the shape, the dtype or the number of bits does not fit.
        UnsupportedError: If there is no GPU.
    """
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"quantize_tokens needs [tokens, features] with features > 0, not {list(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"quantize_tokens needs float32, bfloat16 or float16, not {x.dtype}")
    check_bits(bits)
    refuse_gradients(x)
    q, scale = torch.ops.sbn_kernels.quantize_tokens(x, bits)
    return q, scale
