"""Products of a few tokens in plain PyTorch: with packed ternary words, and with int8 rows. Needs no Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from sbn_kernels.common.packing import unpack
from sbn_kernels.gemm.reference import gemm_reference


def decode_reference(
    x8: Tensor,
    scale: Tensor,
    packed: Tensor,
    row_scale: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    layout: str = "dense",
) -> Tensor:
    """``(x8 @ T^T) * scale * row_scale (+ bias)`` from packed words.

    Args:
        x8: int8 ``[tokens, in_features]``.
        scale: float32 ``[tokens]``.
        packed: int32 words, see :mod:`sbn_kernels.common.packing`.
        row_scale: float32 ``[out_features]``.
        out_features: The number of rows of the weight.
        bias: ``[out_features]`` or None.
        out_dtype: The dtype of the result.
        layout: The layout of ``packed``: ``"dense"`` or ``"sparse24"``.

    Returns:
        ``[tokens, out_features]``.
    """
    codes = unpack(packed, out_features, x8.shape[1], layout)
    return gemm_reference(x8, scale, codes, row_scale, bias, out_dtype)


def int8_rows_reference(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """``(x @ codes^T) * scale`` with float32 sums; see :func:`sbn_kernels.decode.head.int8_rows`.

    Args:
        x: ``[tokens, in_features]``.
        codes: int8 ``[out_features, in_features]``.
        scale: float32 ``[out_features]``.

    Returns:
        ``[tokens, out_features]`` in the dtype of ``x``.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return ((x.to(wide) @ codes.to(wide).t()) * scale).to(x.dtype)
