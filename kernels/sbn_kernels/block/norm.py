"""RMSNorm with the sum before it and the quantisation after it, and its backward with the sum after it.

A compiler fuses these, too, but reads a row once for each of its three loops (mean square, maximum, codes), and takes
two to five times as long. Here a row stays in registers.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.common.buffers import empty_tokens, empty_vector, with_rows
from sbn_kernels.common.checks import FLOAT_DTYPES, check_bits, check_scale, refuse_gradients
from sbn_kernels.common.maxima import larger
from sbn_kernels.common.overlap import begin
from sbn_kernels.common.token_codes import reduced_row, store_codes, token_scale
from sbn_kernels.runtime.capability import Needs, interpreting, multiprocessors, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op
from sbn_kernels.swiglu.triton import blocks

MAX_FEATURES = 16384
NEEDS = Needs("norm", least=(0, 0), interpreter=True)
# Up to this many rows, all programs run at once on an H200 even with 8 warps each. A prompt of 512 tokens at 1.5B is
# 1.7 % faster with 8 warps a row than with 2. The sum of squares has another order then, so its last bits differ.
_FEW_ROWS = 1024


@triton.jit
def _sum(
    x_row, residual_row, h_row, features, part_size, of_token, row_scale_pointer,
    START: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of ``x``, or of ``x + residual``, which is rounded and stored.

    With PARTS above 0 the residual is a product whose int32 sums come in that many parts.
    """
    column = START + tl.arange(0, BLOCK)
    inside = column < features
    x = tl.load(x_row + column, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_row + column, mask=inside, other=0)
        if PARTS > 0:
            for _ in tl.static_range(1, PARTS):
                residual_row += part_size
                residual += tl.load(residual_row + column, mask=inside, other=0)
            factor = of_token * tl.load(row_scale_pointer + column, mask=inside, other=0.0)
            residual = (residual.to(tl.float32) * factor).to(h_row.dtype.element_ty)
        total = x.to(tl.float32) + residual.to(tl.float32)
        x = total.to(h_row.dtype.element_ty)
        tl.store(h_row + column, x, mask=inside)
    return x.to(tl.float32)


@triton.jit
def _weight(weight_pointer, like, features, START: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK weights of a norm, rounded to the dtype of the tokens."""
    column = START + tl.arange(0, BLOCK)
    weight = tl.load(weight_pointer + column, mask=column < features, other=0.0)
    return weight.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def norm_quantize_kernel(
    x_pointer, residual_pointer, token_scale_pointer, row_scale_pointer, h_pointer, weight_pointer, q_pointer,
    scale_pointer, rstd_pointer, features, x_stride, residual_stride, part_size, q_stride, eps_bits,
    ADD: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    FUSED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row a program. ``eps_bits`` are the bits of eps as a float32."""
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    x_row, residual_row = x_pointer + row * x_stride, residual_pointer + row * residual_stride
    h_row, q_row = h_pointer + row * features, q_pointer + row * q_stride
    of_token = tl.load(token_scale_pointer + row) if PARTS > 0 else 0.0
    main = _sum(x_row, residual_row, h_row, features, part_size, of_token, row_scale_pointer, 0, MAIN, ADD, PARTS)
    squares = tl.sum(main * main, axis=0, keep_dims=True)
    if TAIL > 0:
        tail = _sum(
            x_row, residual_row, h_row, features, part_size, of_token, row_scale_pointer, MAIN, TAIL, ADD, PARTS
        )
        squares += tl.sum(tail * tail, axis=0, keep_dims=True)
    eps = tl.full([1], 0, tl.int32) + eps_bits
    rstd = 1.0 / tl.sqrt(squares / features + eps.to(tl.float32, bitcast=True))
    main = main * rstd * _weight(weight_pointer, x_pointer, features, 0, MAIN)
    reduced = reduced_row(main, BITS)
    if TAIL > 0:
        tail = tail * rstd * _weight(weight_pointer, x_pointer, features, MAIN, TAIL)
        reduced = larger(reduced, reduced_row(tail, BITS)) if BITS == 8 else reduced + reduced_row(tail, BITS)
    scale = token_scale(reduced, features, BITS)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    store_codes(q_row, main, scale, inverse, features, BITS, 0, MAIN, FUSED)
    if TAIL > 0:
        store_codes(q_row, tail, scale, inverse, features, BITS, MAIN, TAIL, FUSED)
    tl.store(scale_pointer + row + tl.arange(0, 1), scale)
    tl.store(rstd_pointer + row + tl.arange(0, 1), rstd)


@triton.jit
def _load(row, features, START: tl.constexpr, BLOCK: tl.constexpr):
    column = START + tl.arange(0, BLOCK)
    return tl.load(row + column, mask=column < features, other=0.0)


@triton.jit
def _store_dx(dx_row, dh, scaled, normed, mean, rstd, features, START: tl.constexpr, BLOCK: tl.constexpr):
    column = START + tl.arange(0, BLOCK)
    dx = rstd * (scaled - normed * mean) + dh.to(tl.float32)
    tl.store(dx_row + column, dx.to(dx_row.dtype.element_ty), mask=column < features)


# Not specialised: numbers that vary from call to call and that no vector of loads depends on.
@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    dy_pointer, h_pointer, dh_pointer, weight_pointer, rstd_pointer, dx_pointer, part_pointer,
    rows, features, dy_stride, h_stride, dh_stride, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Every so many rows a program; each program writes its part of the weight's gradient.

    A row is loaded whole before its sum, because the compiler moves no load over the barriers of a sum.
    """
    d_main = tl.zeros([MAIN], tl.float32)
    weight = _weight(weight_pointer, h_pointer, features, 0, MAIN)
    if TAIL > 0:
        d_tail = tl.zeros([TAIL], tl.float32)
        tail_weight = _weight(weight_pointer, h_pointer, features, MAIN, TAIL)
    for index in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.full([], 0, tl.int64) + index
        dy_row, h_row, dh_row = dy_pointer + row * dy_stride, h_pointer + row * h_stride, dh_pointer + row * dh_stride
        dx_row = dx_pointer + row * features
        rstd = tl.load(rstd_pointer + row)
        dy, h, dh = (
            _load(dy_row, features, 0, MAIN), _load(h_row, features, 0, MAIN), _load(dh_row, features, 0, MAIN),
        )  # fmt: skip
        if TAIL > 0:
            tail_dy, tail_h = _load(dy_row, features, MAIN, TAIL), _load(h_row, features, MAIN, TAIL)
            tail_dh = _load(dh_row, features, MAIN, TAIL)
        normed = h.to(tl.float32) * rstd
        scaled = dy.to(tl.float32) * weight
        d_main += dy.to(tl.float32) * normed
        mean = tl.sum(scaled * normed, axis=0)
        if TAIL > 0:
            tail_normed = tail_h.to(tl.float32) * rstd
            tail_scaled = tail_dy.to(tl.float32) * tail_weight
            d_tail += tail_dy.to(tl.float32) * tail_normed
            mean += tl.sum(tail_scaled * tail_normed, axis=0)
        mean = mean / features
        _store_dx(dx_row, dh, scaled, normed, mean, rstd, features, 0, MAIN)
        if TAIL > 0:
            _store_dx(dx_row, tail_dh, tail_scaled, tail_normed, mean, rstd, features, MAIN, TAIL)
    part = part_pointer + tl.program_id(0).to(tl.int64) * features
    column = tl.arange(0, MAIN)
    tl.store(part + column, d_main, mask=column < features)
    if TAIL > 0:
        column = MAIN + tl.arange(0, TAIL)
        tl.store(part + column, d_tail, mask=column < features)


_quantize = Launcher(norm_quantize_kernel, enable_fp_fusion=True, overlaps=True)
_backward = Launcher(norm_backward_kernel, enable_fp_fusion=True)


@functools.cache
def _bits_of(number: float) -> int:
    """The bits of a number as a float32."""
    return int(torch.tensor(number, dtype=torch.float32).view(torch.int32))


def _empty(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, features = x.shape
    h = torch.empty((0, features) if residual is None else x.shape, dtype=x.dtype, device=x.device)
    return h, empty_tokens(rows, features, x.device), empty_vector(rows, x.device), empty_vector(rows, x.device)


def _launch(
    x: Tensor, residual: Tensor | None, scales: tuple[Tensor, Tensor] | None, weight: Tensor, eps: float, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the kernel. With ``scales``, of tokens and of rows, ``residual`` has int32 sums."""
    require(NEEDS, x)
    x = with_rows(x)
    h, q, scale, rstd = outputs = _empty(x, residual)
    other = x if residual is None else with_rows(residual)
    if len(x):
        features = x.shape[1]
        main, tail = blocks(features)
        parts, part_size = (0, 0) if scales is None else (other.shape[0], other.stride(0))
        numbers = (features, x.stride(0), other.stride(-2), part_size, q.stride(0), _bits_of(eps))
        constants = (residual is not None, parts, bits, main, tail, not interpreting())
        tensors = (x, other, *((scale, scale) if scales is None else scales), h, weight, q, scale, rstd)
        values_a_warp = 128 if len(x) <= _FEW_ROWS else 512
        _quantize((len(x), 1, 1), tensors, numbers, constants, min(8, max(1, main // values_a_warp)))
    return outputs


@kernel_op("norm_quantize")
def _norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _launch(x, residual, None, weight, eps, bits)


@kernel_op("norm_quantize_sums")
def _norm_quantize_sums(
    x: Tensor, sums: Tensor, token_scales: Tensor, row_scales: Tensor, weight: Tensor, eps: float, bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _launch(x, sums, (token_scales, row_scales), weight, eps, bits)


@kernel_fake("norm_quantize_sums")
def _(x: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(x, sums)


@kernel_fake("norm_quantize")
def _(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(x, residual)


@kernel_op("norm_backward")
def _norm_backward(dy: Tensor, h: Tensor, dh: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    require(NEEDS, dy)
    dy, h, dh = with_rows(dy), with_rows(h), with_rows(dh)
    rows, features = h.shape
    dx = torch.empty((rows, features), dtype=h.dtype, device=h.device)
    if rows == 0:
        return dx, torch.zeros(features, dtype=torch.float32, device=h.device)
    programs = min(rows, 8 * multiprocessors(h.device.index)) if h.is_cuda else min(rows, 2)
    parts = torch.empty((programs, features), dtype=torch.float32, device=h.device)
    main, tail = blocks(features)
    numbers = (rows, features, dy.stride(0), h.stride(0), dh.stride(0))
    warps = min(8, max(1, main // 256))
    _backward((programs, 1, 1), (dy, h, dh, weight, rstd, dx, parts), numbers, (main, tail), warps)
    return dx, parts.sum(0)


@kernel_fake("norm_backward")
def _(h: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(h.shape, dtype=h.dtype, device=h.device),
        torch.empty(h.shape[1], dtype=torch.float32, device=h.device),
    )


def _check(weight: Tensor, *rows: Tensor) -> None:
    refuse_gradients(weight, *rows)
    first = rows[0]
    if first.dim() != 2 or not 0 < first.shape[1] <= MAX_FEATURES or first.dtype not in FLOAT_DTYPES:
        shape = list(first.shape)
        raise ValueError(f"rows must be floats [tokens, features], features 1 to {MAX_FEATURES}, not {shape}")
    if any(other.shape != first.shape for other in rows) or weight.shape != first.shape[1:]:
        raise ValueError(f"rows and weight must fit [tokens, features] = {list(first.shape)}")


def norm_quantize(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, bits: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adds the residual, and quantises the RMSNorm of the sum.

    The sum of squares of a row has another order with up to 1,024 rows than with more. So the last bits of a row, and
    with them a code here and there, can differ between a prompt that is read at once and the same prompt in parts.
    Attention differs between the two in any case. The same call gives the same bits.

    Args:
        x: ``[tokens, features]``; float32, bfloat16 or float16; at most 16,384 features.
        residual: The same shape and dtype; None: nothing is added.
        weight: The weight of the norm, ``[features]``; rounded to the dtype of ``x`` first.
        eps: What is added to the mean square.
        bits: 8 or 4.

    Returns:
        The sum in the dtype of ``x``, which is empty without a residual; int8 codes, and their scales, float32
        ``[tokens]``, as ``quantize_tokens`` returns them; and one over the root of the mean square, float32
        ``[tokens]``.

    Raises:
        ValueError: If shapes, the dtype or the number of bits do not fit.
        UnsupportedError: If there is no GPU.
    """
    _check(weight, x, *(() if residual is None else (residual,)))
    check_bits(bits)
    h, q, scale, rstd = torch.ops.sbn_kernels.norm_quantize(x, residual, weight, eps, bits)
    return h, q, scale, rstd


def norm_quantize_sums(
    x: Tensor, sums: Tensor, token_scales: Tensor, row_scales: Tensor, weight: Tensor, eps: float, bits: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes :func:`norm_quantize` for a residual that is a product, before its parts are added and scaled.

    Args:
        x: ``[tokens, features]``, as for :func:`norm_quantize`.
        sums: The parts of the product, contiguous, int32 ``[parts, at least tokens, features]``.
        token_scales: The scale of each token of the product, float32 ``[tokens]``.
        row_scales: The scale of each row of its weight, float32 ``[features]``.
        weight: The weight of the norm, ``[features]``.
        eps: What is added to the mean square.
        bits: 8 or 4.

    Returns:
        As :func:`norm_quantize`. With bfloat16 and float16 the bits are those of a product that was computed first.

    Raises:
        ValueError: If shapes, dtypes or the number of bits do not fit.
        UnsupportedError: If there is no GPU.
    """
    _check(weight, x)
    check_bits(bits)
    check_scale("token_scales", token_scales, x.shape[0])
    check_scale("row_scales", row_scales, x.shape[1])
    fits = sums.dim() == 3 and sums.shape[0] > 0 and sums.shape[1] >= len(x) and sums.shape[2] == x.shape[1]
    if not fits or sums.dtype != torch.int32 or not sums.is_contiguous():
        wanted = f"contiguous int32 [parts, at least {len(x)}, {x.shape[1]}]"
        raise ValueError(f"sums must be {wanted}, not {sums.dtype} {list(sums.shape)}")
    h, q, scale, rstd = torch.ops.sbn_kernels.norm_quantize_sums(x, sums, token_scales, row_scales, weight, eps, bits)
    return h, q, scale, rstd


def norm_backward(dy: Tensor, h: Tensor, dh: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the gradients of RMSNorm's input and weight, and adds the input's gradient from elsewhere.

    Args:
        dy: The gradient of the norm's result, ``[tokens, features]``.
        h: The input of the norm.
        dh: The gradient of ``h`` from elsewhere, for example from a residual connection.
        weight: The weight of the norm, ``[features]``.
        rstd: What ``norm_quantize`` returned, float32 ``[tokens]``.

    Returns:
        The gradient of ``h`` in its dtype, and that of ``weight``, float32.

    Raises:
        ValueError: If shapes do not fit.
        UnsupportedError: If there is no GPU.
    """
    _check(weight, h, dy, dh)
    check_scale("rstd", rstd, h.shape[0])
    dx, dweight = torch.ops.sbn_kernels.norm_backward(dy, h, dh, weight, rstd)
    return dx, dweight
