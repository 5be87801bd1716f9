"""The products of a mixture of experts in one launch: int8 tokens by 2-bit weights, in plain Triton.

Tokens come sorted by expert. A table on the device says for each tile of tokens which expert's weight multiplies it, so
the host never learns how many tokens an expert has, and a CUDA graph can hold the launch. Tiles whose tokens belong to
no expert give zeros.

The weight of all experts is one matrix of rows. A row holds 128 columns in 32 bytes: bits ``2 q`` and ``2 q + 1`` of
byte ``j`` are the code of column ``32 q + j``, plus 1. So one load of bytes serves four products of 32 columns, and no
code moves to another thread.

The kernel runs from sm_80 on and in Triton's interpreter. Nobody has timed it on a GPU. The size of a tile follows from
the mean number of tokens of an expert; the other sizes are guesses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from sbn_kernels.common.buffers import contiguous
from sbn_kernels.common.checks import check_gemm_arguments
from sbn_kernels.common.integers import ceil_div
from sbn_kernels.gemm.registry import Grouped, register
from sbn_kernels.runtime.capability import Needs, interpreting, require
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

NEEDS = Needs("grouped_gemm", interpreter=True)
COLUMNS = 128  # Columns of a block of bytes.


@triton.jit
def grouped_gemm_kernel(
    x_pointer, packed_pointer, y_pointer, scale_pointer, row_scale_pointer, tiles_pointer,
    experts, features, inner, x_stride, w_stride,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y [tokens, features] = (x [tokens, inner] @ w[expert of the token]^T) * scale[token] * row_scale[row]."""
    tile = tl.program_id(0)
    expert = tl.load(tiles_pointer + 3 * tile)
    start = tl.load(tiles_pointer + 3 * tile + 1)
    stop = tl.load(tiles_pointer + 3 * tile + 2)
    if start < stop:
        token = start + tl.arange(0, BM)
        feature = tl.program_id(1) * BN + tl.arange(0, BN)
        # Rows beyond the end read the last row and are not stored, so the loop needs no mask of rows.
        x_row = tl.minimum(token, stop - 1).to(tl.int64)[:, None] * x_stride
        row = tl.minimum(expert, experts - 1) * features + tl.minimum(feature, features - 1)
        w_row = row.to(tl.int64)[None, :] * w_stride
        acc = tl.zeros([BM, BN], tl.int32)
        # The group behind the last expert has no weight.
        end = tl.where(expert < experts, inner, 0)
        for block in range(0, end, 128):
            column = tl.arange(0, 32)
            quads = tl.load(packed_pointer + w_row + block // 4 + column[:, None])
            for quarter in tl.static_range(4):
                k = block + 32 * quarter + column
                x = tl.load(x_pointer + x_row + k[None, :], mask=k[None, :] < inner, other=0)
                w = ((quads >> (2 * quarter)) & 3).to(tl.int8) - 1
                acc = tl.dot(x, w.to(tl.int8), acc, out_dtype=tl.int32)
        scale = tl.load(scale_pointer + token, mask=token < stop, other=0.0)
        gamma = tl.load(row_scale_pointer + row)
        y = acc.to(tl.float32) * (scale[:, None] * gamma[None, :])
        where = token.to(tl.int64)[:, None] * features + feature[None, :]
        inside = (token < stop)[:, None] & (feature < features)[None, :]
        tl.store(y_pointer + where, y.to(y_pointer.dtype.element_ty), mask=inside)


def pack_grouped(codes: Tensor) -> Tensor:
    """Pack codes into the form that the kernel reads.

    Args:
        codes: int8 ``[rows, in_features]`` in {-1, 0, 1}, the rows of all experts one after the other.

    Returns:
        uint8 ``[rows, 32 * ceil(in_features / 128)]``. Columns beyond the end have the code 0.
    """
    padded = F.pad(codes, (0, -codes.shape[1] % COLUMNS))
    quarters = (padded + 1).to(torch.uint8).unflatten(1, (-1, 4, COLUMNS // 4))
    packed = quarters[:, :, 0] | quarters[:, :, 1] << 2 | quarters[:, :, 2] << 4 | quarters[:, :, 3] << 6
    return packed.flatten(1).contiguous()


def tile_table(counts: Tensor, tokens: int, size: int) -> Tensor:
    """Say which expert each tile of tokens belongs to. Nothing here waits for the device.

    Args:
        counts: The number of tokens of each expert, int64 ``[experts]``.
        tokens: The number of all tokens. Those after the last expert's make up one more group.
        size: The most tokens of a tile.

    Returns:
        int32 ``[tiles, 3]``: the expert, the first token, and the token after the last one of the group. The number of
        tiles is the most that can be needed; a tile that is not needed has its first token at the end or after it.
    """
    groups = torch.cat([counts, (tokens - counts.sum()).unsqueeze(0)])
    stops, tiles = groups.cumsum(0), (groups + size - 1) // size
    last = tiles.cumsum(0)
    number = torch.arange(tokens // size + len(groups), device=counts.device)
    group = torch.searchsorted(last, number, right=True).clamp(max=len(counts))
    start = stops[group] - groups[group] + (number - last[group] + tiles[group]) * size
    return torch.stack([group, start, stops[group]], 1).to(torch.int32)


def _sizes(tokens: int, experts: int) -> tuple[int, int, int]:
    """Tokens and features of a tile, and warps."""
    if interpreting():
        return 16, 64, 4
    mean = ceil_div(tokens, experts)
    if mean <= 16:
        return 16, 64, 4
    return (32, 128, 4) if mean <= 32 else (64, 128, 4) if mean <= 256 else (128, 128, 8)


@kernel_op("grouped_gemm")
def _grouped_gemm(
    x8: Tensor, scale: Tensor, packed: Tensor, row_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    require(NEEDS, x8)
    if x8.stride(1) != 1:
        x8 = x8.contiguous()
    (tokens, inner), experts = x8.shape, counts.shape[0]
    features = packed.shape[0] // experts
    y = torch.empty((tokens, features), dtype=out_dtype, device=x8.device)
    if tokens == 0:
        return y
    scale, row_scale = contiguous(scale, row_scale)
    rows, columns, warps = _sizes(tokens, experts)
    tiles = tile_table(counts, tokens, rows)
    grouped_gemm_kernel[(tiles.shape[0], ceil_div(features, columns))](
        x8, packed, y, scale, row_scale, tiles, experts, features, inner, x8.stride(0), packed.stride(0),
        BM=rows, BN=columns, num_warps=warps, num_stages=3, enable_fp_fusion=False,
    )  # fmt: skip
    return y


@kernel_fake("grouped_gemm")
def _(x8: Tensor, packed: Tensor, counts: Tensor, out_dtype: torch.dtype) -> Tensor:
    return torch.empty((x8.shape[0], packed.shape[0] // counts.shape[0]), dtype=out_dtype, device=x8.device)


def grouped_gemm(
    x8: Tensor,
    scale: Tensor,
    packed: Tensor,
    row_scale: Tensor,
    counts: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Computes ``y = (x8 @ T[expert]^T) * scale * row_scale`` for tokens that are sorted by expert.

    Args:
        x8: int8 ``[tokens, in_features]``.
        scale: float32 ``[tokens]``.
        packed: What :func:`pack_grouped` made of the codes of all experts.
        row_scale: gamma of each row of all experts, float32 ``[experts * rows]``.
        counts: The number of tokens of each expert, int64 ``[experts]``. Tokens after the last expert's give zeros.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        ``[tokens, rows]``.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If there is no GPU of compute capability 8.0 or later.
    """
    check_gemm_arguments(x8, scale, None, None, packed.shape[0], out_dtype, may_be_ones=True)
    if counts.dim() != 1 or counts.dtype != torch.int64 or packed.shape[0] % max(counts.shape[0], 1):
        raise ValueError(f"counts must be int64 [experts], not {counts.dtype} {list(counts.shape)}")
    width = COLUMNS // 4 * ceil_div(x8.shape[1], COLUMNS)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != width or packed.stride(1) != 1:
        raise ValueError(f"packed must be uint8 [rows, {width}], not {packed.dtype} {list(packed.shape)}")
    if row_scale.shape != packed.shape[:1] or row_scale.dtype != torch.float32:
        raise ValueError(f"row_scale must be float32 [{packed.shape[0]}], not {row_scale.dtype}")
    result: Tensor = torch.ops.sbn_kernels.grouped_gemm(x8, scale, packed, row_scale, counts, out_dtype)
    return result


register(Grouped(name="grouped", needs=NEEDS, multiply=grouped_gemm, pack=pack_grouped))
