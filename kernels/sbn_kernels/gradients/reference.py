"""The backward of a ternary layer on int8, in plain PyTorch: formulas, and what every kernel here is tested against.

Needs no Triton. Forward: ``y[m, n] = s[m] g[n] sum_k x8[m, k] T[n, k]``, where ``x8`` and ``T`` are exact integers,
``s`` is one scale a token and ``g`` is gamma of each row. Its straight-through gradients are ``dX = (dy g) T`` and
``dW = (dy s)^T x8``. An int8 product needs one scale a row of either factor, so ``dy g`` is quantised a token and
``dy s`` a channel; ``dy`` is the only tensor that is rounded::

    dX[m, k] = sa[m] sum_n a8[m, n] T[n, k]        E[sa a8] = dy g
    dW[n, k] = sb[n] sum_m b8[m, n] x8[m, k]       E[sb b8] = dy s

Both products are exact, so both are unbiased estimates of the straight-through gradients.

Stochastic rounding (Gupta et al., arXiv 1502.02551) works in fixed point with 2^15 parts of a step:
``q = floor((round(2^15 v / s) + draw) / 2^15)``, where ``draw`` is uniform in 0 .. 2^15 - 1. The mean of ``q`` is
exactly the value rounded to 2^-15 of a step, the precision that float32 has at the row's maximum. The scale is the
maximum over ``127 - 2^-14``, so no draw leaves [-127, 127] and nothing needs clamping.

Draws come from Philox-4x32 with 7 rounds (Salmon et al., SC 2011; passes BigCrush), keyed by the seed and counted by
(channel, token // 8, stream): the same bits whatever the launch. The low and the high 15 bits of a word serve two
tokens. ``a8`` and ``b8`` share the draw of an element: each is unbiased, and no gradient multiplies one by the other.

A NaN or an infinity in ``dy`` makes the scale of its token and of its channel NaN or infinite, so the gradients show
it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sbn_kernels.common.checks import FLOAT_DTYPES, check_scale, refuse_gradients
from sbn_kernels.common.integers import ceil_div
from sbn_kernels.common.philox import philox

LEVELS = 127 * 2**15 - 2
SMALLEST = 1e-30
ROUNDS = 7


class QuantizedGradient(NamedTuple):
    """Result of ``quantize_gradient``. Tensors that were not asked for are empty.

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


def check_gradient(dy: Tensor, row_scale: Tensor, token_scale: Tensor, seed: Tensor, stream: int) -> None:
    """Checks the arguments of :func:`quantize_gradient_reference` and of its kernel.

    Raises:
        ValueError: If an argument does not fit.
    """
    refuse_gradients(dy, row_scale, token_scale)
    if dy.dim() != 2 or dy.shape[1] == 0 or dy.dtype not in FLOAT_DTYPES:
        shape = list(dy.shape)
        raise ValueError(f"dy must be float32, bfloat16 or float16 [tokens, channels > 0], not {dy.dtype} {shape}")
    check_scale("row_scale", row_scale, dy.shape[1])
    check_scale("token_scale", token_scale, dy.shape[0])
    check_seed(seed, stream, dy.device)


def check_seed(seed: Tensor, stream: int, device: torch.device) -> None:
    """Checks the seed and the stream of stochastic rounding.

    Raises:
        ValueError: If one of them does not fit.
    """
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(f"seed must be one int64 on {device}, not {seed.dtype} {list(seed.shape)} on {seed.device}")
    if not 0 <= stream < 2**31:
        raise ValueError(f"stream must be in 0 .. 2^31 - 1, not {stream}")


def gradient_draws(tokens: int, channels: int, seed: Tensor, stream: int = 0) -> Tensor:
    """Makes the draws of the stochastic rounding: int64 in 0 .. 2^15 - 1, ``[tokens, channels]``."""
    channel = torch.arange(channels, device=seed.device)[None, :]
    octet = torch.arange(ceil_div(tokens, 8), device=seed.device)[:, None]
    whole = torch.zeros(octet.shape[0], channels, dtype=torch.int64, device=seed.device)
    words = torch.stack(philox((channel + whole, octet + whole, whole + stream, whole), seed.reshape(()), ROUNDS), 1)
    return torch.stack([words & 0x7FFF, words >> 17], 2).flatten(0, 2)[:tokens]


def quantize_gradient_reference(
    dy: Tensor, row_scale: Tensor, token_scale: Tensor, seed: Tensor, stream: int = 0
) -> QuantizedGradient:
    """Computes what ``quantize_gradient`` computes, bit for bit, on any device.

    Where the scale of a token or of a channel is not finite, its codes mean nothing.
    """
    check_gradient(dy, row_scale, token_scale, seed, stream)

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


def input_gradient_reference(a8: Tensor, scale: Tensor, codes: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``dX = scale * (a8 @ T)`` with an exact sum.

    Args:
        a8: int8 ``[tokens, out_features]``.
        scale: float32 ``[tokens]``.
        codes: int8 ``[out_features, in_features]``.
        out_dtype: The dtype of the result.

    Returns:
        ``[tokens, in_features]``.
    """
    return ((a8.double() @ codes.double()).float() * scale[:, None]).to(out_dtype)


def weight_gradient_reference(b8t: Tensor, scale: Tensor, x8: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``dW = scale * (b8t @ x8)`` with an exact sum.

    Args:
        b8t: int8 ``[out_features, tokens]``.
        scale: float32 ``[out_features]``.
        x8: int8 ``[tokens, in_features]``.
        out_dtype: The dtype of the result.

    Returns:
        ``[out_features, in_features]``.
    """
    return ((b8t.double() @ x8.double()).float() * scale[:, None]).to(out_dtype)


def dequantize_reference(x8: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x8 [tokens, features] * scale [tokens]`` in float32, rounded once to ``dtype``."""
    return (x8.float() * scale[:, None]).to(dtype)


def cross_entropy_rounded_reference(
    logits: Tensor,
    class_scale: Tensor,
    target: Tensor,
    factor: float,
    token_scale: Tensor,
    seed: Tensor,
    stream: int = 0,
) -> tuple[Tensor, QuantizedGradient]:
    """The cross-entropy of each token, and the rounded gradient of the logits.

    Args:
        logits: The logits without the scales of the classes, ``[tokens, classes]``.
        class_scale: The scale of each class, float32 ``[classes]``.
        target: The classes to predict, int64 ``[tokens]``.
        factor: The factor of the gradient ``factor * (softmax - one-hot)``, above 0.
        token_scale: The scale of each token, by which the gradient is multiplied for the product over tokens.
        seed: One int64.
        stream: A number that sets apart parts that share a seed.

    Returns:
        float32 ``[tokens]``, and the gradient as :func:`quantize_gradient_reference` rounds it.
    """
    wide = logits.float() * class_scale
    log_sum = wide.logsumexp(-1, keepdim=True)
    hit = torch.arange(logits.shape[1], device=logits.device) == target.unsqueeze(-1)
    gradient = ((wide - log_sum).exp() - hit.float()) * factor
    loss = (log_sum - wide.gather(-1, target.unsqueeze(-1))).squeeze(-1)
    return loss, quantize_gradient_reference(gradient, class_scale, token_scale, seed, stream)
