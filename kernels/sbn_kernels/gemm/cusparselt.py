"""2:4 int8 product through cuSPARSELt, called by torch's own ops: for sparse GPUs where ``sparse_gemm`` does not run.

cuSPARSELt multiplies, and a Triton kernel applies the scales, because cuSPARSELt knows no scale a token. The product is
taken as int32: bfloat16 would round sums above 256 before they are scaled. The price is another pass over the product.

The demands of torch's binding are met here: contiguous operands, in_features and out_features that are multiples of 32,
and tokens padded to a multiple of 16 (the binding refuses one token). The binding rebuilds its plan at every call,
about 0.3 ms of host time, which hides behind the GPU only for large shapes or in a CUDA graph. An algorithm that
cuSPARSELt's search returns can be wrong (reported on A100), so ``check_cusparselt`` compares with the dense product
before a layer is switched to cuSPARSELt.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.common.buffers import contiguous
from sbn_kernels.common.checks import check_gemm_arguments
from sbn_kernels.common.integers import ceil_div
from sbn_kernels.gemm.registry import Product, register
from sbn_kernels.runtime.capability import Needs, require
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

NEEDS = Needs("cusparselt", cusparselt=True)


@triton.jit
def scale_kernel(
    acc_pointer, y_pointer, scale_pointer, row_scale_pointer, bias_pointer, tokens, features,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y [tokens, features] = acc int32 [>= tokens, features] * scale[token] * row_scale[feature] (+ bias)."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (token < tokens)[:, None] & (feature < features)[None, :]
    where = token.to(tl.int64)[:, None] * features + feature[None, :]
    scale = tl.load(scale_pointer + token, mask=token < tokens, other=0.0)
    gamma = tl.load(row_scale_pointer + feature, mask=feature < features, other=0.0)
    y = tl.load(acc_pointer + where, mask=inside, other=0).to(tl.float32) * (scale[:, None] * gamma[None, :])
    if BIAS:
        y += tl.load(bias_pointer + feature, mask=feature < features, other=0.0).to(tl.float32)[None, :]
    tl.store(y_pointer + where, y.to(y_pointer.dtype.element_ty), mask=inside)


def scale_accumulator(
    acc: Tensor, scale: Tensor, row_scale: Tensor, bias: Tensor | None, tokens: int, out_dtype: torch.dtype
) -> Tensor:
    """Scales the first ``tokens`` rows of an int32 product ``[rows, features]``; see ``scale_kernel``."""
    features = acc.shape[1]
    y = torch.empty((tokens, features), dtype=out_dtype, device=acc.device)
    rows, columns = 4, 1024
    scale_kernel[(ceil_div(tokens, rows), ceil_div(features, columns))](
        acc, y, *contiguous(scale, row_scale, scale if bias is None else bias), tokens, features,
        BIAS=bias is not None, ROWS=rows, COLUMNS=columns, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def compress24(codes: Tensor) -> Tensor:
    """Compresses int8 codes ``[out, in]`` with at most 2 non-zeros in every 4 to cuSPARSELt's opaque form.

    Raises:
        ValueError: If ``out`` or ``in`` is not a multiple of 32.
        UnsupportedError: If torch has no cuSPARSELt or the GPU no sparse tensor core.
    """
    require(NEEDS, codes)
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.shape[0] % 32 or codes.shape[1] % 32:
        raise ValueError(f"cuSPARSELt needs int8 [32 a, 32 b] codes, not {codes.dtype} {list(codes.shape)}")
    compressed: Tensor = torch._cslt_compress(codes.contiguous())
    return compressed


@kernel_op("cusparselt_gemm")
def _cusparselt_gemm(
    x8: Tensor,
    scale: Tensor,
    compressed: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    out_dtype: torch.dtype,
    alg_id: int,
) -> Tensor:
    require(NEEDS, x8)
    tokens, columns = x8.shape
    if tokens == 0:
        return torch.empty((0, out_features), dtype=out_dtype, device=x8.device)
    padded = ceil_div(tokens, 16) * 16
    if padded != tokens or not x8.is_contiguous():
        full = torch.zeros((padded, columns), dtype=torch.int8, device=x8.device)
        full[:tokens] = x8
        x8 = full
    acc = torch._cslt_sparse_mm(compressed, x8.t(), out_dtype=torch.int32, transpose_result=True, alg_id=alg_id)
    return scale_accumulator(acc, scale, row_scale, bias, tokens, out_dtype)


@kernel_fake("cusparselt_gemm")
def _(x8: Tensor, out_features: int, out_dtype: torch.dtype) -> Tensor:
    return torch.empty((x8.shape[0], out_features), dtype=out_dtype, device=x8.device)


def cusparselt_gemm(
    x8: Tensor,
    scale: Tensor,
    compressed: Tensor,
    row_scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    alg_id: int = 0,
) -> Tensor:
    """Computes ``y = (x8 @ T^T) * scale * row_scale (+ bias)`` for a weight that :func:`compress24` compressed.

    Args:
        x8: int8 ``[tokens, in_features]``, ``in_features`` a multiple of 32.
        scale: float32 ``[tokens]``.
        compressed: The result of :func:`compress24`.
        row_scale: float32 ``[out_features]``.
        bias: ``[out_features]``, any float dtype, or None.
        out_dtype: bfloat16, float16 or float32.
        alg_id: The number of the cuSPARSELt algorithm; 0 is cuSPARSELt's default.

    Returns:
        ``[tokens, out_features]``.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If torch has no cuSPARSELt or the GPU no sparse tensor core.
    """
    out_features = row_scale.shape[0]
    check_gemm_arguments(x8, scale, row_scale, bias, out_features, out_dtype)
    if x8.shape[1] % 32 or out_features % 32:
        raise ValueError(f"cuSPARSELt needs multiples of 32, not a weight of [{out_features}, {x8.shape[1]}]")
    args = (x8, scale, compressed, row_scale, bias, out_features, out_dtype, alg_id)
    result: Tensor = torch.ops.sbn_kernels.cusparselt_gemm(*args)
    return result


def check_cusparselt(codes: Tensor, tokens: int = 256, alg_id: int = 0, seed: int = 0) -> bool:
    """Compares cuSPARSELt's product with the dense one, on random tokens of the full int8 range.

    The function waits for the GPU, and is meant for the start of a run.

    Args:
        codes: int8 ``[out, in]`` with at most 2 non-zeros in every 4.
        tokens: The number of tokens to test with.
        alg_id: The number of the algorithm to test.
        seed: The seed of the random tokens.

    Returns:
        Whether the two products are equal.
    """
    generator = torch.Generator(device=codes.device).manual_seed(seed)
    shape, device = (tokens, codes.shape[1]), codes.device
    x8 = torch.randint(-128, 128, shape, generator=generator, device=device, dtype=torch.int8)
    one = torch.ones(1, device=device)
    scale, row_scale = one.expand(tokens).contiguous(), one.expand(codes.shape[0]).contiguous()
    y = cusparselt_gemm(x8, scale, compress24(codes), row_scale, out_dtype=torch.float32, alg_id=alg_id)
    return torch.equal(y.double(), x8.double() @ codes.double().t())


def _multiply(
    x8: Tensor,
    scale: Tensor,
    weight: Tensor,
    row_scale: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    return cusparselt_gemm(x8, scale, weight, row_scale, bias, out_dtype)


register(
    Product(
        name="cusparselt",
        backend="sparse",
        needs=NEEDS,
        form="cusparselt",
        multiply=_multiply,
        pack=compress24,
        pattern=(2, 4),
        multiple_of=32,
        for_packed_layers=False,  # its compressed form holds 5 bits a weight, and no kernel for few tokens reads it
        denser="portable",
    )
)
