"""The kernels of this folder in plain PyTorch, in float32. Needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from sbn_kernels.quantize.reference import quantize_tokens_reference


def norm_quantize_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, bits: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum with the residual, and the quantised RMSNorm of the sum.

    Args:
        x: ``[tokens, features]``.
        residual: The same shape and dtype; None: nothing is added.
        weight: The weight of the norm, ``[features]``; rounded to the dtype of ``x`` first.
        eps: What is added to the mean square.
        bits: 8 or 4.

    Returns:
        The sum in the dtype of ``x``; int8 codes; their scales, float32 ``[tokens]``; and one over the root of the mean
        square, float32 ``[tokens]``.
    """
    h = x if residual is None else x + residual
    wide = h.float()
    rstd = (wide.square().mean(-1) + eps).rsqrt()
    codes, scale = quantize_tokens_reference(wide * rstd[:, None] * weight.to(x.dtype).float(), bits)
    return h, codes, scale, rstd


def norm_backward_reference(dy: Tensor, h: Tensor, dh: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``h`` and of ``weight`` for ``y = h * rstd * weight``, where ``h`` is used elsewhere, too.

    Args:
        dy: The gradient of ``y``, ``[tokens, features]``.
        h: The input of the norm.
        dh: The gradient of ``h`` from elsewhere.
        weight: The weight of the norm, ``[features]``.
        rstd: One over the root of the mean square, float32 ``[tokens]``.

    Returns:
        ``[tokens, features]`` in the dtype of ``h``, and float32 ``[features]``.
    """
    normed = h.float() * rstd[:, None]
    scaled = dy.float() * weight.to(h.dtype).float()
    dx = rstd[:, None] * (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) + dh.float()
    return dx.to(h.dtype), (dy.float() * normed).sum(0)


def rope_backward_reference(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of queries, keys and values side by side, before queries and keys were rotated.

    Forward: ``q' = q cos + roll(q) sin``, where ``roll`` swaps the two halves of a head; the same for keys.

    Args:
        dq: The gradient of the rotated queries, ``[batch, heads, tokens, size]``.
        dk: The gradient of the rotated keys, ``[batch, key heads, tokens, size]``.
        dv: The gradient of the values, in the shape of ``dk``.
        cos: float32 ``[tokens, size]``.
        sin: float32 ``[tokens, size]``.

    Returns:
        ``[batch, tokens, (heads + 2 key heads) size]`` in the dtype of ``dq``.
    """
    half = dq.shape[-1] // 2

    def back(d: Tensor) -> Tensor:
        wide = d.float()
        return (wide * cos + (wide * sin).roll(half, -1)).to(d.dtype)

    parts = (back(dq), back(dk), dv)
    return torch.cat([part.transpose(1, 2).flatten(2) for part in parts], -1)
