"""SwiGLU's backward with the quantisation of its result in one operation, for the layer that made gates and ups.

That layer's int8 gradients need the largest value of each token and of each channel of their ``dy``, which is the
result of the SwiGLU's backward. The kernel here finds both while it writes ``dy``. So ``dy``, the widest tensor of a
block, is read once less than in ``quantize_gradient``.

Gates and ups come as they are, or as the int8 codes that :mod:`sbn_kernels.swiglu.saved` made, with one scale for the
gates and one for the ups of each token. Codes take half the memory of bfloat16 between forward and backward. The
backward of codes is that of the rounded gates and ups; the forward does not change.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.common.buffers import with_rows
from sbn_kernels.common.checks import check_scale, refuse_gradients
from sbn_kernels.common.integers import ceil_div, next_power_of_2
from sbn_kernels.common.maxima import larger, magnitude
from sbn_kernels.gradients.input_gradient import input_gradient_gemm
from sbn_kernels.gradients.reference import QuantizedGradient, check_seed
from sbn_kernels.gradients.triton import maxima_grid, outputs_for, round_to, zero_maxima
from sbn_kernels.runtime.capability import require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op
from sbn_kernels.swiglu.triton import (
    MAX_FEATURES,
    NEEDS,
    check_gates,
    gradients_of_product,
)


@triton.jit(do_not_specialize=["rows", "span"])
def swiglu_backward_maxima_kernel(
    d_pointer, gate_pointer, up_pointer, code_scale_pointer, d_gate_pointer, d_up_pointer,
    row_scale_pointer, up_row_scale_pointer, token_scale_pointer, max_pointer,
    rows, features, d_stride, x_stride, dx_stride, first_channel, span,
    CODES: tl.constexpr, MAXIMA: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradients of C columns of gates and of ups in ``span`` rows, and their maxima as ``gradient_maxima_kernel``.

    Maxima are those of the gradients as they are stored, rounded to the dtype of ``dx``. The pointers of gates and of
    ups are the halves of one tensor.
    """
    column = tl.program_id(0) * C + tl.arange(0, C)
    there = column < features
    first = tl.program_id(1) * span
    if MAXIMA:
        gate_scale = tl.load(row_scale_pointer + column, mask=there, other=0.0)[None, :]
        up_scale = tl.load(up_row_scale_pointer + column, mask=there, other=0.0)[None, :]
        largest_gate = tl.zeros([R, C], tl.float32)
        largest_up = tl.zeros([R, C], tl.float32)
    for start in range(first, tl.minimum(first + span, rows), R):
        row = start + tl.arange(0, R)
        inside = (row < rows)[:, None] & there[None, :]
        wide = row.to(tl.int64)[:, None]
        d = tl.load(d_pointer + wide * d_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_pointer + wide * x_stride + column[None, :], mask=inside, other=0).to(tl.float32)
        up = tl.load(up_pointer + wide * x_stride + column[None, :], mask=inside, other=0).to(tl.float32)
        if CODES:
            gate *= tl.load(code_scale_pointer + 2 * row, mask=row < rows, other=0.0)[:, None]
            up *= tl.load(code_scale_pointer + 2 * row + 1, mask=row < rows, other=0.0)[:, None]
        d_gate, d_up = gradients_of_product(d, gate, up)
        d_gate, d_up = d_gate.to(d_gate_pointer.dtype.element_ty), d_up.to(d_up_pointer.dtype.element_ty)
        tl.store(d_gate_pointer + wide * dx_stride + column[None, :], d_gate, mask=inside)
        tl.store(d_up_pointer + wide * dx_stride + column[None, :], d_up, mask=inside)
        if MAXIMA:
            d_gate, d_up = tl.abs(d_gate.to(tl.float32)), tl.abs(d_up.to(tl.float32))
            scale = tl.abs(tl.load(token_scale_pointer + row, mask=row < rows, other=0.0))[:, None]
            largest_gate = larger(largest_gate, d_gate * scale)
            largest_up = larger(largest_up, d_up * scale)
            d_gate, d_up = d_gate * tl.abs(gate_scale), d_up * tl.abs(up_scale)
            _atomic_largest(max_pointer + row, larger(d_gate, d_up), row < rows, R, C)
    if MAXIMA:
        of_gates, of_ups = tl.max(magnitude(largest_gate), axis=0), tl.max(magnitude(largest_up), axis=0)
        channel = max_pointer + first_channel + column
        tl.atomic_max(channel, of_gates, mask=there, sem="relaxed")
        tl.atomic_max(channel + features, of_ups, mask=there, sem="relaxed")


@triton.jit
def _atomic_largest(pointers, values, mask, R: tl.constexpr, C: tl.constexpr):
    """Raises what ``pointers`` hold to the bits of the largest value of each row, none of which is negative."""
    # Reduced as floats within a thread first, where a maximum is one instruction.
    eights = tl.reshape(values, [R, C // 8, 8])
    tl.atomic_max(pointers, tl.max(magnitude(tl.reduce(eights, 2, larger)), axis=1), mask=mask, sem="relaxed")


_backward = Launcher(swiglu_backward_maxima_kernel, enable_fp_fusion=True)


def _backward_to(
    dx: Tensor,
    d: Tensor,
    x: Tensor,
    code_scale: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    maxima: tuple[Tensor, int] | None = None,
) -> None:
    """Writes the gradients of gates and ups, and the bits of their maxima.

    Args:
        dx: The place for the gradients of gates, then of ups.
        d: The gradient of the product.
        x: Gates then ups, or their codes.
        code_scale: The scales of the codes.
        scales: gamma of the rows that made gates and ups, and the scales of the tokens.
        maxima: The place for maxima, and where those of the channels begin. None: no maxima.
    """
    row_scale, token_scale = scales or (d, d)
    places, first_channel = maxima or (d, 0)
    rows, features = d.shape
    block_rows, block_columns = 4, min(256, max(8, next_power_of_2(features)))
    strips, spans, span = maxima_grid(d, block_rows, ceil_div(features, block_columns))
    of_rows = (row_scale[:features], row_scale[features:]) if scales else (d, d)
    codes = d if code_scale is None else code_scale
    tensors = (d, *_halves(x), codes, *_halves(dx), *of_rows, token_scale, places)
    numbers = (rows, features, d.stride(0), x.stride(0), dx.stride(0), first_channel, span)
    flags = (code_scale is not None, maxima is not None)
    _backward((strips, spans, 1), tensors, numbers, (*flags, block_rows, block_columns))


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    features = x.shape[1] // 2
    return x[:, :features], x[:, features:]


def _gradient_and_maxima(
    d: Tensor, x: Tensor, code_scale: Tensor | None, row_scale: Tensor, token_scale: Tensor
) -> tuple[Tensor, Tensor, int]:
    """The gradient of gates and ups, the bits of its maxima, and where the maxima of channels begin."""
    require(NEEDS, x)
    d, x = with_rows(d), with_rows(x)
    dx = torch.empty(x.shape, dtype=d.dtype if code_scale is not None else x.dtype, device=d.device)
    maxima, first_channel = zero_maxima(dx, True, True)
    if len(d):
        _backward_to(dx, d, x, code_scale, (row_scale, token_scale), (maxima, first_channel))
    return dx, maxima, first_channel


@kernel_op("swiglu_backward_of_rounded")
def _swiglu_backward_of_rounded(
    a8: Tensor, scale: Tensor, weight_t: Tensor, x: Tensor, code_scale: Tensor | None, row_scale: Tensor,
    token_scale: Tensor, seed: Tensor, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d = input_gradient_gemm(a8, scale, weight_t, x.shape[1] // 2, dtype)
    dx, maxima, first_channel = _gradient_and_maxima(d, x, code_scale, row_scale, token_scale)
    del d  # Its memory serves for the codes.
    outputs = outputs_for(dx, True, True)
    round_to(outputs, dx, row_scale, token_scale, maxima, first_channel, seed, 0, True, True)
    return outputs


@kernel_fake("swiglu_backward_of_rounded")
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return outputs_for(x, True, True)


@kernel_op("swiglu_backward_of_codes")
def _swiglu_backward_of_codes(d: Tensor, codes: Tensor, code_scale: Tensor) -> Tensor:
    require(NEEDS, codes)
    dx = torch.empty(codes.shape, dtype=d.dtype, device=d.device)
    if len(d):
        _backward_to(dx, with_rows(d), codes, code_scale)
    return dx


@kernel_fake("swiglu_backward_of_codes")
def _(d: Tensor, codes: Tensor) -> Tensor:
    return torch.empty(codes.shape, dtype=d.dtype, device=d.device)


def _check_x(x: Tensor, code_scale: Tensor | None) -> None:
    if code_scale is None:
        check_gates(x)
    elif x.dtype != torch.int8 or x.dim() != 2 or x.shape[1] % 2 or not 0 < x.shape[1] <= 2 * MAX_FEATURES:
        raise ValueError(f"the codes of gates and ups must be int8 [tokens, 2 features], not {x.dtype} {list(x.shape)}")
    elif code_scale.shape != (x.shape[0], 2) or code_scale.dtype != torch.float32 or not code_scale.is_contiguous():
        raise ValueError(f"the scales of the codes must be float32 [{x.shape[0]}, 2], not {list(code_scale.shape)}")


def _check_codes(d: Tensor, x: Tensor, code_scale: Tensor | None) -> None:
    refuse_gradients(d)
    _check_x(x, code_scale)
    if d.shape != (x.shape[0], x.shape[1] // 2):
        raise ValueError(f"the gradient must be {[x.shape[0], x.shape[1] // 2]}, not {list(d.shape)}")


def swiglu_backward_of_codes(d: Tensor, codes: Tensor, code_scale: Tensor) -> Tensor:
    """Computes the gradient of ``silu(gate) * up`` at the gates and ups that codes stand for.

    Args:
        d: The gradient of the product, ``[tokens, features]``.
        codes: The codes of gates and ups, int8 ``[tokens, 2 features]``.
        code_scale: The scales of gates and of ups, float32 ``[tokens, 2]``.

    Returns:
        ``[tokens, 2 features]`` in the dtype of ``d``.

    Raises:
        ValueError: If shapes or dtypes do not fit.
        UnsupportedError: If there is no GPU.
    """
    _check_codes(d, codes, code_scale)
    dx: Tensor = torch.ops.sbn_kernels.swiglu_backward_of_codes(d, codes, code_scale)
    return dx


def swiglu_backward_of_rounded(
    a8: Tensor,
    scale: Tensor,
    weight_t: Tensor,
    x: Tensor,
    code_scale: Tensor | None,
    row_scale: Tensor,
    token_scale: Tensor,
    seed: Tensor,
    dtype: torch.dtype,
) -> QuantizedGradient:
    """Computes the gradient of the product, and from it the rounded gradient of gates and ups.

    The result is ``quantize_gradient(swiglu_backward(d, x), row_scale, token_scale, seed)`` with ``d =
    input_gradient_gemm(a8, scale, weight_t, features, dtype)``. ``d`` is gone before the codes are made, which take as
    much memory.

    Args:
        a8: The rounded gradient of the last layer's output, int8 ``[tokens, out]``.
        scale: The scales of ``a8``, float32 ``[tokens]``.
        weight_t: The last layer's weight, transposed, as ``input_gradient_gemm`` takes it.
        x: Gates then ups, ``[tokens, 2 features]``, or their codes, int8.
        code_scale: The scales of the codes, float32 ``[tokens, 2]``; None if ``x`` holds no codes.
        row_scale: gamma of each row of the weight that made gates and ups, float32 ``[2 features]``.
        token_scale: The scales of that layer's quantised tokens, float32 ``[tokens]``.
        seed: One int64 on the device.
        dtype: The dtype of the gradient of the product.

    Returns:
        The gradient of gates and ups, rounded in both orders.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If there is no GPU.
    """
    _check_x(x, code_scale)
    if len(a8) != len(x):
        raise ValueError(f"a8 must have the {len(x)} tokens of x, not {len(a8)}")
    check_scale("row_scale", row_scale, x.shape[1])
    check_scale("token_scale", token_scale, x.shape[0])
    check_seed(seed, 0, x.device)
    args = (a8, scale, weight_t, x, code_scale, row_scale, token_scale, seed, dtype)
    return QuantizedGradient(*torch.ops.sbn_kernels.swiglu_backward_of_rounded(*args))
