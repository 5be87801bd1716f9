"""SwiGLU fused with what comes next: the quantisation of its result, and its own backward.

``silu(gate) * up`` of a row is computed in float32 registers and quantised there. So a gigabyte of gates and ups is
read once, and only int8 tokens are written. Written in plain PyTorch and compiled, the same takes two kernels, which
read the gates twice. The backward is one pass too: ``d_gate = d up sigma (1 + gate (1 - sigma))``, ``d_up = d gate
sigma``.

Gates and ups come side by side in one tensor, from a fused layer, or in two tensors, from two layers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.common.buffers import empty_tokens, empty_vector, with_rows
from sbn_kernels.common.checks import FLOAT_DTYPES, check_bits, refuse_gradients
from sbn_kernels.common.integers import ceil_div, next_power_of_2
from sbn_kernels.common.maxima import larger
from sbn_kernels.common.overlap import begin
from sbn_kernels.common.token_codes import reduced_row, store_codes, token_scale
from sbn_kernels.runtime.capability import Needs, interpreting, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

MAX_FEATURES = 32768
NEEDS = Needs("swiglu", least=(0, 0), interpreter=True)


_SIGMOID = tl.constexpr(
    """{
    .reg .f32 e;
    mul.ftz.f32 e, $1, 0fBFB8AA3B;
    ex2.approx.ftz.f32 e, e;
    add.ftz.f32 e, e, 0f3F800000;
    rcp.approx.ftz.f32 $0, e;
    }"""
)


@triton.jit
def _silu(gate, FUSED: tl.constexpr):
    """gate / (1 + exp(-gate)), as near as the compiler's own exponential, which is a power of two as well.

    In PTX this takes 5 instructions. The compiler takes 14, because it looks after denormal numbers. A denormal
    exponential makes no difference beside the 1. A denormal sigmoid, of a gate below -87, becomes 0 here.
    """
    if FUSED:
        return gate * tl.inline_asm_elementwise(_SIGMOID, "=f,f", [gate], dtype=tl.float32, is_pure=True, pack=1)
    return gate / (1.0 + tl.exp(-gate))


@triton.jit
def _product(gate_row, up_row, features, START: tl.constexpr, BLOCK: tl.constexpr, FUSED: tl.constexpr):
    """silu(gate) * up of BLOCK columns from START on; zeros beyond the end of the row."""
    column = START + tl.arange(0, BLOCK)
    gate = tl.load(gate_row + column, mask=column < features, other=0.0).to(tl.float32)
    up = tl.load(up_row + column, mask=column < features, other=0.0).to(tl.float32)
    return _silu(gate, FUSED) * up


@triton.jit
def quantize_row(
    gate_row, up_row, q_row, scale_pointer, features,
    BITS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """The codes and the scale of one row. Two blocks cover it, because 8960 = 8192 + 768 leaves few lanes idle."""
    main = _product(gate_row, up_row, features, 0, MAIN, FUSED)
    reduced = reduced_row(main, BITS)
    if TAIL > 0:
        tail = _product(gate_row, up_row, features, MAIN, TAIL, FUSED)
        other = reduced_row(tail, BITS)
        reduced = larger(reduced, other) if BITS == 8 else reduced + other
    scale = token_scale(reduced, features, BITS)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    store_codes(q_row, main, scale, inverse, features, BITS, 0, MAIN, FUSED)
    if TAIL > 0:
        store_codes(q_row, tail, scale, inverse, features, BITS, MAIN, TAIL, FUSED)
    tl.store(scale_pointer + tl.arange(0, 1), scale)


@triton.jit
def swiglu_quantize_kernel(
    x_pointer, q_pointer, scale_pointer, features, x_stride, q_stride,
    BITS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, FUSED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row a program: gates in the first half, ups in the second."""
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    x_row, q_row = x_pointer + row * x_stride, q_pointer + row * q_stride
    quantize_row(x_row, x_row + features, q_row, scale_pointer + row, features, BITS, MAIN, TAIL, FUSED)


@triton.jit
def swiglu_pair_quantize_kernel(
    gate_pointer, up_pointer, q_pointer, scale_pointer, features, gate_stride, up_stride, q_stride,
    BITS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """One row a program: gates and ups in two tensors."""
    row = tl.program_id(0).to(tl.int64)
    gate_row, up_row = gate_pointer + row * gate_stride, up_pointer + row * up_stride
    q_row = q_pointer + row * q_stride
    quantize_row(gate_row, up_row, q_row, scale_pointer + row, features, BITS, MAIN, TAIL, FUSED)


@triton.jit
def gradients_of_product(d, gate, up):
    """The gradients of gates and ups, computed in float32 from the gradient of silu(gate) * up."""
    sigma = 1.0 / (1.0 + tl.exp(-gate))
    return d * up * sigma * (1.0 + gate * (1.0 - sigma)), d * gate * sigma


@triton.jit
def _backward_block(d_row, gate_row, up_row, d_gate_row, d_up_row, features, BLOCK: tl.constexpr):
    """The gradients of one block of columns of one row."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    d = tl.load(d_row + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_row + column, mask=inside, other=0.0).to(tl.float32)
    d_gate, d_up = gradients_of_product(d, gate, up)
    tl.store(d_gate_row + column, d_gate.to(d_gate_row.dtype.element_ty), mask=inside)
    tl.store(d_up_row + column, d_up.to(d_up_row.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    d_pointer, x_pointer, dx_pointer, features, d_stride, x_stride, BLOCK: tl.constexpr
):  # fmt: skip
    """One block of columns of one row a program; gates and ups side by side."""
    row = tl.program_id(0).to(tl.int64)
    x_row, dx_row = x_pointer + row * x_stride, dx_pointer + row * (2 * features)
    _backward_block(d_pointer + row * d_stride, x_row, x_row + features, dx_row, dx_row + features, features, BLOCK)


@triton.jit
def swiglu_pair_backward_kernel(
    d_pointer, gate_pointer, up_pointer, d_gate_pointer, d_up_pointer,
    features, d_stride, gate_stride, up_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of columns of one row a program; gates and ups in two tensors."""
    row = tl.program_id(0).to(tl.int64)
    _backward_block(
        d_pointer + row * d_stride, gate_pointer + row * gate_stride, up_pointer + row * up_stride,
        d_gate_pointer + row * features, d_up_pointer + row * features, features, BLOCK,
    )  # fmt: skip


_quantize = Launcher(swiglu_quantize_kernel, enable_fp_fusion=True, overlaps=True)
_backward = Launcher(swiglu_backward_kernel, enable_fp_fusion=True)
_pair_quantize = Launcher(swiglu_pair_quantize_kernel, enable_fp_fusion=True)
_pair_backward = Launcher(swiglu_pair_backward_kernel, enable_fp_fusion=True)


def blocks(features: int) -> tuple[int, int]:
    """The block sizes that cover a row: one power of two, or two of them where their sum is smaller."""
    whole = next_power_of_2(features)
    tail = next_power_of_2(features - whole // 2)
    return (whole, 0) if features == whole or tail == whole // 2 else (whole // 2, tail)


@kernel_op("swiglu_quantize")
def _swiglu_quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    require(NEEDS, x)
    x = with_rows(x)
    rows, features = x.shape[0], x.shape[1] // 2
    q, scale = empty_tokens(rows, features, x.device), empty_vector(rows, x.device)
    if rows:
        main, tail = blocks(features)
        constants = (bits, main, tail, not interpreting())
        numbers = (features, x.stride(0), q.stride(0))
        _quantize((rows, 1, 1), (x, q, scale), numbers, constants, min(8, max(1, main // 1024)))
    return q, scale


@kernel_fake("swiglu_quantize")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, features = x.shape[0], x.shape[1] // 2
    return empty_tokens(rows, features, x.device), empty_vector(rows, x.device)


@kernel_op("swiglu_backward")
def _swiglu_backward(d: Tensor, x: Tensor) -> Tensor:
    require(NEEDS, x)
    d, x = with_rows(d), with_rows(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, features = d.shape
    if rows:
        block = min(2048, next_power_of_2(features))
        grid = (rows, ceil_div(features, block), 1)
        _backward(grid, (d, x, dx), (features, d.stride(0), x.stride(0)), (block,))
    return dx


@kernel_fake("swiglu_backward")
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@kernel_op("swiglu_pair_quantize")
def _swiglu_pair_quantize(gate: Tensor, up: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    require(NEEDS, gate)
    gate, up = with_rows(gate), with_rows(up)
    rows, features = gate.shape
    q, scale = empty_tokens(rows, features, gate.device), empty_vector(rows, gate.device)
    if rows:
        main, tail = blocks(features)
        constants = (bits, main, tail, not interpreting())
        numbers = (features, gate.stride(0), up.stride(0), q.stride(0))
        _pair_quantize((rows, 1, 1), (gate, up, q, scale), numbers, constants, min(8, max(1, main // 1024)))
    return q, scale


@kernel_fake("swiglu_pair_quantize")
def _(gate: Tensor) -> tuple[Tensor, Tensor]:
    rows, features = gate.shape
    return empty_tokens(rows, features, gate.device), empty_vector(rows, gate.device)


@kernel_op("swiglu_pair_backward")
def _swiglu_pair_backward(d: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    require(NEEDS, gate)
    d, gate, up = with_rows(d), with_rows(gate), with_rows(up)
    rows, features = gate.shape
    d_gate = torch.empty((rows, features), dtype=gate.dtype, device=gate.device)
    d_up = torch.empty((rows, features), dtype=up.dtype, device=up.device)
    if rows:
        block = min(2048, next_power_of_2(features))
        numbers = (features, d.stride(0), gate.stride(0), up.stride(0))
        _pair_backward((rows, ceil_div(features, block), 1), (d, gate, up, d_gate, d_up), numbers, (block,))
    return d_gate, d_up


@kernel_fake("swiglu_pair_backward")
def _(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
        torch.empty(up.shape, dtype=up.dtype, device=up.device),
    )


def check_gates(x: Tensor) -> None:
    """Checks gates and ups in one tensor.

    Raises:
        ValueError: If the shape or the dtype does not fit.
    """
    refuse_gradients(x)
    if x.dim() != 2 or x.shape[1] % 2 or not 0 < x.shape[1] <= 2 * MAX_FEATURES:
        raise ValueError(f"gates and ups must be [tokens, 2 features], features 1 to {MAX_FEATURES}: {list(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"gates and ups must be float32, bfloat16 or float16, not {x.dtype}")


def check_pair(gate: Tensor, up: Tensor) -> None:
    """Checks gates and ups in two tensors.

    Raises:
        ValueError: If the shapes or the dtypes do not fit.
    """
    refuse_gradients(gate, up)
    if gate.dim() != 2 or gate.shape != up.shape or not 0 < gate.shape[1] <= MAX_FEATURES:
        raise ValueError(
            f"gates and ups must both be [tokens, features], features 1 to {MAX_FEATURES}, not {list(gate.shape)} and "
            f"{list(up.shape)}"
        )
    if gate.dtype not in FLOAT_DTYPES or up.dtype != gate.dtype:
        raise ValueError(f"gates and ups must both be float32, bfloat16 or float16, not {gate.dtype} and {up.dtype}")


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
    check_gates(x)
    check_bits(bits)
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
    check_gates(x)
    refuse_gradients(d)
    if d.shape != (x.shape[0], x.shape[1] // 2):
        raise ValueError(f"the gradient must be {[x.shape[0], x.shape[1] // 2]}, not {list(d.shape)}")
    dx: Tensor = torch.ops.sbn_kernels.swiglu_backward(d, x)
    return dx


def swiglu_pair_quantize(gate: Tensor, up: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Computes what :func:`swiglu_quantize` does, of gates and ups in two tensors.

    Args:
        gate: ``[tokens, features]``; float32, bfloat16 or float16; at most 32,768 features.
        up: The same shape and dtype.
        bits: 8 or 4.

    Returns:
        int8 ``[tokens, features]`` and scales, float32 ``[tokens]``.

    Raises:
        ValueError: If the shapes, the dtypes or the number of bits do not fit.
        UnsupportedError: If there is no GPU.
    """
    check_pair(gate, up)
    check_bits(bits)
    q, scale = torch.ops.sbn_kernels.swiglu_pair_quantize(gate, up, bits)
    return q, scale


def swiglu_pair_backward(d: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the gradients of ``silu(gate) * up`` for gates and ups in two tensors.

    Args:
        d: The gradient of the product ``[tokens, features]``.
        gate: The gates, ``[tokens, features]``.
        up: The ups, ``[tokens, features]``.

    Returns:
        The gradients of the gates and of the ups, ``[tokens, features]``.

    Raises:
        ValueError: If shapes or dtypes do not fit.
        UnsupportedError: If there is no GPU.
    """
    check_pair(gate, up)
    refuse_gradients(d)
    if d.shape != gate.shape:
        raise ValueError(f"the gradient must be {list(gate.shape)}, not {list(d.shape)}")
    d_gate, d_up = torch.ops.sbn_kernels.swiglu_pair_backward(d, gate, up)
    return d_gate, d_up
