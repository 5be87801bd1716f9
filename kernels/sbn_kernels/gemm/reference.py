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


def grouped_gemm_reference(
    x8: Tensor,
    scale: Tensor,
    codes: Tensor,
    row_scale: Tensor,
    counts: Tensor,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """:func:`gemm_reference` for tokens that are sorted by expert, expert by expert.

    Args:
        x8: int8 ``[tokens, in_features]``.
        scale: float32 ``[tokens]``.
        codes: The codes of all experts, int8 ``[experts * rows, in_features]``.
        row_scale: float32 ``[experts * rows]``.
        counts: The number of tokens of each expert, int64 ``[experts]``. Tokens after the last expert's give zeros.
        out_dtype: The dtype of the result.

    Returns:
        ``[tokens, rows]``.
    """
    experts = counts.shape[0]
    y = torch.zeros(x8.shape[0], codes.shape[0] // experts, dtype=out_dtype, device=x8.device)
    start = 0
    weights = zip(codes.chunk(experts), row_scale.chunk(experts), counts.tolist(), strict=True)
    for own, own_scale, count in weights:
        tokens = slice(start, start + count)
        y[tokens] = gemm_reference(x8[tokens], scale[tokens], own, own_scale, out_dtype=out_dtype)
        start += count
    return y
