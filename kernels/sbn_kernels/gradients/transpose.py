"""Operands of the backward, made from operands of the forward: transposed or dequantised tokens, transposed weights.

int8 tensor cores read both factors along the sum. The sum of ``dW`` runs over tokens, so ``dW`` needs ``x8`` as
``[in_features, tokens]``. The sum of ``dX`` runs over the layer's outputs, so ``dX`` needs the packed form of T
transposed. Bytes are transposed as 32-bit words of four tokens, which takes a quarter of the accesses to shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.common.buffers import empty_tokens
from sbn_kernels.common.checks import FLOAT_DTYPES, check_scale, refuse_gradients
from sbn_kernels.common.integers import ceil_div
from sbn_kernels.common.packing import packed_shape
from sbn_kernels.prepare.device import pack_transposed_kernel
from sbn_kernels.runtime.capability import Needs, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

NEEDS = Needs("transpose", least=(0, 0), interpreter=True)


@triton.jit
def transpose_kernel(
    x_pointer, q_pointer, rows, columns, x_stride, q_stride, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Transposes one tile of 4 R rows and C columns of bytes; rows of ``q`` have room for whole words at their end."""
    tiles = tl.cdiv(columns, C)
    quad = tl.program_id(0) // tiles * R + tl.arange(0, R)
    column = tl.program_id(0) % tiles * C + tl.arange(0, C)
    words = tl.zeros([R, C], tl.int32)
    for j in tl.static_range(4):
        row = quad * 4 + j
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        x = tl.load(x_pointer + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=inside, other=0)
        words |= (x.to(tl.int32) & 255) << (8 * j)
    q_words = q_pointer.to(tl.pointer_type(tl.int32), bitcast=True)
    where = q_words + column.to(tl.int64)[:, None] * (q_stride // 4) + quad[None, :]
    tl.store(where, tl.trans(words), mask=(column < columns)[:, None] & (quad * 4 < rows)[None, :])


@triton.jit
def dequantize_kernel(
    x_pointer, scale_pointer, y_pointer, rows, columns, x_stride, R: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """y = x * scale of the row; y is contiguous."""
    tiles = tl.cdiv(columns, C)
    row = tl.program_id(0) // tiles * R + tl.arange(0, R)
    column = tl.program_id(0) % tiles * C + tl.arange(0, C)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_pointer + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=inside, other=0)
    scale = tl.load(scale_pointer + row, mask=row < rows, other=0.0)
    y = (x.to(tl.float32) * scale[:, None]).to(y_pointer.dtype.element_ty)
    tl.store(y_pointer + row.to(tl.int64)[:, None] * columns + column[None, :], y, mask=inside)


_transpose = Launcher(transpose_kernel, enable_fp_fusion=True)
_dequantize = Launcher(dequantize_kernel, enable_fp_fusion=True)
_pack = Launcher(pack_transposed_kernel, enable_fp_fusion=True)


@kernel_op("transpose_tokens")
def _transpose_tokens(x8: Tensor) -> Tensor:
    require(NEEDS, x8)
    if x8.stride(1) != 1:
        x8 = x8.contiguous()
    rows, columns = x8.shape
    y = empty_tokens(columns, rows, x8.device)
    if x8.numel() > 0:
        quads, block = 32, 128
        grid = (ceil_div(rows, 4 * quads) * ceil_div(columns, block), 1, 1)
        _transpose(grid, (x8, y), (rows, columns, x8.stride(0), y.stride(0)), (quads, block))
    return y


@kernel_fake("transpose_tokens")
def _(x8: Tensor) -> Tensor:
    return empty_tokens(x8.shape[1], x8.shape[0], x8.device)


def transpose_tokens(x8: Tensor) -> Tensor:
    """Transposes int8 tokens: ``[tokens, features]`` -> ``[features, tokens]``, row stride ``tokens`` rounded up to 16.

    Raises:
        ValueError: If the dtype or the number of dimensions does not fit.
        UnsupportedError: If there is no GPU.
    """
    if x8.dim() != 2 or x8.dtype != torch.int8:
        raise ValueError(f"transpose_tokens needs int8 [tokens, features], not {x8.dtype} {list(x8.shape)}")
    result: Tensor = torch.ops.sbn_kernels.transpose_tokens(x8)
    return result


@kernel_op("pack_transposed")
def _pack_transposed(codes: Tensor) -> Tensor:
    require(NEEDS, codes)
    if codes.stride(1) != 1:
        codes = codes.contiguous()
    rows, columns = codes.shape
    packed = torch.empty(packed_shape(columns, rows), dtype=torch.int32, device=codes.device)
    halves, k_steps = 2 * packed.shape[0], packed.shape[1]
    _pack((halves, k_steps, 1), (codes, packed), (rows, columns, k_steps, codes.stride(0)), ())
    return packed


@kernel_fake("pack_transposed")
def _(codes: Tensor) -> Tensor:
    return torch.empty(packed_shape(codes.shape[1], codes.shape[0]), dtype=torch.int32, device=codes.device)


def pack_transposed(codes: Tensor) -> Tensor:
    """Packs the transposed weight for ``input_gradient_gemm``, once an optimiser step.

    Args:
        codes: int8 {-1, 0, 1} ``[out_features, in_features]``, as ``prepare_weight`` returns them.

    Returns:
        int32 words of ``codes`` transposed, layout ``dense``: equal to ``pack_dense(codes.t())``.

    Raises:
        ValueError: If the dtype or the number of dimensions does not fit, or there is no weight at all.
        UnsupportedError: If there is no GPU.
    """
    if codes.dim() != 2 or codes.dtype != torch.int8 or codes.numel() == 0:
        raise ValueError(f"codes must be int8 [out_features, in_features], not {codes.dtype} {list(codes.shape)}")
    result: Tensor = torch.ops.sbn_kernels.pack_transposed(codes)
    return result


@kernel_op("dequantize_tokens")
def _dequantize_tokens(x8: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    require(NEEDS, x8)
    if x8.stride(1) != 1:
        x8 = x8.contiguous()
    rows, columns = x8.shape
    y = torch.empty((rows, columns), dtype=dtype, device=x8.device)
    if x8.numel() > 0:
        block_rows, block = 4, 1024
        grid = (ceil_div(rows, block_rows) * ceil_div(columns, block), 1, 1)
        _dequantize(grid, (x8, scale, y), (rows, columns, x8.stride(0)), (block_rows, block))
    return y


@kernel_fake("dequantize_tokens")
def _(x8: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty((x8.shape[0], x8.shape[1]), dtype=dtype, device=x8.device)


def dequantize_tokens(x8: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Computes ``x8 * scale`` in one pass, rounded once to ``dtype``: the activations that exact gradients multiply.

    Args:
        x8: int8 ``[tokens, features]``.
        scale: float32 ``[tokens]``.
        dtype: bfloat16, float16 or float32.

    Returns:
        ``[tokens, features]``, contiguous.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If there is no GPU.
    """
    if x8.dim() != 2 or x8.dtype != torch.int8:
        raise ValueError(f"dequantize_tokens needs int8 [tokens, features], not {x8.dtype} {list(x8.shape)}")
    refuse_gradients(scale)
    check_scale("scale", scale, x8.shape[0])
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be bfloat16, float16 or float32, not {dtype}")
    result: Tensor = torch.ops.sbn_kernels.dequantize_tokens(x8, scale, dtype)
    return result
