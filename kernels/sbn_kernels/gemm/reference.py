"""The products in plain PyTorch: what every kernel of this folder is tested against. Needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor


def gemm_reference(
    x8: Tensor,
    scale: Tensor,
    codes: Tensor,
    row_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(x8 @ T^T) * scale * row_scale (+ bias)`` with an exact sum, two float32 factors and one rounding.

    Args:
        x8: int8 ``[tokens, in_features]``.
        scale: float32 ``[tokens]``.
        codes: int8 ``[out_features, in_features]``.
        row_scale: float32 ``[out_features]``.
        bias: ``[out_features]`` or None.
        out_dtype: The dtype of the result.

    Returns:
        ``[tokens, out_features]``.
    """
    # float64 holds every integer up to 2^53, so the sum is exact in any order
    y = (x8.double() @ codes.double().t()).float() * (scale[:, None] * row_scale)
    return (y if bias is None else y + bias.float()).to(out_dtype)
