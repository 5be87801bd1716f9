"""The sum over K in parts, for few tokens and few output features: how many parts, and the kernel that adds them.

With at most 64 tokens ``hopper_gemm`` has one program for each 128 output features, and each walks all of K: 12
programs for 8960 -> 1536, on 132 multiprocessors, bound by the latency of their steps. Split, every program walks a
part of K and leaves its int32 sums in a workspace ``[splits, rows, tokens]``; a second kernel adds and scales them.
The sums are exact whatever their order, and scaled as in one piece: the same bits. Nothing waits for the host.

A second launch is reckoned at 2 microseconds, so only long sums are split. In its place the last program of each panel
could add the parts; that is a fence, a round trip of an atomic and all parts read by 12 programs instead of 192: hardly
less, and counters to keep. Nor is the decode kernel widened: each 16 rows read all tokens anew (here, at 64 tokens,
55 MB for 3.4 MB of weights), and with 64 rows a program it had 24 programs and would need this split as well.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.common.integers import ceil_div, next_power_of_2
from sbn_kernels.common.packing import K_STEP, PANEL
from sbn_kernels.runtime.launch import Launcher

MOST_TOKENS = 64
MOST_SPLITS = 16
_RESIDENT = 2  # programs that fit a multiprocessor
_ROWS = 8
# Costs in k128 steps of a program: 0.17 microseconds each, the slope of the 2:4 figures over K in results/decode.csv.
# For 8960 -> 1536, 11008 -> 2048 and 4864 -> 896 at 8 to 64 tokens the parts that follow take 4 to 10 microseconds,
# one piece 9 to 25. Where there are more features (14336 -> 4096, 8192 -> 8192) it is the model's word alone.
_LAUNCH = 12
_BYTES_A_STEP = 0.17e-6 * 4e12


def split_tile(tokens: int) -> int:
    """Tokens a program has room for: all of them. Comparisons only, for ``torch.compile``."""
    return 16 if tokens <= 16 else 32 if tokens <= 32 else 64


def choose_splits(tokens: int, rows: int, columns: int, processors: int) -> int:
    """Parts of the sum over ``columns``; 1: in one piece. For either layout, with the steps of 2:4.

    One piece where panels of 128 rows alone occupy more than half of the processors, or where a second launch costs
    more than the split saves. Otherwise the number at which steps a part, falling with it, and traffic of the parts,
    rising with it, are equal: the least of their sum.
    """
    panels, steps = ceil_div(rows, PANEL), ceil_div(columns, K_STEP)
    if tokens > MOST_TOKENS or 2 * panels > processors:
        return 1
    part = 8 * panels * PANEL * split_tile(tokens) / _BYTES_A_STEP  # written and read once, 4 bytes each
    best = int(math.sqrt(steps / part))
    splits, _ = whole_parts(steps, max(1, min(best, MOST_SPLITS, _RESIDENT * processors // panels)))
    saved = steps - ceil_div(steps, splits) - part * splits
    return splits if saved >= _LAUNCH else 1


def whole_parts(steps: int, splits: int) -> tuple[int, int]:
    """(parts, steps a part) for at most ``splits`` parts of which none is empty."""
    per_split = ceil_div(steps, splits)
    return ceil_div(steps, per_split), per_split


@triton.jit(do_not_specialize=("tokens", "splits"))
def add_splits_kernel(
    part_pointer, y_pointer, scale_pointer, row_scale_pointer, bias_pointer, tokens, features, splits, part_size,
    S: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, BT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """y [tokens, features] = (sum of int32 part [splits, rows, BT]) * scale[token] (* row_scale[row]) (+ bias[row]).

    R rows a program, at most S parts, over threads: the assembler makes a thread that adds part after part wait for
    two loads at a time, even in an unrolled loop.
    """
    split = tl.arange(0, S)
    row = tl.program_id(0) * R + tl.arange(0, R)
    token = tl.arange(0, BT)
    # first, so that they do not wait for the parts
    factor = tl.load(scale_pointer + token, mask=token < tokens, other=0.0)[None, :]
    if ROWS:
        factor = factor * tl.load(row_scale_pointer + row, mask=row < features, other=0.0)[:, None]
    if BIAS:
        bias = tl.load(bias_pointer + row, mask=row < features, other=0.0).to(tl.float32)
    where = (
        part_pointer + split.to(tl.int64)[:, None, None] * part_size + row[None, :, None] * BT + token[None, None, :]
    )
    total = tl.sum(tl.load(where, mask=(split < splits)[:, None, None], other=0), axis=0)
    y = total.to(tl.float32) * factor
    if BIAS:
        y += bias[:, None]
    target = y_pointer + token.to(tl.int64)[None, :] * features + row[:, None]
    tl.store(target, y.to(y_pointer.dtype.element_ty), mask=(row < features)[:, None] & (token < tokens)[None, :])


_add_splits = Launcher(add_splits_kernel, enable_fp_fusion=False)


def add_splits(parts: Tensor, scale: Tensor, row_scale: Tensor | None, bias: Tensor | None, y: Tensor) -> Tensor:
    """Fills ``y [tokens, features]`` from int32 ``parts [splits, whole panels of rows, tile]``; returns it."""
    splits, rows, tile = parts.shape
    most = next_power_of_2(splits)
    of_rows = [scale if vector is None else vector.contiguous() for vector in (row_scale, bias)]
    _add_splits(
        (ceil_div(y.shape[1], _ROWS), 1, 1),
        (parts, y, scale.contiguous(), *of_rows),
        (*y.shape, splits, rows * tile),
        (most, row_scale is not None, bias is not None, tile, _ROWS),
        num_warps=min(16, max(1, most * tile // 32)),
    )
    return y
