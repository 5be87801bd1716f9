"""Hopper products on 2-bit ternary weights: ``sparse_gemm`` (2:4, sparse tensor core), ``ternary_gemm`` (any pattern).

This file launches the Gluon kernel of ``kernels.py`` and chooses its tiles. Both products are exact: the sum is an
int32 (``in_features`` up to 2^24 cannot overflow it), the scales are multiplied in float32 in the order of the
plain-PyTorch reference, and one rounding to the dtype of the result follows.

A tile is 128 features by ``BT`` tokens. The number of waves of tiles over the multiprocessors decides about ``BT``. Up
to 64 tokens the sum over K may be split over programs; ``split_k.py`` says where, and why the result is the same. On
Hopper only 2:4 gains from sparsity: any other pattern runs as dense ternary at the int8 rate.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sbn_kernels.common.buffers import aligned_tokens, padded_to
from sbn_kernels.common.checks import check_gemm_arguments, check_packed
from sbn_kernels.common.integers import ceil_div
from sbn_kernels.common.packing import BLOCK_WORDS, K_STEP, PANEL, pack_dense, pack_nonzeros24
from sbn_kernels.gemm.registry import Product, register
from sbn_kernels.gemm.sm90.split_k import MOST_SPLITS, MOST_TOKENS, add_splits, choose_splits, split_tile, whole_parts
from sbn_kernels.runtime.capability import Needs, multiprocessors, require
from sbn_kernels.runtime.descriptors import descriptor
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op
from sbn_kernels.runtime.sharing import programs

SPARSE_NEEDS = Needs("sparse_gemm", only=(9, 0), gluon=True)
DENSE_NEEDS = Needs("ternary_gemm", only=(9, 0), gluon=True)

_SHARED_BYTES = 232448 - 2048
_TOKEN_TILES = (256, 128, 64, 32, 16)
SPLIT_STAGES = 8  # stages of the ring for parts of K: 96 KB at 64 tokens, so that two programs fit a multiprocessor
_BAND = 8  # token tiles that share a sweep over the weight; 16, or an L2 evict-first hint on stores, was slower


@functools.cache
def _kernel() -> Launcher:
    """The launcher of the Gluon kernel; importing the kernel needs Triton >= 3.9."""
    from sbn_kernels.gemm.sm90.kernels import ternary_gemm_kernel

    return Launcher(ternary_gemm_kernel, enable_fp_fusion=False, overlaps=True)


@functools.cache
def _split_kernel() -> Launcher:
    """The launcher of the Gluon kernel for parts of K; importing the kernel needs Triton >= 3.9."""
    from sbn_kernels.gemm.sm90.split_kernels import ternary_gemm_split_kernel

    return Launcher(ternary_gemm_split_kernel, enable_fp_fusion=False)


@functools.lru_cache(maxsize=4096)
def choose_token_tile(tokens: int, panels: int, processors: int) -> int:
    """Chooses the tokens of a tile: the least waves times (tile + a fixed cost for the epilogue and the codes).

    The fixed cost was fitted to 2:4 products of 512 to 8,192 tokens on an H200, shapes of Qwen2.5 1.5B and 3B. The
    rule then chooses the fastest tile in all 24 cases.
    """

    def cost(tile: int) -> tuple[int, int]:
        waves = ceil_div(ceil_div(tokens, tile) * panels, processors)
        return waves * (tile + 78), -tile

    return min(_TOKEN_TILES, key=cost)


@functools.cache
def launch_shape(tile: int, out_itemsize: int) -> tuple[int, int, int]:
    """(Tokens of an epilogue chunk, its buffers, stages of the ring) that fit shared memory for a token tile."""
    chunk = min(tile, 32)
    # The chunks of a tile fill the buffers a whole number of times, so that each store is the oldest one of its buffer.
    buffers = min(tile // chunk, 4 if out_itemsize == 2 else 2)
    scales = 2 * tile * 4  # float32, for each of the two consumers
    epilogue = buffers * chunk * PANEL * out_itemsize + scales
    return chunk, buffers, min(8, (_SHARED_BYTES - epilogue) // (tile * K_STEP + 4 * BLOCK_WORDS))


def _parts(x8: Tensor, packed: Tensor, sparse: bool, splits: int) -> Tensor:
    """The unscaled product of aligned tokens in parts of K: int32 ``[splits, whole panels of rows, tile]``."""
    tokens, columns = x8.shape
    panels, k_steps, _ = packed.shape
    splits, per_split = whole_parts(k_steps, splits)
    tile = split_tile(tokens)
    parts = torch.empty((splits, panels * PANEL, tile), dtype=torch.int32, device=x8.device)
    _split_kernel()(
        (panels, splits, 1),
        (parts,),
        (k_steps, per_split, 0),
        (tile, SPLIT_STAGES, sparse),
        descriptors=(
            descriptor(x8, (tokens, columns), x8.stride(0), (tile, K_STEP)),
            descriptor(packed, (panels * k_steps * 32, 32), 32, (32, 32)),
        ),
    )
    return parts


@kernel_op("hopper_gemm")
def _hopper_gemm(
    x8: Tensor,
    scale: Tensor,
    packed: Tensor,
    row_scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    sparse: bool,
    out_dtype: torch.dtype,
    token_tile: int,
    splits: int,
) -> Tensor:
    require(SPARSE_NEEDS if sparse else DENSE_NEEDS, x8)
    tokens, columns = x8.shape
    y = torch.empty((tokens, out_features), dtype=out_dtype, device=x8.device)
    if tokens == 0:
        return y
    x8 = aligned_tokens(x8)
    panels, k_steps, _ = packed.shape
    processors = multiprocessors(x8.device.index)
    if splits == 0 and tokens <= MOST_TOKENS and not token_tile:
        splits = choose_splits(tokens, out_features, columns, processors)
    if splits > 1:
        return add_splits(_parts(x8, packed, sparse, splits), scale, row_scale, bias, y)
    tile = token_tile or choose_token_tile(tokens, panels, processors)
    token_tiles = ceil_div(tokens, tile)
    chunk, buffers, stages = launch_shape(tile, y.element_size())
    # TMA stores rows that start on 16-byte boundaries, so an odd out_features is stored to a wider output first
    align = 16 // y.element_size()
    width = ceil_div(out_features, align) * align
    target = y if width == out_features else y.new_empty((tokens, width))
    scale = padded_to(scale, tile)
    of_rows = [scale if vector is None else padded_to(vector, PANEL) for vector in (row_scale, bias)]
    _kernel()(
        (programs(processors, token_tiles * panels, k_steps), 1, 1),
        (scale, *of_rows),
        (k_steps, token_tiles, panels, 1, k_steps, _BAND, 0),
        (tile, chunk, buffers, stages, sparse, row_scale is not None, bias is not None, False),
        descriptors=(
            descriptor(x8, (tokens, columns), x8.stride(0), (tile, K_STEP)),
            descriptor(packed, (panels * k_steps * 32, 32), 32, (32, 32)),
            descriptor(target, (tokens, width), width, (chunk, PANEL // 2)),
        ),
    )
    if target is not y:
        y.copy_(target[:, :out_features])
    return y


@kernel_fake("hopper_gemm")
def _(x8: Tensor, out_features: int, out_dtype: torch.dtype) -> Tensor:
    return torch.empty((x8.shape[0], out_features), dtype=out_dtype, device=x8.device)


@kernel_op("hopper_gemm_sums")
def _hopper_gemm_sums(x8: Tensor, packed: Tensor, out_features: int, sparse: bool, parts: int, tile: int) -> Tensor:
    require(SPARSE_NEEDS if sparse else DENSE_NEEDS, x8)
    x8 = aligned_tokens(x8)
    tokens, columns = x8.shape
    panels, k_steps, _ = packed.shape
    parts, per_part = whole_parts(k_steps, parts)
    token_tiles = ceil_div(tokens, tile)
    sums = torch.empty((parts, token_tiles * tile, out_features), dtype=torch.int32, device=x8.device)
    chunk, buffers, stages = launch_shape(tile, 4)
    work = token_tiles * panels * parts
    _kernel()(
        (programs(multiprocessors(x8.device.index), work, per_part), 1, 1),
        (sums, sums, sums),  # no scales and no bias
        (k_steps, token_tiles, panels, parts, per_part, _BAND, 0),
        (tile, chunk, buffers, stages, sparse, False, False, True),
        descriptors=(
            descriptor(x8, (tokens, columns), x8.stride(0), (tile, K_STEP)),
            descriptor(packed, (panels * k_steps * 32, 32), 32, (32, 32)),
            descriptor(sums, (parts * token_tiles * tile, out_features), out_features, (chunk, PANEL // 2)),
        ),
    )
    return sums


@kernel_fake("hopper_gemm_sums")
def _(x8: Tensor, packed: Tensor, out_features: int, parts: int, tile: int) -> Tensor:
    parts, _ = whole_parts(packed.shape[1], parts)
    rows = ceil_div(x8.shape[0], tile) * tile
    return torch.empty((parts, rows, out_features), dtype=torch.int32, device=x8.device)


def gemm_sums(x8: Tensor, packed: Tensor, out_features: int, sparse: bool, parts: int, tile: int) -> Tensor:
    """Computes ``x8 @ T^T`` in parts of the sum over in_features, unscaled; the sum of the parts is the product.

    Args:
        x8: int8 ``[tokens, in_features]``.
        packed: int32 words of the weight, layout ``sparse24`` or ``dense``.
        out_features: The number of rows of the weight, a multiple of 4.
        sparse: Whether the layout is ``sparse24``.
        parts: The largest number of parts, see :func:`~sbn_kernels.gemm.sm90.split_k.choose_parts`.
        tile: The tokens of a tile, 128 or 64.

    Returns:
        int32 ``[parts, tokens in whole tiles, out_features]``. What stands behind the last token means nothing.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If the GPU is not a Hopper GPU, or Triton is older than 3.9.
    """
    check_packed(packed, out_features, x8.shape[1])
    if x8.dtype != torch.int8 or out_features % 4 or tile not in (128, 64) or parts < 1 or not len(x8):
        raise ValueError(f"no sums of {x8.dtype} {list(x8.shape)} for {out_features} rows in {parts} parts of {tile}")
    sums: Tensor = torch.ops.sbn_kernels.hopper_gemm_sums(x8, packed, out_features, sparse, parts, tile)
    return sums


def check_splits(splits: int, tokens: int, token_tile: int) -> None:
    """Checks a number of parts of the sum over K.

    Raises:
        ValueError: If the sum cannot be split that way.
    """
    if not 0 <= splits <= MOST_SPLITS:
        raise ValueError(f"splits={splits} is not 0 (choose) to {MOST_SPLITS}")
    if splits > 1 and (token_tile or tokens > MOST_TOKENS):
        raise ValueError(f"parts of K are for at most {MOST_TOKENS} tokens, and have no token_tile")


def sparse_gemm(
    x8: Tensor,
    scale: Tensor,
    packed: Tensor,
    row_scale: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    token_tile: int = 0,
    splits: int = 0,
) -> Tensor:
    """Computes ``y = (x8 @ T^T) * scale * row_scale (+ bias)`` on the sparse tensor core, for 2:4 weights.

    Args:
        x8: int8 ``[tokens, in_features]``, any value; rows that start on 16-byte boundaries avoid a copy.
        scale: float32 ``[tokens]``.
        packed: int32 words, layout ``sparse24`` of :mod:`sbn_kernels.common.packing`.
        row_scale: gamma of each row, float32 ``[out_features]``.
        out_features: The number of rows of the weight.
        bias: ``[out_features]``, any float dtype, or None.
        out_dtype: bfloat16, float16 or float32.
        token_tile: The tokens of a tile (256, 128, 64, 32 or 16); 0 chooses.
        splits: The largest number of parts of the sum over in_features, up to 16; 0 chooses. More than one part needs
            at most 64 tokens and no ``token_tile``. The result is the same for any number.

    Returns:
        ``[tokens, out_features]``.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If the GPU is not a Hopper GPU, or Triton is older than 3.9.
    """
    check_gemm_arguments(x8, scale, row_scale, bias, out_features, out_dtype)
    check_packed(packed, out_features, x8.shape[1])
    check_splits(splits, x8.shape[0], token_tile)
    args = (x8, scale, packed, row_scale, bias, out_features, True, out_dtype, token_tile, splits)
    result: Tensor = torch.ops.sbn_kernels.hopper_gemm(*args)
    return result


def ternary_gemm(
    x8: Tensor,
    scale: Tensor,
    packed: Tensor,
    row_scale: Tensor | None,
    out_features: int,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    token_tile: int = 0,
    splits: int = 0,
) -> Tensor:
    """Computes what :func:`sparse_gemm` does for any ternary weight.

    ``packed`` has layout ``dense``, and a ``row_scale`` of None stands for ones.
    """
    check_gemm_arguments(x8, scale, row_scale, bias, out_features, out_dtype, may_be_ones=True)
    check_packed(packed, out_features, x8.shape[1])
    check_splits(splits, x8.shape[0], token_tile)
    args = (x8, scale, packed, row_scale, bias, out_features, False, out_dtype, token_tile, splits)
    result: Tensor = torch.ops.sbn_kernels.hopper_gemm(*args)
    return result


register(
    Product(
        name="hopper-sparse",
        backend="sparse",
        needs=SPARSE_NEEDS,
        form="sparse24",
        multiply=sparse_gemm,
        pack=pack_nonzeros24,
        pattern=(2, 4),
        denser="hopper",
        rank=10,
    )
)
register(
    Product(
        name="hopper",
        backend="int8",
        needs=DENSE_NEEDS,
        form="dense",
        multiply=ternary_gemm,
        pack=pack_dense,
        rank=10,
    )
)
