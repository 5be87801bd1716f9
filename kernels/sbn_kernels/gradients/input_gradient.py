"""The gradient of a layer's input from int8 factors: the forward's kernels, with the transposed weight."""

from __future__ import annotations

import torch
from torch import Tensor

from sbn_kernels.gemm.portable import int8_gemm
from sbn_kernels.gemm.sm90.gemm import ternary_gemm


def input_gradient_gemm(
    a8: Tensor,
    scale: Tensor,
    weight_t: Tensor,
    in_features: int,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    unit_scale: Tensor | None = None,
) -> Tensor:
    """Computes ``dX = scale * (a8 @ T)``.

    Args:
        a8: int8 ``[tokens, out_features]``: ``QuantizedGradient.tokens``.
        scale: float32 ``[tokens]``.
        weight_t: T transposed. Either the int32 words of :func:`~sbn_kernels.gradients.transpose.pack_transposed`
            (Hopper, Triton >= 3.9), or int8 codes ``[in_features, out_features]`` (sm_80 and later).
        in_features: The number of columns of T.
        out_dtype: bfloat16, float16 or float32.
        unit_scale: float32 ones ``[in_features]``, if the caller has some: saves a small launch. Only with int8 codes,
            because the kernel for packed words needs none.

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
