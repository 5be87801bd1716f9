"""SwiGLU fused with what comes next: the quantisation of its result, and its own backward.

``silu(gate) * up`` of a row is computed in float32 registers and quantised there. So a gigabyte of gates and ups is
read once, and only int8 tokens are written. Written in plain PyTorch and compiled, the same takes two kernels, which
read the gates twice. The backward is one pass too: ``d_gate = d up sigma (1 + gate (1 - sigma))``, ``d_up = d gate
sigma``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.common.buffers import empty_tokens, empty_vector
from sbn_kernels.common.checks import FLOAT_DTYPES, refuse_gradients
from sbn_kernels.common.integers import ceil_div, next_power_of_2
from sbn_kernels.common.maxima import larger
from sbn_kernels.common.token_codes import largest, token_codes, token_scale
from sbn_kernels.runtime.capability import Needs, interpreting, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

MAX_FEATURES = 32768
NEEDS = Needs("swiglu", least=(0, 0), interpreter=True)


@triton.jit
def _product(row_pointer, features, START: tl.constexpr, BLOCK: tl.constexpr):
    """silu(gate) * up of BLOCK columns from START on; zeros beyond the end of the row."""
    column = START + tl.arange(0, BLOCK)
    gate = tl.load(row_pointer + column, mask=column < features, other=0.0).to(tl.float32)
    up = tl.load(row_pointer + features + column, mask=column < features, other=0.0).to(tl.float32)
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _reduce(x, BITS: tl.constexpr):
    """The number that the scale is computed from: max|x| for 8 bits, sum|x| for 4."""
    return largest(x, 0, True) if BITS == 8 else tl.sum(tl.abs(x), axis=0, keep_dims=True)


@triton.jit
def swiglu_quantize_kernel(
    x_pointer, q_pointer, scale_pointer, features, x_stride, q_stride,
    BITS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """One row a program: gates in the first half, ups in the second.

    Two blocks cover the row, because 8960 = 8192 + 768 leaves few lanes idle.
    """
    row = tl.program_id(0).to(tl.int64)
    x_row, q_row = x_pointer + row * x_stride, q_pointer + row * q_stride
    main = _product(x_row, features, 0, MAIN)
    reduced = _reduce(main, BITS)
    if TAIL > 0:
        tail = _product(x_row, features, MAIN, TAIL)
        other = _reduce(tail, BITS)
        reduced = larger(reduced, other) if BITS == 8 else reduced + other
    scale = token_scale(reduced, features, BITS)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    column = tl.arange(0, MAIN)
    tl.store(q_row + column, token_codes(main, scale, inverse, BITS, FUSED), mask=column < features)
    if TAIL > 0:
        column = MAIN + tl.arange(0, TAIL)
        tl.store(q_row + column, token_codes(tail, scale, inverse, BITS, FUSED), mask=column < features)
    tl.store(scale_pointer + row + tl.arange(0, 1), scale)


@triton.jit
def swiglu_backward_kernel(
    d_pointer, x_pointer, dx_pointer, features, d_stride, x_stride, BLOCK: tl.constexpr
):  # fmt: skip
    """One block of columns of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    d = tl.load(d_pointer + row * d_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_pointer + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_pointer + row * x_stride + features + column, mask=inside, other=0.0).to(tl.float32)
    sigma = 1.0 / (1.0 + tl.exp(-gate))
    target = dx_pointer + row * (2 * features) + column
    element = dx_pointer.dtype.element_ty
    tl.store(target, (d * up * sigma * (1.0 + gate * (1.0 - sigma))).to(element), mask=inside)
    tl.store(target + features, (d * gate * sigma).to(element), mask=inside)


_quantize = Launcher(swiglu_quantize_kernel, enable_fp_fusion=True)
_backward = Launcher(swiglu_backward_kernel, enable_fp_fusion=True)


def blocks(features: int) -> tuple[int, int]:
    """The block sizes that cover a row: one power of two, or two of them where their sum is smaller."""
    whole = next_power_of_2(features)
    tail = next_power_of_2(features - whole // 2)
    return (whole, 0) if features == whole or tail == whole // 2 else (whole // 2, tail)


@kernel_op("swiglu_quantize")
def _swiglu_quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    require(NEEDS, x)
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, features = x.shape[0], x.shape[1] // 2
    q, scale = empty_tokens(rows, features, x.device), empty_vector(rows, x.device)
    if rows:
        main, tail = blocks(features)
        constants = (bits, main, tail, not interpreting())
        numbers = (features, x.stride(0), q.stride(0))
        _quantize((rows, 1, 1), (x, q, scale), numbers, constants, min(8, max(1, main // 1024)))
    return q, scale


@kernel_fake("swiglu_quantize")
def _(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    rows, features = x.shape[0], x.shape[1] // 2
    return empty_tokens(rows, features, x.device), empty_vector(rows, x.device)


@kernel_op("swiglu_backward")
def _swiglu_backward(d: Tensor, x: Tensor) -> Tensor:
    require(NEEDS, x)
    d = d if d.stride(1) == 1 else d.contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, features = d.shape
    if rows:
        block = min(2048, next_power_of_2(features))
        grid = (rows, ceil_div(features, block), 1)
        _backward(grid, (d, x, dx), (features, d.stride(0), x.stride(0)), (block,))
    return dx


@kernel_fake("swiglu_backward")
def _(d: Tensor, x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _check(x: Tensor) -> None:
    refuse_gradients(x)
    if x.dim() != 2 or x.shape[1] % 2 or not 0 < x.shape[1] <= 2 * MAX_FEATURES:
        raise ValueError(f"gates and ups must be [tokens, 2 features], features 1 to {MAX_FEATURES}: {list(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"gates and ups must be float32, bfloat16 or float16, not {x.dtype}")


def swiglu_quantize(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Computes ``quantize_tokens(silu(gate) * up)`` without writing the product.

    Args:
        x: ``[tokens, 2 features]``, gates then ups; float32, bfloat16 or float16; at most 32,768 features.
        bits: 8 or 4.

    Returns:
        int8 ``[tokens, features]`` and scales, float32 ``[tokens]``, as ``quantize_tokens`` returns them.

    Raises:
        ValueError: If the shape, the dtype or the number of bits does not fit.
        UnsupportedError: If there is no GPU.
    """
    _check(x)
    if bits not in (8, 4):
        raise ValueError(f"activations are quantised to 8 or 4 bits, not {bits}")
    q, scale = torch.ops.sbn_kernels.swiglu_quantize(x, bits)
    return q, scale


def swiglu_backward(d: Tensor, x: Tensor) -> Tensor:
    """Computes the gradient of ``silu(gate) * up``.

    Args:
        d: The gradient of the product ``[tokens, features]``.
        x: Gates then ups, ``[tokens, 2 features]``.

    Returns:
        ``[tokens, 2 features]`` in the dtype of ``x``.

    Raises:
        ValueError: If shapes or dtypes do not fit.
        UnsupportedError: If there is no GPU.
    """
    _check(x)
    refuse_gradients(d)
    if d.shape != (x.shape[0], x.shape[1] // 2):
        raise ValueError(f"the gradient must be {[x.shape[0], x.shape[1] // 2]}, not {list(d.shape)}")
    dx: Tensor = torch.ops.sbn_kernels.swiglu_backward(d, x)
    return dx
