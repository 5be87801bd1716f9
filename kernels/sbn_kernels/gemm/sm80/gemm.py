"""Products on 2-bit ternary weights for Ampere and Ada: ``ampere_sparse_gemm`` (2:4), ``ampere_ternary_gemm`` (any).

This file launches the Gluon kernel of ``kernels.py`` and chooses its tiles. Both products are exact: the sum is an
int32 (``in_features`` up to 2^24 cannot overflow it), the scales are multiplied in float32 in the order of the
plain-PyTorch reference, and one rounding to the dtype of the result follows. The weights are the packed words that the
Hopper kernels and the decode kernels read, so the weight preparation needs no form of its own.

The instructions exist from compute capability 8.0 on, on Hopper and Blackwell too. The tiles and stages follow from
arithmetic about registers, shared memory and waves. Nobody has timed the kernels on an Ampere or Ada GPU yet, so they
are registered as ``untimed``, behind cuSPARSELt and the portable kernel: ``backend: auto`` times them beside the first
kernel and takes the faster one, and packed 2:4 weights, which cuSPARSELt cannot read, take ``ampere-sparse``.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sbn_kernels.common.buffers import aligned_tokens, contiguous
from sbn_kernels.common.checks import check_gemm_arguments, check_packed
from sbn_kernels.common.integers import ceil_div
from sbn_kernels.common.packing import BLOCK_WORDS, K_STEP, pack_dense, pack_nonzeros24
from sbn_kernels.gemm.registry import Product, register
from sbn_kernels.runtime.capability import Needs, multiprocessors, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

SPARSE_NEEDS = Needs("ampere_sparse_gemm", gluon=True)
DENSE_NEEDS = Needs("ampere_ternary_gemm", gluon=True)

TOKEN_WARPS = 2
BAND = 8  # token tiles that share a sweep over the weight


class Tile(NamedTuple):
    """What one program computes.

    Attributes:
        panels: Panels of 128 features.
        tokens: Tokens.
    """

    panels: int
    tokens: int

    @property
    def warps(self) -> int:
        """Warps of a program; each computes 64 features."""
        return 2 * self.panels * TOKEN_WARPS

    @property
    def stage_bytes(self) -> int:
        """Shared memory of one stage of the ring."""
        return self.tokens * K_STEP + 4 * BLOCK_WORDS * self.panels


TILES = (Tile(2, 128), Tile(1, 128), Tile(1, 64), Tile(1, 32), Tile(1, 16))


@functools.cache
def _kernel() -> Launcher:
    """The launcher of the Gluon kernel; importing the kernel needs Triton >= 3.9."""
    from sbn_kernels.gemm.sm80.kernels import ampere_gemm_kernel

    return Launcher(ampere_gemm_kernel, enable_fp_fusion=False)


@functools.lru_cache(maxsize=4096)
def choose_tile(tokens: int, panels: int, processors: int) -> Tile:
    """Chooses a tile: the largest one within 3 % of the least cost.

    The cost is the number of waves times (elements of a tile + a fixed cost for the epilogue and the codes). A larger
    tile reads less from the L2 cache.
    """

    def cost(tile: Tile) -> int:
        waves = ceil_div(ceil_div(tokens, tile.tokens) * ceil_div(panels, tile.panels), processors)
        return waves * tile.panels * (tile.tokens + 24)

    least = min(map(cost, TILES))
    return next(tile for tile in TILES if cost(tile) <= 1.03 * least)  # the tiles are in the order of their size


def stages_of(tile: Tile, shared_of_a_program: int, shared_of_a_multiprocessor: int) -> int:
    """Chooses the stages of the ring, 2 to 4.

    A program of 8 warps has a multiprocessor for itself, because its accumulators fill the registers. Two programs of
    4 warps share one.

    Args:
        tile: What a program computes.
        shared_of_a_program: The most bytes of shared memory that a program can have.
        shared_of_a_multiprocessor: The bytes of shared memory of a multiprocessor.
    """
    programs = 8 // tile.warps
    room = min(shared_of_a_program, shared_of_a_multiprocessor // programs - 1024)  # CUDA takes 1 KB of each program
    return max(2, min(4, room // tile.stage_bytes))


@functools.cache
def _stages(tile: Tile, index: int) -> int:
    of_a_program = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return stages_of(tile, of_a_program, torch.cuda.get_device_properties(index).shared_memory_per_multiprocessor)


@kernel_op("ampere_gemm")
def _ampere_gemm(
    x8: Tensor,
    scale: Tensor,
    packed: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    sparse: bool,
    out_dtype: torch.dtype,
    tile: int,
) -> Tensor:
    require(SPARSE_NEEDS if sparse else DENSE_NEEDS, x8)
    tokens = x8.shape[0]
    # Rows of the result are stored in pieces of 8 elements, so an odd out_features is stored to a wider output first.
    pieces = ceil_div(out_features, 8)
    y = torch.empty((tokens, 8 * pieces), dtype=out_dtype, device=x8.device)
    if tokens == 0:
        return y[:, :out_features]
    x8 = aligned_tokens(x8)
    words = torch.as_strided(x8, (tokens, x8.stride(0)), (x8.stride(0), 1)).view(torch.int32)
    panels, k_steps, _ = packed.shape
    index = x8.device.index
    chosen = choose_tile(tokens, panels, multiprocessors(index)) if tile < 0 else TILES[tile]
    scale, row_scale, some_bias = contiguous(scale, row_scale, scale if bias is None else bias)
    _kernel()(
        (ceil_div(tokens, chosen.tokens) * ceil_div(panels, chosen.panels), 1, 1),
        (words, packed, y, scale, row_scale, some_bias),
        (tokens, out_features, k_steps, panels, x8.stride(0) // 16, pieces),
        (*chosen, TOKEN_WARPS, _stages(chosen, index), BAND, sparse, bias is not None),
        chosen.warps,
    )
    return y if 8 * pieces == out_features else y[:, :out_features].contiguous()


@kernel_fake("ampere_gemm")
def _(x8: Tensor, out_features: int, out_dtype: torch.dtype) -> Tensor:
    return torch.empty((x8.shape[0], out_features), dtype=out_dtype, device=x8.device)


def _multiply(
    sparse: bool,
    x8: Tensor,
    scale: Tensor,
    packed: Tensor,
    row_scale: Tensor,
    out_features: int,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    tile: int,
) -> Tensor:
    check_gemm_arguments(x8, scale, row_scale, bias, out_features, out_dtype)
    check_packed(packed, out_features, x8.shape[1])
    if not -1 <= tile < len(TILES):
        raise ValueError(f"tile={tile} is not -1 (choose) to {len(TILES) - 1}")
    args = (x8, scale, packed, row_scale, bias, out_features, sparse, out_dtype, tile)
    result: Tensor = torch.ops.sbn_kernels.ampere_gemm(*args)
    return result


def ampere_sparse_gemm(
    x8: Tensor,
    scale: Tensor,
    packed: Tensor,
    row_scale: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    tile: int = -1,
) -> Tensor:
    """Computes ``y = (x8 @ T^T) * scale * row_scale (+ bias)`` with ``mma.sp``, for 2:4 weights.

    Args:
        x8: int8 ``[tokens, in_features]``, any value; rows that start on 16-byte boundaries avoid a copy.
        scale: float32 ``[tokens]``.
        packed: int32 words, layout ``sparse24`` of :mod:`sbn_kernels.common.packing`.
        row_scale: gamma of each row, float32 ``[out_features]``.
        out_features: The number of rows of the weight.
        bias: ``[out_features]``, any float dtype, or None.
        out_dtype: bfloat16, float16 or float32.
        tile: The number of a tile in ``TILES``; -1 chooses.

    Returns:
        ``[tokens, out_features]``.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If the GPU is older than Ampere, or Triton is older than 3.9.
    """
    return _multiply(True, x8, scale, packed, row_scale, out_features, bias, out_dtype, tile)


def ampere_ternary_gemm(
    x8: Tensor,
    scale: Tensor,
    packed: Tensor,
    row_scale: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    tile: int = -1,
) -> Tensor:
    """Computes what :func:`ampere_sparse_gemm` does with ``mma``, for any ternary weight in layout ``dense``."""
    return _multiply(False, x8, scale, packed, row_scale, out_features, bias, out_dtype, tile)


register(
    Product(
        name="ampere-sparse",
        backend="sparse",
        needs=SPARSE_NEEDS,
        form="sparse24",
        multiply=ampere_sparse_gemm,
        pack=pack_nonzeros24,
        pattern=(2, 4),
        denser="portable",
        rank=-5,
        untimed=True,
    )
)
register(
    Product(
        name="ampere",
        backend="int8",
        needs=DENSE_NEEDS,
        form="dense",
        multiply=ampere_ternary_gemm,
        pack=pack_dense,
        rank=-5,
        untimed=True,
    )
)
