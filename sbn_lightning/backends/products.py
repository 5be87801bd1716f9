"""The product of a ternary layer by the kernel that serves it, and quantisation as a graph or as a kernel."""

from __future__ import annotations

import sbn_kernels as sk
import torch
from sbn_kernels.gemm import registry
from torch import Tensor

from sbn_lightning.sparsity.ternary import quantize_activations


def multiply(
    x8: Tensor,
    scale: Tensor,
    codes: Tensor | None,
    row_scale: Tensor,
    packed: Tensor | None,
    form: str,
    kernel: str,
    dtype: torch.dtype,
) -> Tensor:
    """``(x8 @ codes^T) * scale * row_scale`` by the kernel that serves this number of tokens.

    Args:
        x8: int8 ``[tokens, in]``.
        scale: float32 ``[tokens]``.
        codes: int8 ``[out, in]``; None if ``kernel`` reads ``packed``.
        row_scale: float32 ``[out]``.
        packed: The weight in the form ``form``; None: only the codes exist.
        form: The form of ``packed``.
        kernel: The name of the kernel for many tokens.
        dtype: The dtype of the result.

    Returns:
        ``[tokens, out]``.
    """
    tokens, in_features = x8.shape
    out_features = row_scale.shape[0]
    many = registry.product(kernel)
    if packed is not None:
        chosen = kernel if many.form == form else None
        served = registry.serving(form, tokens, out_features, in_features, x8.device.index, chosen)
        if served is not None:
            return served.multiply(x8, scale, packed, row_scale, out_features, None, dtype)
    assert codes is not None
    return many.multiply(x8, scale, codes, row_scale, out_features, None, dtype)


def quantize(tokens: Tensor, bits: int, magnitude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise tokens: by a kernel, or inside ``torch.compile`` in plain PyTorch, which the compiler fuses.

    Args:
        tokens: ``[tokens, in]``.
        bits: 8 or 4.
        magnitude: The magnitude of the whole tokens, ``[tokens, 1]``, if ``tokens`` holds slices. Plain PyTorch
            quantises slices, because the kernel has no place for a magnitude.

    Returns:
        int8 ``[tokens, in]`` and the scales, float32 ``[tokens]``.
    """
    if magnitude is None and not torch.compiler.is_compiling():
        return sk.quantize_tokens(tokens, bits)
    x8, scale = quantize_activations(tokens, bits, magnitude)
    return x8, scale.squeeze(-1)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``codes [rows, columns] * scale [rows]`` in ``dtype``."""
    if not torch.compiler.is_compiling():
        return sk.dequantize_tokens(codes, scale, dtype)
    return (codes * scale.unsqueeze(-1)).to(dtype)
