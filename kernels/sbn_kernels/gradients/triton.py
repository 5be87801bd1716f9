"""Quantises the gradient of a layer's output to int8 in both orders; :mod:`.reference` has the formulas.

Three launches: maxima (one read of ``dy``), scales, rounding (the second read). Each value is rounded once for ``dX``
and once for ``dW``, and the codes for ``dW`` are written transposed, as Hopper's int8 instruction reads them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbn_kernels.common.buffers import empty_tokens, empty_vector
from sbn_kernels.common.integers import ceil_div
from sbn_kernels.gradients.device import (
    gradient_maxima_kernel,
    gradient_scales_kernel,
    quantize_gradient_kernel,
)
from sbn_kernels.gradients.reference import QuantizedGradient, check_gradient
from sbn_kernels.runtime.capability import Needs, interpreting, multiprocessors, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

NEEDS = Needs("gradients", least=(0, 0), interpreter=True)
_maxima = Launcher(gradient_maxima_kernel, enable_fp_fusion=False)
_scales = Launcher(gradient_scales_kernel, enable_fp_fusion=True)
# 128 registers: four programs fit a multiprocessor; with the 160 that the compiler would take, three
_round = Launcher(quantize_gradient_kernel, enable_fp_fusion=False, maxnreg=128)


def outputs_for(dy: Tensor, want_tokens: bool, want_channels: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised codes of tokens with their scales, and codes of channels with theirs; empty if not wanted."""
    rows, columns = dy.shape
    a_shape = (rows, columns) if want_tokens else (0, 0)
    b_shape = (columns, rows) if want_channels else (0, 0)
    return (
        empty_tokens(*a_shape, dy.device),
        empty_vector(a_shape[0], dy.device),
        empty_tokens(*b_shape, dy.device),
        empty_vector(b_shape[0], dy.device),
    )


def zero_maxima(dy: Tensor, want_tokens: bool, want_channels: bool) -> tuple[Tensor, int]:
    """Zeros for the bits of the maxima of tokens and then of channels, int32, and the place of the first channel.

    Channels start at a multiple of 16, as the memory of a tensor would.
    """
    rows, columns = dy.shape
    first_channel = ceil_div(rows, 16) * 16 if want_tokens else 0
    length = first_channel + (columns if want_channels else 0)
    return torch.zeros(length, dtype=torch.int32, device=dy.device), first_channel


def maxima_grid(dy: Tensor, block_rows: int, strips: int) -> tuple[int, int, int]:
    """(Strips of columns, spans of rows, rows of a span) of a kernel that makes maxima of ``dy``."""
    rows = dy.shape[0]
    spans = ceil_div(rows, block_rows)
    if dy.is_cuda:  # about sixteen programs a multiprocessor: few atomic operations, and no multiprocessor is idle
        spans = min(spans, max(1, 16 * multiprocessors(dy.device.index) // strips))
    span = ceil_div(ceil_div(rows, spans), block_rows) * block_rows
    return strips, ceil_div(rows, span), span


def round_to(
    outputs: tuple[Tensor, Tensor, Tensor, Tensor], dy: Tensor, row_scale: Tensor, token_scale: Tensor,
    maxima: Tensor, first_channel: int, seed: Tensor, stream: int, want_tokens: bool, want_channels: bool,
) -> None:  # fmt: skip
    """Writes scales and codes to ``outputs``, given the bits of the maxima, which are overwritten."""
    rows, columns = dy.shape
    a, sa, b, sb = outputs
    if len(maxima) > 0:
        numbers = (rows if want_tokens else 0, columns if want_channels else 0, first_channel)
        _scales((ceil_div(len(maxima), 1024), 1, 1), (maxima, sa, sb), numbers, (1024,))
    if rows > 0:
        octets, block_columns = 16, 64
        _round(
            (ceil_div(rows, 8 * octets) * ceil_div(columns, block_columns), 1, 1),
            (dy, row_scale, token_scale, maxima, seed, a, b),
            (rows, columns, dy.stride(0), a.stride(0), b.stride(0), first_channel, stream),
            (want_tokens, want_channels, octets, block_columns, not interpreting()),
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
    require(NEEDS, dy)
    if dy.stride(1) != 1:
        dy = dy.contiguous()
    rows, columns = dy.shape
    outputs = outputs_for(dy, want_tokens, want_channels)
    maxima, first_channel = zero_maxima(dy, want_tokens, want_channels)
    block_rows, block_columns = 8, 256
    if rows > 0:
        strips, spans, span = maxima_grid(dy, block_rows, ceil_div(columns, block_columns))
        _maxima(
            (strips, spans, 1),
            (dy, row_scale, token_scale, maxima),
            (rows, columns, dy.stride(0), first_channel, span),
            (want_tokens, want_channels, block_rows, block_columns),
        )
    round_to(outputs, dy, row_scale, token_scale, maxima, first_channel, seed, stream, want_tokens, want_channels)
    return outputs


@kernel_fake("quantize_gradient")
def _(dy: Tensor, want_tokens: bool, want_channels: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return outputs_for(dy, want_tokens, want_channels)


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
        row_scale: gamma of each row of the weight, float32 ``[channels]``.
        token_scale: The scales of the quantised activations, float32 ``[tokens]``.
        seed: One int64 on the device, of any value. A captured or compiled graph gets a new seed when the tensor is
            overwritten.
        stream: A number that sets apart layers which share a seed, 0 to 2^31 - 1.
        want_tokens: Whether to make ``tokens`` (for dX).
        want_channels: Whether to make ``channels`` (for dW).

    Returns:
        See :class:`QuantizedGradient`; equal bit for bit to ``quantize_gradient_reference``.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If there is no GPU.
    """
    check_gradient(dy, row_scale, token_scale, seed, stream)
    args = (dy, row_scale, token_scale, seed, stream, want_tokens, want_channels)
    return QuantizedGradient(*torch.ops.sbn_kernels.quantize_gradient(*args))
