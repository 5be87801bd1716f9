"""The product of a few tokens with a matrix of int8 rows, each with a scale: an 8-bit head.

A decode step reads the whole head once. In bfloat16 the head of a 1.5B model has 467 MB, and all its ternary layers
together have 328 MB at 2 bits a weight. Tokens stay as they are. Codes become numbers of the tokens' dtype, which holds
them exactly, so only the rounding of the rows separates the result from that of the unrounded head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.common.buffers import contiguous, with_rows
from sbn_kernels.common.integers import ceil_div, next_power_of_2
from sbn_kernels.runtime.capability import Needs, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

MAX_TOKENS = 64
NEEDS = Needs("8-bit head", interpreter=True)
_ROWS, _COLUMNS = 64, 128


@triton.jit
def int8_rows_kernel(
    x_pointer, codes_pointer, y_pointer, scale_pointer,
    tokens, features, inner, x_stride,
    BT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y [tokens, features] for at most BT tokens, ROWS rows of the matrix a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, BT)
    column = tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, BT], tl.float32)
    for start in range(0, inner, COLUMNS):
        k = start + column
        here = (row < features)[:, None] & (k < inner)[None, :]
        codes = tl.load(codes_pointer + row.to(tl.int64)[:, None] * inner + k[None, :], mask=here, other=0)
        inside = (token < tokens)[None, :] & (k < inner)[:, None]
        x = tl.load(x_pointer + token.to(tl.int64)[None, :] * x_stride + k[:, None], mask=inside, other=0.0)
        acc = tl.dot(codes.to(x.dtype), x, acc, input_precision="ieee")
    scale = tl.load(scale_pointer + row, mask=row < features, other=0.0)
    target = y_pointer + token.to(tl.int64)[None, :] * features + row[:, None]
    inside = (row < features)[:, None] & (token < tokens)[None, :]
    tl.store(target, (acc * scale[:, None]).to(y_pointer.dtype.element_ty), mask=inside)


_launch = Launcher(int8_rows_kernel, enable_fp_fusion=True)


@kernel_op("int8_rows")
def _int8_rows(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    require(NEEDS, x)
    tokens, columns = x.shape
    features = codes.shape[0]
    y = torch.empty((tokens, features), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return y
    codes, scale = contiguous(codes, scale)
    x = with_rows(x)
    _launch(
        (ceil_div(features, _ROWS), 1, 1),
        (x, codes, y, scale),
        (tokens, features, columns, x.stride(0)),
        (max(16, next_power_of_2(tokens)), _ROWS, _COLUMNS),
    )
    return y


@kernel_fake("int8_rows")
def _(x: Tensor, codes: Tensor) -> Tensor:
    return torch.empty((x.shape[0], codes.shape[0]), dtype=x.dtype, device=x.device)


def int8_rows(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Computes ``y = (x @ codes^T) * scale`` for few tokens; sums are float32.

    Args:
        x: The tokens, ``[tokens, in_features]``, at most 64 tokens: bfloat16, float16 or float32.
        codes: The rows of the matrix, int8 ``[out_features, in_features]``.
        scale: The scale of each row, float32 ``[out_features]``.

    Returns:
        ``[tokens, out_features]`` in the dtype of ``x``.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If there is no GPU that can run the kernel.
    """
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"int8_rows takes bfloat16, float16 or float32 tokens, not {x.dtype}")
    if codes.dtype != torch.int8 or x.dim() != 2 or codes.dim() != 2 or x.shape[1] != codes.shape[1]:
        raise ValueError(f"codes {codes.dtype} {list(codes.shape)} do not fit tokens {list(x.shape)}")
    if scale.dtype != torch.float32 or scale.shape != codes.shape[:1]:
        raise ValueError(f"scale is {scale.dtype} {list(scale.shape)}, not float32 [{codes.shape[0]}]")
    if x.shape[0] > MAX_TOKENS:
        raise ValueError(f"int8_rows takes at most {MAX_TOKENS} tokens, not {x.shape[0]}")
    result: Tensor = torch.ops.sbn_kernels.int8_rows(x, codes, scale)
    return result
