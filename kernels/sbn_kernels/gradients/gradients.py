"""Backward of a ternary layer on int8 tensor cores: only the output's gradient ``dy`` is rounded, without bias.

Forward: ``y[m, n] = s[m] g[n] sum_k x8[m, k] T[n, k]``, ``x8`` and ``T`` exact integers, ``s`` a scale a token, ``g``
gamma of each row. Its straight-through gradients are ``dX = (dy g) T`` and ``dW = (dy s)^T x8``. int8 products need
one scale a row of either factor, so ``dy g`` is quantised a token and ``dy s`` a channel::

    dX[m, k] = sa[m] sum_n a8[m, n] T[n, k]        E[sa a8] = dy g
    dW[n, k] = sb[n] sum_m b8[m, n] x8[m, k]       E[sb b8] = dy s

Both products are exact and so are unbiased estimates of the straight-through gradients. Hopper's int8 instruction reads
both factors along the sum: the quantiser writes ``b8`` transposed, and ``transpose`` makes the other copies.

Stochastic rounding (Gupta et al., arXiv 1502.02551), in fixed point: with 2^15 parts of a step,
``q = floor((round(2^15 v / s) + draw) / 2^15)``, ``draw`` uniform in 0 .. 2^15 - 1. Its mean is exactly the value
rounded to 2^-15 of a step, the precision that float32 has at the row's maximum. The scale is the maximum over
``127 - 2^-14``, so that no draw leaves [-127, 127] and nothing needs clamping. Draws come from Philox-4x32 with 7
rounds (Salmon et al., SC 2011; passes BigCrush), keyed by the seed, counted by (channel, token // 8, stream): the same
bits whatever the launch. The low and the high 15 bits of a word serve two tokens. ``a8`` and ``b8`` share an element's
draw: each is unbiased, and no gradient multiplies one by the other.

A NaN or infinity in ``dy`` makes the scale of its token and of its channel NaN or infinite, so the gradients show it.
Three launches: maxima (one read of ``dy``), scales, rounding (the second read).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sbn_kernels.gemm.portable import int8_gemm
from sbn_kernels.gemm.sm90.gemm import ternary_gemm
from sbn_kernels.gradients.triton import (
    LEVELS,
    ROUNDS,
    SMALLEST,
    gradient_maxima_kernel,
    gradient_scales_kernel,
    quantize_gradient_kernel,
)
from sbn_kernels.quantize.triton import empty_tokens, empty_vector
from sbn_kernels.runtime.capability import interpreting, multiprocessors, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import ceil_div, kernel_fake, kernel_op, refuse_gradients

_WORD = 0xFFFFFFFF
_maxima = Launcher(gradient_maxima_kernel, enable_fp_fusion=False)
_scales = Launcher(gradient_scales_kernel)
# four programs a multiprocessor; three fit at the 160 registers that the compiler would take
_round = Launcher(quantize_gradient_kernel, enable_fp_fusion=False, maxnreg=128)


class QuantizedGradient(NamedTuple):
    """Result of :func:`quantize_gradient`. Tensors not asked for are empty.

    Attributes:
        tokens: int8 ``[tokens, channels]``, ``a8``: ``dy * row_scale``; row stride a multiple of 16.
        token_scale: float32 ``[tokens]``, ``sa``.
        channels: int8 ``[channels, tokens]``, ``b8`` transposed: ``dy * token_scale``; row stride a multiple of 16.
        channel_scale: float32 ``[channels]``, ``sb``.
    """

    tokens: Tensor
    token_scale: Tensor
    channels: Tensor
    channel_scale: Tensor


def _outputs(dy: Tensor, want_tokens: bool, want_channels: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = dy.shape
    a_shape = (rows, columns) if want_tokens else (0, 0)
    b_shape = (columns, rows) if want_channels else (0, 0)
    return (
        empty_tokens(*a_shape, dy.device),
        empty_vector(a_shape[0], dy.device),
        empty_tokens(*b_shape, dy.device),
        empty_vector(b_shape[0], dy.device),
    )


@kernel_op("quantize_gradient")
def _quantize_gradient(
    dy: Tensor,
    row_scale: Tensor,
    token_scale: Tensor,
    seed: Tensor,
    stream: int,
    want_tokens: bool,
    want_channels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require("quantize", dy)
    if dy.stride(1) != 1:
        dy = dy.contiguous()
    rows, columns = dy.shape
    a, sa, b, sb = outputs = _outputs(dy, want_tokens, want_channels)
    # maxima of tokens, then of channels; those start at a multiple of 16, as pointers of tensors of their own would
    first_channel = ceil_div(rows, 16) * 16 if want_tokens else 0
    length = first_channel + (columns if want_channels else 0)
    maxima = torch.zeros(length, dtype=torch.int32, device=dy.device)
    block_rows, block_columns = 8, 256
    if rows > 0:
        strips = ceil_div(columns, block_columns)
        spans = ceil_div(rows, block_rows)
        if dy.is_cuda:  # about sixteen programs a multiprocessor: few atomic operations, and none idle
            spans = min(spans, max(1, 16 * multiprocessors(dy.device.index) // strips))
        span = ceil_div(ceil_div(rows, spans), block_rows) * block_rows
        _maxima(
            (strips, ceil_div(rows, span), 1),
            (dy, row_scale, token_scale, maxima),
            (rows, columns, dy.stride(0), first_channel, span),
            (want_tokens, want_channels, block_rows, block_columns),
        )
    if length > 0:
        numbers = (rows if want_tokens else 0, columns if want_channels else 0, first_channel)
        _scales((ceil_div(length, 1024), 1, 1), (maxima, sa, sb), numbers, (1024,))
    if rows > 0:
        octets, block_columns = 16, 64
        _round(
            (ceil_div(rows, 8 * octets) * ceil_div(columns, block_columns), 1, 1),
            (dy, row_scale, token_scale, maxima, seed, a, b),
            (rows, columns, dy.stride(0), a.stride(0), b.stride(0), first_channel, stream),
            (want_tokens, want_channels, octets, block_columns, not interpreting()),
        )
    return outputs


@kernel_fake("quantize_gradient")
def _(
    dy: Tensor,
    row_scale: Tensor,
    token_scale: Tensor,
    seed: Tensor,
    stream: int,
    want_tokens: bool,
    want_channels: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(dy, want_tokens, want_channels)


def _check(dy: Tensor, row_scale: Tensor, token_scale: Tensor, seed: Tensor, stream: int) -> None:
    refuse_gradients(dy, row_scale, token_scale)
    if dy.dim() != 2 or dy.shape[1] == 0 or dy.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        shape = list(dy.shape)
        raise ValueError(f"dy must be float32, bfloat16 or float16 [tokens, channels > 0], not {dy.dtype} {shape}")
    for name, scale, length in (("row_scale", row_scale, dy.shape[1]), ("token_scale", token_scale, dy.shape[0])):
        if scale.shape != (length,) or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise ValueError(f"{name} must be contiguous float32 [{length}], not {scale.dtype} {list(scale.shape)}")
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != dy.device:
        raise ValueError(f"seed must be one int64 on {dy.device}, not {seed.dtype} {list(seed.shape)} on {seed.device}")
    if not 0 <= stream < 2**31:
        raise ValueError(f"stream must be in 0 .. 2^31 - 1, not {stream}")


def quantize_gradient(
    dy: Tensor,
    row_scale: Tensor,
    token_scale: Tensor,
    seed: Tensor,
    stream: int = 0,
    *,
    want_tokens: bool = True,
    want_channels: bool = True,
) -> QuantizedGradient:
    """Rounds ``dy * row_scale`` a token and ``dy * token_scale`` a channel to int8, stochastically, without bias.

    Args:
        dy: Gradient of the layer's output ``[tokens, channels]``, bfloat16, float16 or float32; 0 tokens allowed.
        row_scale: float32 ``[channels]``: gamma of each row of the weight.
        token_scale: float32 ``[tokens]``: scale of the quantised activations.
        seed: One int64 on the device, any value: a graph replayed or compiled once sees a new one by writing it.
        stream: Number that sets layers apart which share a seed, 0 to 2^31 - 1.
        want_tokens: Whether to make ``tokens`` (for dX).
        want_channels: Whether to make ``channels`` (for dW).

    Returns:
        See :class:`QuantizedGradient`. Equal bit for bit to :func:`quantize_gradient_reference`.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If there is no GPU.
    """
    _check(dy, row_scale, token_scale, seed, stream)
    args = (dy, row_scale, token_scale, seed, stream, want_tokens, want_channels)
    return QuantizedGradient(*torch.ops.sbn_kernels.quantize_gradient(*args))


def _high_and_low(multiplier: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of the product of two unsigned 32-bit integers, held in int64."""
    upper = multiplier * (value >> 16) + (multiplier * (value & 0xFFFF) >> 16)
    return upper >> 16, multiplier * value & _WORD


def gradient_draws(tokens: int, channels: int, seed: Tensor, stream: int = 0) -> Tensor:
    """The draws, int64 in 0 .. 2^15 - 1, ``[tokens, channels]``, in plain PyTorch."""
    channel = torch.arange(channels, device=seed.device)[None, :]
    octet = torch.arange(ceil_div(tokens, 8), device=seed.device)[:, None]
    whole = torch.zeros(octet.shape[0], channels, dtype=torch.int64, device=seed.device)
    c0, c1, c2, c3 = channel + whole, octet + whole, whole + stream, whole
    k0, k1 = seed.reshape(()) & _WORD, (seed.reshape(()) >> 32) & _WORD
    for _ in range(ROUNDS):
        (high_a, low_a), (high_b, low_b) = _high_and_low(0xD2511F53, c0), _high_and_low(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    words = torch.stack([c0, c1, c2, c3], 1)
    return torch.stack([words & 0x7FFF, words >> 17], 2).flatten(0, 2)[:tokens]


def quantize_gradient_reference(
    dy: Tensor, row_scale: Tensor, token_scale: Tensor, seed: Tensor, stream: int = 0
) -> QuantizedGradient:
    """Twin of :func:`quantize_gradient` in plain PyTorch, on any device, the same bits.

    Codes of a token or channel whose scale is not finite mean nothing.
    """
    _check(dy, row_scale, token_scale, seed, stream)

    def rounded(value: Tensor, draw: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        empty = value.new_zeros(value.shape[1 - dim])
        largest = (value.abs().amax(dim) if value.shape[dim] else empty).clamp(min=SMALLEST)
        fixed = (value * (value.new_tensor(float(LEVELS)) / largest).unsqueeze(dim)).round()
        fixed = fixed.nan_to_num(0.0, 0.0, 0.0).long()
        return (fixed + draw >> 15).to(torch.int8), largest / value.new_tensor(LEVELS / 2**15)

    draw = gradient_draws(dy.shape[0], dy.shape[1], seed, stream)
    a, sa = rounded(dy.float() * row_scale, draw, 1)
    b, sb = rounded(dy.float() * token_scale[:, None], draw, 0)
    return QuantizedGradient(a, sa, b.t().contiguous(), sb)


def input_gradient_gemm(
    a8: Tensor,
    scale: Tensor,
    weight_t: Tensor,
    in_features: int,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    unit_scale: Tensor | None = None,
) -> Tensor:
    """``dX = scale * (a8 @ T)``.

    Args:
        a8: int8 ``[tokens, out_features]``: ``QuantizedGradient.tokens``.
        scale: float32 ``[tokens]``.
        weight_t: T transposed: packed ``dense`` words of :func:`~sbn_kernels.gradients.transpose.pack_transposed` (int32; Hopper,
            Triton >= 3.9), or int8 codes ``[in_features, out_features]`` (sm_80 and later).
        in_features: Columns of T.
        out_dtype: bfloat16, float16 or float32.
        unit_scale: float32 ones ``[in_features]``, if there are some already: saves a small launch. Only with int8
            codes; the kernel for packed words needs none.

    Returns:
        ``[tokens, in_features]``.

    Raises:
        ValueError: If an argument does not fit, or ``unit_scale`` comes with packed words.
        UnsupportedError: Where the product cannot run.
    """
    if weight_t.dtype == torch.int32:
        if unit_scale is not None:
            raise ValueError("unit_scale is for int8 codes; packed words need none")
        return ternary_gemm(a8, scale, weight_t, None, in_features, out_dtype=out_dtype)
    ones = torch.ones(in_features, device=a8.device) if unit_scale is None else unit_scale
    return int8_gemm(a8, scale, weight_t, ones, out_dtype=out_dtype)
