"""The gradient of a layer's weight from int8 factors: ``weight_gradient_gemm``, on Hopper or in plain Triton.

This file launches the Gluon kernel of ``sm90.py``, chooses its tiles and checks arguments. Elsewhere the product is
``int8_gemm``, with the rows of the weight in the place of tokens. Both sum exactly in int32, scale in float32 and round
to the dtype of the result, so both give the same bits. Where tiles do not fill a wave of multiprocessors (few rows and
columns, or few tiles in the last wave), tiles are split along the sum over tokens if that ends sooner; a second kernel
adds the int32 parts.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbn_kernels.common.buffers import aligned_tokens, padded_to
from sbn_kernels.common.checks import check_scale, refuse_gradients
from sbn_kernels.common.integers import ceil_div
from sbn_kernels.gemm import portable as portable_gemm
from sbn_kernels.gemm.registry import Gradients, gradients_on, register
from sbn_kernels.gradients.input_gradient import input_gradient_gemm
from sbn_kernels.gradients.transpose import pack_transposed, transpose_tokens
from sbn_kernels.runtime.capability import Needs, multiprocessors, place, require
from sbn_kernels.runtime.descriptors import descriptor
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op
from sbn_kernels.runtime.sharing import programs

NEEDS = Needs("weight_gradient", only=(9, 0), gluon=True)

_MOST_TOKENS = 131072  # 127 * 128 * tokens < 2^31
_ROWS = 128
_COLUMN_TILES = (256, 128)
_SHARED_BYTES = 232448 - 2048
_EPILOGUE_BYTES = 4 * 64 * 128
_BAND = 16  # row tiles that share a sweep over columns
# Cost model. The unit is a k128 step of a tile of 256 columns, about 0.7 microseconds: a step, an output tile, a second
# launch.
_STEP = {256: 1.0, 128: 0.55}
_TILE = {256: 3.0, 128: 1.5}
_LAUNCH = 5.0
_STEPS_A_BYTE = 1 / (0.7e-6 * 4e12)


@functools.cache
def _kernel() -> Launcher:
    """The launcher of the Gluon kernel; importing the kernel needs Triton >= 3.9."""
    from sbn_kernels.gradients.sm90 import int8_outer_kernel

    return Launcher(int8_outer_kernel, enable_fp_fusion=False)


@functools.lru_cache(maxsize=4096)
def choose_launch(rows: int, columns: int, tokens: int, processors: int) -> tuple[int, int, int]:
    """Chooses the launch of least cost: (columns of a tile, tiles done whole, parts of each other tile)."""
    steps = ceil_div(tokens, 128)

    def cost(tile: int, whole: int, splits: int) -> float:
        others = ceil_div(rows, _ROWS) * ceil_div(columns, tile) - whole
        time = ceil_div(whole, processors) * (steps * _STEP[tile] + _TILE[tile])
        if others:
            time += ceil_div(others * splits, processors) * (ceil_div(steps, splits) * _STEP[tile] + _TILE[tile])
            time += _LAUNCH + (8 * splits + 4) * others * _ROWS * tile * _STEPS_A_BYTE
        return time

    choices = []
    for tile in _COLUMN_TILES:
        tiles = ceil_div(rows, _ROWS) * ceil_div(columns, tile)
        full = tiles // processors * processors
        choices += [(tile, tiles, 1)]
        choices += [(tile, whole, s) for whole in {full, max(full - processors, 0)} - {tiles} for s in range(2, 17)]
    return min((c for c in choices if c[2] == 1 or steps >= 8 * c[2]), key=lambda choice: cost(*choice))


def launch_shape(tile: int, out_itemsize: int) -> tuple[int, int]:
    """(Columns of an epilogue chunk, stages of the ring) that fit shared memory."""
    return 128 // out_itemsize, (_SHARED_BYTES - _EPILOGUE_BYTES) // (128 * (_ROWS + tile))


@triton.jit
def add_parts_kernel(
    part_pointer, scale_pointer, y_pointer, rows, columns, row_tiles, column_tiles, whole, splits, group,
    TILE: tl.constexpr, R: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """y = (sum of int32 parts) * scale[row], for R rows of a tile; tiles from ``whole`` on, in the product's order.

    With ADD the result is added to ``y``, which is float32.

    ``part`` holds tiles of 128 rows and TILE columns: all first parts, then all second parts, and so on.
    """
    other = tl.program_id(0)
    tile = whole + other
    per = group * column_tiles
    first = tile // per * group
    height = tl.minimum(row_tiles - first, group)
    local = tl.program_id(1) * R + tl.arange(0, R)
    row = (first + tile % per % height) * 128 + local
    column = tile % per // height * TILE + tl.arange(0, TILE)
    total = tl.zeros([R, TILE], tl.int32)
    for split in range(splits):
        part = (split * tl.num_programs(0) + other).to(tl.int64) * (128 * TILE)
        total += tl.load(part_pointer + part + local[:, None] * TILE + tl.arange(0, TILE)[None, :])
    scale = tl.load(scale_pointer + row, mask=row < rows, other=0.0)
    y = total.to(tl.float32) * scale[:, None]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    where = y_pointer + row.to(tl.int64)[:, None] * columns + column[None, :]
    if ADD:
        y += tl.load(where, mask=inside, other=0.0)
    tl.store(where, y.to(y_pointer.dtype.element_ty), mask=inside)


# Without fused multiplications and additions: the sum has the bits of a product that is added afterwards.
_add_parts = Launcher(add_parts_kernel, enable_fp_fusion=False)


def add_parts(parts: Tensor, scale: Tensor, y: Tensor, whole: int, group: int, add: bool = False) -> None:
    """Adds and scales int32 ``parts`` [splits, tiles, 128, columns of a tile], and writes the tiles to ``y``.

    The parts belong to the tiles from ``whole`` on. In the order of tiles, ``group`` row tiles share a sweep over
    columns. With ``add`` the result is added to ``y``.
    """
    splits, others, height, width = parts.shape
    shape = (ceil_div(y.shape[0], height), ceil_div(y.shape[1], width))
    numbers = (*y.shape, *shape, whole, splits, group)
    _add_parts((others, height // 8, 1), (parts, scale, y), numbers, (width, 8, add))


def _hopper(
    b8t: Tensor, scale: Tensor, x8t: Tensor, out_dtype: torch.dtype, launch: list[int], into: Tensor | None = None
) -> Tensor:
    require(NEEDS, b8t)
    (rows, tokens), columns = b8t.shape, x8t.shape[0]
    y = torch.empty((rows, columns), dtype=out_dtype, device=b8t.device) if into is None else into
    b8t, x8t = aligned_tokens(b8t), aligned_tokens(x8t)
    processors = multiprocessors(b8t.device.index)
    tile, whole, splits = launch or choose_launch(rows, columns, tokens, processors)
    row_tiles, column_tiles, steps = ceil_div(rows, _ROWS), ceil_div(columns, tile), ceil_div(tokens, 128)
    whole = min(whole, row_tiles * column_tiles)
    others = row_tiles * column_tiles - whole
    per_split = ceil_div(steps, splits)
    splits = ceil_div(steps, per_split)  # no part is without a step
    units = whole + others * splits
    parts = torch.empty((splits, max(others, 1), _ROWS, tile), dtype=torch.int32, device=y.device)
    # TMA stores rows that start on 16-byte boundaries, so an odd number of columns is stored to a wider output first
    align = 16 // y.element_size()
    width = ceil_div(columns, align) * align
    target = y if width == columns else y.new_empty((rows, width))
    chunk, stages = launch_shape(tile, y.element_size())
    half = _ROWS // 2
    _kernel()(
        (programs(processors, units, steps), 1, 1),
        (padded_to(scale, _ROWS),),
        (steps, per_split, row_tiles, column_tiles, whole, units, _BAND),
        (tile, into is not None, chunk, stages),
        descriptors=(
            descriptor(b8t, (rows, tokens), b8t.stride(0), (half, 128)),
            descriptor(x8t, (columns, tokens), x8t.stride(0), (tile, 128)),
            descriptor(target, (rows, width), width, (half, chunk)),
            descriptor(parts, (parts.numel() // tile, tile), tile, (half, 32)),
        ),
    )
    if target is not y:
        y.copy_(target[:, :columns])
    if others > 0:
        add_parts(parts, scale, y, whole, _BAND, into is not None)
    return y


@kernel_op("weight_gradient")
def _weight_gradient(
    b8t: Tensor, scale: Tensor, x8t: Tensor, out_dtype: torch.dtype, portable: bool, launch: list[int]
) -> Tensor:
    tokens = b8t.shape[1]
    if tokens == 0:
        return torch.zeros((b8t.shape[0], x8t.shape[0]), dtype=out_dtype, device=b8t.device)
    if tokens > _MOST_TOKENS:
        total = torch.zeros((b8t.shape[0], x8t.shape[0]), dtype=torch.float32, device=b8t.device)
        for b, x in zip(b8t.split(_MOST_TOKENS, 1), x8t.split(_MOST_TOKENS, 1), strict=True):
            total += _weight_gradient(b, scale, x, torch.float32, portable, launch)
        return total.to(out_dtype)
    if portable:
        return portable_gemm.int8_gemm(
            b8t, scale, x8t, torch.ones(x8t.shape[0], device=x8t.device), out_dtype=out_dtype
        )
    return _hopper(b8t, scale, x8t, out_dtype, launch)


@kernel_fake("weight_gradient")
def _(b8t: Tensor, x8t: Tensor, out_dtype: torch.dtype) -> Tensor:
    return torch.empty((b8t.shape[0], x8t.shape[0]), dtype=out_dtype, device=b8t.device)


@kernel_op("add_weight_gradient", mutates=("into",))
def _add_weight_gradient(
    into: Tensor, b8t: Tensor, scale: Tensor, x8t: Tensor, portable: bool, launch: list[int]
) -> None:
    if not into.is_inference():
        torch.autograd.graph.increment_version(into)
    # TMA adds to rows that start on 16-byte boundaries.
    if portable or not 0 < b8t.shape[1] <= _MOST_TOKENS or into.shape[1] % 4 or into.data_ptr() % 16:
        into += _weight_gradient(b8t, scale, x8t, torch.float32, portable, launch)
    else:
        _hopper(b8t, scale, x8t, torch.float32, launch, into)


@kernel_fake("add_weight_gradient")
def _() -> None:
    return None


def weight_gradient_gemm(
    b8t: Tensor,
    scale: Tensor,
    x8t: Tensor,
    out_dtype: torch.dtype = torch.float32,
    *,
    into: Tensor | None = None,
    portable: bool | None = None,
    launch: tuple[int, int, int] | None = None,
) -> Tensor:
    """Computes ``dW = scale * (b8t @ x8t^T)`` with an exact sum.

    Args:
        b8t: The quantised gradient, int8 ``[out_features, tokens]``, values in [-127, 127]:
            ``QuantizedGradient.channels``. 0 tokens are allowed.
        scale: The scale of each row, float32 ``[out_features]``.
        x8t: The activations, transposed by ``transpose_tokens``, int8 ``[in_features, tokens]``.
        out_dtype: The dtype of the result: float32, bfloat16 or float16.
        into: A contiguous float32 tensor ``[out_features, in_features]``, to which the result is added in place. The
            bits are those of an addition afterwards, except that numbers below 2^-126 may become 0.
        portable: Whether to use plain Triton (sm_80 and later) instead of the Hopper kernel. None: where the Hopper
            kernel does not run.
        launch: The launch of the Hopper kernel: columns of a tile (256 or 128), tiles of 128 rows done whole, parts of
            the sum over tokens for each other tile. None: :func:`choose_launch`.

    Returns:
        ``[out_features, in_features]``; ``into`` if it is given. Above 131,072 tokens int32 could overflow, so the
        result is the float32 sum of exact parts.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If there is no GPU of compute capability 8.0 or later, or the kernel asked for cannot run.
    """
    if x8t.dim() != 2 or x8t.dtype != torch.int8 or x8t.shape[1] != b8t.shape[-1] or x8t.shape[0] == 0:
        raise ValueError(f"x8t must be int8 [in_features, {b8t.shape[-1]}], not {x8t.dtype} {list(x8t.shape)}")
    if b8t.dim() != 2 or b8t.dtype != torch.int8 or b8t.shape[0] == 0:
        raise ValueError(f"b8t must be int8 [out_features, tokens], not {b8t.dtype} {list(b8t.shape)}")
    check_scale("scale", scale, b8t.shape[0])
    if launch is not None and (launch[0] not in _COLUMN_TILES or launch[1] < 0 or launch[2] < 1):
        raise ValueError(f"launch must be (256 or 128, tiles >= 0, parts >= 1), not {launch}")
    if portable is None:
        portable = gradients_on(place(b8t)) != "hopper"
    if into is not None:
        wanted = (b8t.shape[0], x8t.shape[0])
        if into.shape != wanted or into.dtype != torch.float32 or not into.is_contiguous() or into.device != b8t.device:
            found = f"{into.dtype} {list(into.shape)}, strides {list(into.stride())}, on {into.device}"
            raise ValueError(f"into must be contiguous float32 {list(wanted)} on {b8t.device}, not {found}")
        if out_dtype != torch.float32:
            raise ValueError(f"out_dtype={out_dtype} does not fit into, which is float32: leave out_dtype out")
        refuse_gradients(into)
        torch.ops.sbn_kernels.add_weight_gradient(into, b8t, scale, x8t, portable, list(launch or ()))
        return into
    args = (b8t, scale, x8t, out_dtype, portable, list(launch or ()))
    result: Tensor = torch.ops.sbn_kernels.weight_gradient(*args)
    return result


def _on_hopper(b8t: Tensor, scale: Tensor, x8t: Tensor, out_dtype: torch.dtype) -> Tensor:
    return weight_gradient_gemm(b8t, scale, x8t, out_dtype, portable=False)


def _add_on_hopper(into: Tensor, b8t: Tensor, scale: Tensor, x8t: Tensor) -> None:
    weight_gradient_gemm(b8t, scale, x8t, into=into, portable=False)


def _portable(b8t: Tensor, scale: Tensor, x8t: Tensor, out_dtype: torch.dtype) -> Tensor:
    return weight_gradient_gemm(b8t, scale, x8t, out_dtype, portable=True)


register(
    Gradients(
        name="hopper",
        needs=NEEDS,
        transpose=pack_transposed,
        input_gradient=input_gradient_gemm,
        weight_gradient=_on_hopper,
        add_weight_gradient=_add_on_hopper,
        rank=10,
    )
)
register(
    Gradients(
        name="portable",
        needs=portable_gemm.NEEDS,
        transpose=transpose_tokens,
        input_gradient=input_gradient_gemm,
        weight_gradient=_portable,
    )
)
