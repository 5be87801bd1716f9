"""SwiGLU with the quantisation of its result, which also saves gates and ups as int8 codes for the backward.

Codes take half the memory of bfloat16 between forward and backward. The backward of codes is in
:mod:`sbn_kernels.swiglu.rounded`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.common.buffers import empty_tokens, empty_vector, with_rows
from sbn_kernels.common.checks import check_bits
from sbn_kernels.common.maxima import larger
from sbn_kernels.common.token_codes import largest, store_codes, token_scale
from sbn_kernels.runtime.capability import interpreting, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op
from sbn_kernels.swiglu.triton import NEEDS, blocks, check_gates, quantize_row


@triton.jit
def _load(row, features, START: tl.constexpr, BLOCK: tl.constexpr):
    column = START + tl.arange(0, BLOCK)
    return tl.load(row + column, mask=column < features, other=0.0).to(tl.float32)


@triton.jit
def _save_row(x_row, code_row, scale_pointer, features, MAIN: tl.constexpr, TAIL: tl.constexpr, FUSED: tl.constexpr):
    """The codes of one row of gates, or of ups, and their scale; two blocks, as in ``quantize_row``."""
    main = _load(x_row, features, 0, MAIN)
    reduced = largest(main, 0, True)
    if TAIL > 0:
        tail = _load(x_row, features, MAIN, TAIL)
        reduced = larger(reduced, largest(tail, 0, True))
    scale = token_scale(reduced, features, 8)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    store_codes(code_row, main, scale, inverse, features, 8, 0, MAIN, FUSED)
    if TAIL > 0:
        store_codes(code_row, tail, scale, inverse, features, 8, MAIN, TAIL, FUSED)
    tl.store(scale_pointer + tl.arange(0, 1), scale)


@triton.jit
def swiglu_quantize_and_save_kernel(
    x_pointer, q_pointer, scale_pointer, code_pointer, code_scale_pointer, features, x_stride, q_stride, code_stride,
    BITS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """One row a program, as ``swiglu_quantize_kernel``; then its gates and its ups, which are in the cache by then.

    They are read again: with all three rows in registers, too few programs would fit a multiprocessor.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row, q_row, code_row = x_pointer + row * x_stride, q_pointer + row * q_stride, code_pointer + row * code_stride
    quantize_row(x_row, x_row + features, q_row, scale_pointer + row, features, BITS, MAIN, TAIL, FUSED)
    _save_row(x_row, code_row, code_scale_pointer + 2 * row, features, MAIN, TAIL, FUSED)
    _save_row(x_row + features, code_row + features, code_scale_pointer + 2 * row + 1, features, MAIN, TAIL, FUSED)


_quantize_and_save = Launcher(swiglu_quantize_and_save_kernel, enable_fp_fusion=True)


def _empty_saved(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, features = x.shape[0], x.shape[1] // 2
    return (
        empty_tokens(rows, features, x.device),
        empty_vector(rows, x.device),
        empty_tokens(rows, 2 * features, x.device),
        torch.empty((rows, 2), dtype=torch.float32, device=x.device),
    )


@kernel_op("swiglu_quantize_and_save")
def _swiglu_quantize_and_save(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require(NEEDS, x)
    x = with_rows(x)
    q, scale, codes, code_scale = outputs = _empty_saved(x)
    if len(x):
        main, tail = blocks(q.shape[1])
        constants = (bits, main, tail, not interpreting())
        numbers = (q.shape[1], x.stride(0), q.stride(0), codes.stride(0))
        warps = min(8, max(1, main // 1024))
        _quantize_and_save((len(x), 1, 1), (x, q, scale, codes, code_scale), numbers, constants, warps)
    return outputs


@kernel_fake("swiglu_quantize_and_save")
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_saved(x)


def swiglu_quantize_and_save(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes ``swiglu_quantize(x)``, and int8 codes of gates and ups for the backward.

    Args:
        x: ``[tokens, 2 features]``, gates then ups; float32, bfloat16 or float16; at most 32,768 features.
        bits: 8 or 4 bits for the product; the codes of gates and ups have 8.

    Returns:
        int8 ``[tokens, features]`` and its scales, float32 ``[tokens]``, as ``swiglu_quantize`` returns them; the codes
        of gates and ups, int8 ``[tokens, 2 features]``, and their scales, float32 ``[tokens, 2]``.

    Raises:
        ValueError: If the shape, the dtype or the number of bits does not fit.
        UnsupportedError: If there is no GPU.
    """
    check_gates(x)
    check_bits(bits)
    q, scale, codes, code_scale = torch.ops.sbn_kernels.swiglu_quantize_and_save(x, bits)
    return q, scale, codes, code_scale
