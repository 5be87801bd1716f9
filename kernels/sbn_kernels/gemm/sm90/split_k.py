"""The sum over K in parts, for few tokens and few output features: how many parts, and the kernel that adds them.

With at most 64 tokens the product has one program for each 128 output features, and each walks all of K: 12 programs
for 8960 -> 1536, on 132 multiprocessors, limited by the latency of their steps. Split, every program walks a part of K
and leaves its int32 sums in a workspace ``[splits, rows, tokens]``; a second kernel adds and scales them. The sums are
exact in any order, and scaled as in one piece, so the bits are the same. Nothing waits for the host.

The cost model counts a second launch as 2 microseconds, so only long sums are split. Two other ways were considered:

* The last program of each panel adds the parts. That takes a fence, a round trip of an atomic, and 12 programs that
  read all parts instead of 192: hardly less time, and counters to look after.
* A wider decode kernel. Each 16 rows read all tokens anew (here, at 64 tokens, 55 MB for 3.4 MB of weights). With 64
  rows a program there would be 24 programs, which would need this split as well.
"""

from __future__ import annotations

import functools
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
# Costs, counted in k128 steps of a program. A step takes 0.17 microseconds: the slope over K of the 2:4 figures in
# benchmarks/results/decode.csv. For 8960 -> 1536, 11008 -> 2048 and 4864 -> 896 at 8 to 64 tokens the chosen parts take
# 4 to 10 microseconds, and one piece takes 9 to 25. Wider weights (14336 -> 4096, 8192 -> 8192) were not measured.
_LAUNCH = 12
_BYTES_A_STEP = 0.17e-6 * 4e12
# For prompts. Tokens of a tile -> microseconds of a step of a program, and of all else that a program does.
_TILE_COSTS = {128: (0.219, 4.1), 64: (0.19, 3.4)}
_L2_BYTES = 5e6  # a microsecond


def split_tile(tokens: int) -> int:
    """The tokens that a program has room for: at least all of them. Comparisons only, for ``torch.compile``."""
    return 16 if tokens <= 16 else 32 if tokens <= 32 else 64


def choose_splits(tokens: int, rows: int, columns: int, processors: int) -> int:
    """Chooses the number of parts of the sum over ``columns``; 1 means one piece. The costs are those of 2:4.

    The sum stays in one piece where panels of 128 rows alone occupy more than half of the processors, or where a second
    launch costs more than the split saves. Otherwise: with more parts, the steps of a part fall and the traffic of the
    parts rises, and their sum is least where the two are equal.
    """
    panels, steps = ceil_div(rows, PANEL), ceil_div(columns, K_STEP)
    if tokens > MOST_TOKENS or 2 * panels > processors:
        return 1
    part = 8 * panels * PANEL * split_tile(tokens) / _BYTES_A_STEP  # written and read once, 4 bytes each
    best = int(math.sqrt(steps / part))
    splits, _ = whole_parts(steps, max(1, min(best, MOST_SPLITS, _RESIDENT * processors // panels)))
    saved = steps - ceil_div(steps, splits) - part * splits
    return splits if saved >= _LAUNCH else 1


@functools.lru_cache(maxsize=4096)
def choose_parts(tokens: int, rows: int, columns: int, processors: int) -> tuple[int, int]:
    """Chooses (parts of the sum over ``columns``, tokens of a tile) for a prompt whose sums the next kernel adds.

    (1, 0) means that parts do not save a tenth. The costs are microseconds: a straight line over the steps of a tile,
    fitted to 2:4 and 512 tokens on an H200, and the traffic of the sums through the L2 cache.
    """
    panels, steps = ceil_div(rows, PANEL), ceil_div(columns, K_STEP)

    def cost(parts: int, tile: int) -> float:
        step, fixed = _TILE_COSTS[tile]
        waves = ceil_div(ceil_div(tokens, tile) * panels * parts, processors)
        bytes_of_sums = 2 * tokens * rows * (4 * parts if parts > 1 else 2)
        return waves * (ceil_div(steps, parts) * step + fixed) + bytes_of_sums / _L2_BYTES

    choices = [(whole_parts(steps, parts)[0], tile) for parts in range(1, 9) for tile in _TILE_COSTS]
    best = min(choices, key=lambda choice: cost(*choice))
    whole = min(cost(1, tile) for tile in _TILE_COSTS)
    return best if cost(*best) <= 0.9 * whole else (1, 0)


def whole_parts(steps: int, splits: int) -> tuple[int, int]:
    """(Parts, steps of a part) for at most ``splits`` parts, none of them empty."""
    per_split = ceil_div(steps, splits)
    return ceil_div(steps, per_split), per_split


@triton.jit(do_not_specialize=("tokens", "splits"))
def add_splits_kernel(
    part_pointer, y_pointer, scale_pointer, row_scale_pointer, bias_pointer, tokens, features, splits, part_size,
    S: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, BT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """y [tokens, features] = (sum of int32 part [splits, rows, BT]) * scale[token] (* row_scale[row]) (+ bias[row]).

    R rows a program. The parts, at most S, are spread over threads: a thread that adds part after part would wait for
    two loads at a time, even in an unrolled loop, because of the order the assembler gives them.
    """
    split = tl.arange(0, S)
    row = tl.program_id(0) * R + tl.arange(0, R)
    token = tl.arange(0, BT)
    # loaded first, so that the scales do not wait for the parts
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
    """Fills ``y [tokens, features]`` from int32 ``parts [splits, whole panels of rows, tile]``, and returns ``y``."""
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
