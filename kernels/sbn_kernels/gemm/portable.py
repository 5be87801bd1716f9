"""Portable int8 x int8 product with the scales fused, in plain Triton.

For GPUs and versions of Triton that the Gluon kernels cannot use. The kernel runs from sm_80 on and in Triton's
interpreter. It reads int8 ternary codes ``[out, in]``, 8 bits a weight where the packed kernels read 2. The int32 sum
leaves registers once: scaled in float32 in the order of the plain-PyTorch reference, rounded and stored. The tiles are
tuned once for each (tokens rounded up to a power of two, out, in, bias). Tuning cannot run while a CUDA graph is
captured, so call the function once before the capture.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.common.buffers import contiguous
from sbn_kernels.common.checks import check_gemm_arguments
from sbn_kernels.common.integers import ceil_div, next_power_of_2
from sbn_kernels.gemm.registry import Product, register
from sbn_kernels.runtime.capability import Needs, interpreting, require
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

NEEDS = Needs("int8_gemm", interpreter=True)


def _config(tokens: int, features: int, inner: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BM": tokens, "BN": features, "BK": inner}, num_warps=warps, num_stages=stages)


_CONFIGS = [
    _config(128, 256, 128, 8, 3),
    _config(256, 128, 128, 8, 3),
    _config(128, 128, 128, 8, 4),
    _config(128, 128, 64, 4, 4),
    _config(64, 128, 128, 4, 4),
    _config(32, 128, 128, 4, 4),
    _config(16, 64, 256, 4, 4),
]


@triton.jit
def int8_gemm_kernel(
    x_pointer, w_pointer, y_pointer, scale_pointer, row_scale_pointer, bias_pointer,
    tokens, features, inner, x_stride, w_stride, bucket,
    BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y [tokens, features] = (x [tokens, inner] @ w [features, inner]^T) * scale[token] * row_scale[feature] + bias."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(tokens, BM)
    band = 8 * tl.cdiv(
        features, BN
    )  # 8 token tiles share a sweep over the weight, so that tokens and weight stay in L2
    first = program // band * 8
    height = tl.minimum(row_tiles - first, 8)
    token = (first + program % band % height) * BM + tl.arange(0, BM)
    feature = program % band // height * BN + tl.arange(0, BN)
    # rows beyond the end read the last row and are not stored, so the loop needs no mask of rows
    x_row = tl.minimum(token, tokens - 1).to(tl.int64)[:, None] * x_stride
    w_row = tl.minimum(feature, features - 1).to(tl.int64)[None, :] * w_stride
    acc = tl.zeros([BM, BN], tl.int32)
    for start in range(0, inner, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(x_pointer + x_row + k[None, :], mask=k[None, :] < inner, other=0)
        w = tl.load(w_pointer + w_row + k[:, None], mask=k[:, None] < inner, other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
    scale = tl.load(scale_pointer + token, mask=token < tokens, other=0.0)
    gamma = tl.load(row_scale_pointer + feature, mask=feature < features, other=0.0)
    y = acc.to(tl.float32) * (scale[:, None] * gamma[None, :])
    if BIAS:
        y += tl.load(bias_pointer + feature, mask=feature < features, other=0.0).to(tl.float32)[None, :]
    where = token.to(tl.int64)[:, None] * features + feature[None, :]
    inside = (token < tokens)[:, None] & (feature < features)[None, :]
    tl.store(y_pointer + where, y.to(y_pointer.dtype.element_ty), mask=inside)


_tuned = triton.autotune(_CONFIGS, key=["bucket", "features", "inner", "BIAS"])(int8_gemm_kernel)


@kernel_op("int8_gemm")
def _int8_gemm(
    x8: Tensor, scale: Tensor, codes: Tensor, row_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    require(NEEDS, x8)
    if x8.stride(1) != 1:
        x8 = x8.contiguous()
    tokens, inner = x8.shape
    features = codes.shape[0]
    y = torch.empty((tokens, features), dtype=out_dtype, device=x8.device)
    if tokens == 0:
        return y
    scale, row_scale, some_bias = contiguous(scale, row_scale, scale if bias is None else bias)
    args = (
        x8, codes, y, scale, row_scale, some_bias, tokens, features, inner, x8.stride(0),
        codes.stride(0), next_power_of_2(tokens),
    )  # fmt: skip
    if interpreting():
        grid = (ceil_div(tokens, 32) * ceil_div(features, 64),)
        int8_gemm_kernel[grid](*args, BIAS=bias is not None, BM=32, BN=64, BK=64)
    else:
        _tuned[lambda meta: (ceil_div(tokens, meta["BM"]) * ceil_div(features, meta["BN"]),)](
            *args, BIAS=bias is not None, enable_fp_fusion=False
        )
    return y


@kernel_fake("int8_gemm")
def _(x8: Tensor, codes: Tensor, out_dtype: torch.dtype) -> Tensor:
    return torch.empty((x8.shape[0], codes.shape[0]), dtype=out_dtype, device=x8.device)


def int8_gemm(
    x8: Tensor,
    scale: Tensor,
    codes: Tensor,
    row_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Computes ``y = (x8 @ codes^T) * scale * row_scale (+ bias)`` on dense int8 tensor cores (sm_80 and later).

    Args:
        x8: int8 ``[tokens, in_features]``.
        scale: float32 ``[tokens]``.
        codes: int8 ``[out_features, in_features]``.
        row_scale: float32 ``[out_features]``.
        bias: ``[out_features]``, any float dtype, or None.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        ``[tokens, out_features]``.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If there is no GPU of compute capability 8.0 or later.
    """
    if codes.dim() != 2 or codes.dtype != torch.int8 or codes.shape[1] != x8.shape[-1] or codes.stride(1) != 1:
        raise ValueError(f"codes must be int8 [out_features, {x8.shape[-1]}], not {codes.dtype} {list(codes.shape)}")
    check_gemm_arguments(x8, scale, row_scale, bias, codes.shape[0], out_dtype)
    result: Tensor = torch.ops.sbn_kernels.int8_gemm(x8, scale, codes, row_scale, bias, out_dtype)
    return result


def _multiply(
    x8: Tensor,
    scale: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    return int8_gemm(x8, scale, weight, row_scale, bias, out_dtype)


register(
    Product(
        name="portable", backend="int8", needs=NEEDS, form="codes", multiply=_multiply, pack=torch.Tensor.contiguous
    )
)
