"""A learned factor on gamma: one number for each part of a ternary weight.

BitNet's gamma is a mean of magnitudes, and no gradient reaches it. With a learned factor the layer computes with::

    gamma' = gamma * exp(log_scale)                     log_scale: one number for each part, 0 at the start
    T      = clamp(round(W / gamma), -1, 1) * mask      as without the factor
    d log_scale = gamma' * sum(dW * T)                  over the weights of the part

The last line is the chain rule. Each weight of the product is ``gamma' T``, and ``dW`` is the gradient of the product's
weights, which the backward has computed anyway. So no kernel changes, and no activation is saved for the factor. The
exponential keeps gamma' positive, and a step of an optimiser changes it by a share of itself.

Learned scales of ternary weights: Trained Ternary Quantization (arXiv 1612.01064), LSQ (arXiv 1902.08153). There is one
factor for each matrix and not for each row, because every file format here but the packed one has one scale a matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sbn_lightning.sparsity.ternary import expand_scale


def factor_of_rows(log_scale: Tensor, split_sizes: tuple[int, ...] | None, out_features: int) -> Tensor:
    """Return ``exp(log_scale)`` for each row, ``[out_features]``, in float32 or float64, without a gradient.

    Args:
        log_scale: The logarithm of the factor of each part, ``[parts]``.
        split_sizes: The rows of each part; None means that the weight is one part.
        out_features: The rows of the weight.
    """
    log_scale = log_scale.detach()
    wide = log_scale if log_scale.dtype == torch.float64 else log_scale.float()
    return expand_scale(wide.exp(), split_sizes, out_features)


class ScaledWeight(torch.autograd.Function):
    """The latent weight as it is. Its gradient gives ``log_scale`` a gradient as well."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        log_scale: Tensor,
        codes: Tensor,
        row_scale: Tensor,
        split_sizes: tuple[int, ...] | None,
        share: Tensor | None,
    ) -> Tensor:
        """Return ``weight [out_features, in_features]``.

        ``row_scale`` is gamma' of each row. ``share`` is the share of the weights' rounding that is in effect; None for
        the whole.
        """
        ctx.save_for_backward(log_scale, codes, row_scale, share)
        ctx.split_sizes = split_sizes or (weight.shape[0],)
        return weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        log_scale, codes, row_scale, share = ctx.saved_tensors
        dw = grad_outputs[0]
        d_log_scale = None
        if ctx.needs_input_grad[1]:
            rows = (dw * codes).sum(-1, dtype=row_scale.dtype) * row_scale
            d_log_scale = torch.stack([part.sum() for part in rows.split(ctx.split_sizes)])
            d_log_scale = (d_log_scale if share is None else d_log_scale * share).to(log_scale.dtype)
        return dw if ctx.needs_input_grad[0] else None, d_log_scale, None, None, None, None
