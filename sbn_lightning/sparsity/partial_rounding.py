"""The product of a ternary layer whose rounding is only partly in effect, in plain PyTorch.

A pretrained model that is rounded all at once loses what it knows. A warm-up lets the rounding grow instead. With the
share ``a`` of the weights' rounding and the share ``b`` of the tokens' rounding, both from 0 to 1::

    W' = W * mask + a * (gamma * T - W * mask)
    x' = x + b * (s * x8 - x)
    y  = x' @ W'^T
    dW = dy^T @ x'                                      straight-through, as with the whole rounding
    dx = dy @ W'

:mod:`sbn_lightning.sparsity.ternary` defines the other symbols. At ``a = b = 1`` the product is that of the module
there, up to the order of roundings; a layer then uses its backend, and this module is not called. The idea is the
"warm-up quantisation" of Hugging Face's 1.58-bit fine-tuning (huggingface.co/blog/1_58_llm_extreme_quantization).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbn_lightning.sparsity.ternary import StraightThroughLinear, quantize_activations


def partly_rounded_weight(weight: Tensor, mask: Tensor, codes: Tensor, row_scale: Tensor, share: Tensor) -> Tensor:
    """Return ``W * mask + share * (gamma * T - W * mask)``, ``[out_features, in_features]`` in the weight's dtype.

    Args:
        weight: The latent weight, ``[out_features, in_features]``.
        mask: The mask, bool in the shape of ``weight``.
        codes: The ternary codes, int8 in the shape of ``weight``.
        row_scale: gamma of each row, ``[out_features]``.
        share: The share of the rounding that is in effect, a scalar from 0 to 1.
    """
    kept = weight.detach() * mask
    return torch.lerp(kept, (codes * row_scale.unsqueeze(-1)).to(kept.dtype), share.to(kept.dtype))


def partly_rounded_linear(
    x: Tensor,
    weight: Tensor,
    effective: Tensor,
    gradient_mask: Tensor | None,
    activation_bits: int | None,
    share: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Multiply partly rounded tokens with a partly rounded weight.

    Args:
        x: The tokens, ``[..., in_features]``.
        weight: The latent weight, which gets the gradient; only its dtype is read.
        effective: The result of :func:`partly_rounded_weight`.
        gradient_mask: The positions of the weight that get a gradient, bool; None for all.
        activation_bits: The bits of a rounded token, 8 or 4; None leaves tokens as they are.
        share: The share of the tokens' rounding that is in effect, a scalar from 0 to 1.
        dtype: The dtype of the product.

    Returns:
        ``[..., out_features]`` in ``dtype``.
    """
    if activation_bits is not None:
        quantized, scale = quantize_activations(x, activation_bits)
        rounded = (quantized * scale).to(x.dtype)
        x = x + (share.to(x.dtype) * (rounded - x)).detach()
    y: Tensor = StraightThroughLinear.apply(x.to(dtype), weight, effective.to(dtype), gradient_mask)
    return y
