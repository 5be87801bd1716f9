"""Kernels for a ternary weight whose rows lie on several ranks. ``sbn_lightning.distributed`` has the whole procedure.

Each rank sums its rows (:mod:`sbn_kernels.prepare.rows`). From the sums of all ranks, :func:`gamma_of_parts` computes
gamma of all layers of a model in one launch. :func:`encode_rows` makes mask and codes of a rank's rows in one pass over
the latent weight, and writes nothing but words of 2 bits a weight, which travel. :func:`decode_rows` turns the words of
all ranks into everything a product reads: codes, mask bits and packed words, in one launch for a layer.

Results equal those of :func:`~sbn_kernels.prepare.triton.prepare_weight` on one rank bit for bit. The sums of rows are
added in float64, in the order of the rows, whatever the number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sbn_kernels.common.buffers import empty_vector
from sbn_kernels.common.checks import FLOAT_DTYPES, refuse_gradients
from sbn_kernels.common.integers import ceil_div
from sbn_kernels.common.packing import LAYOUTS, packed_shape
from sbn_kernels.exchange.device import decode_kernel, encode_kernel, gamma_of_parts_kernel
from sbn_kernels.prepare.device import TILE_COLUMNS, TILE_ROWS
from sbn_kernels.runtime.capability import Needs, require
from sbn_kernels.runtime.launch import Launcher
from sbn_kernels.runtime.ops import kernel_fake, kernel_op

NEEDS = Needs("exchange", least=(0, 0), interpreter=True)
GROUPS_IN_REGISTERS = (1, 2, 4, 8)  # The group sizes of which ``encode_rows`` makes a fresh mask.
NUMBERS_OF_A_PART = 7

_gamma = Launcher(gamma_of_parts_kernel, enable_fp_fusion=True)
_encode = Launcher(encode_kernel, enable_fp_fusion=True)
_decode = Launcher(decode_kernel, enable_fp_fusion=True)


@kernel_op("gamma_of_parts")
def _gamma_of_parts(terms: Tensor, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    require(NEEDS, terms)
    gamma = torch.empty(len(table), dtype=torch.float32, device=terms.device)
    row_scale = empty_vector(length, terms.device)
    tensors = (terms, terms.view(torch.int32), table, gamma, row_scale)
    _gamma((len(table), 1, 1), tensors, (terms.stride(0),), (1024,), 8)
    return gamma, row_scale


@kernel_fake("gamma_of_parts")
def _(terms: Tensor, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    gamma = torch.empty(len(table), dtype=torch.float32, device=terms.device)
    return gamma, empty_vector(length, terms.device)


def gamma_of_parts(terms: Tensor, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """gamma of every part of every weight of a model, from the row sums of all ranks.

    Args:
        terms: The sums of all ranks, float32 ``[ranks, sums of a rank]``. Counts of weights lie in the same buffer, as
            the bits of int32 numbers.
        table: int32 ``[parts, 7]``. The numbers of a part are: where the sums of its weight begin in the buffer of a
            rank; where the counts of its weight begin, or -1 if gamma is the mean over all weights; the number of rows
            that a rank sends for the weight; the first row of the part; the rows of the part; the weights in a row; and
            where the row scales of its weight begin.
        length: The length of the row scales of all weights together.

    Returns:
        gamma, float32 ``[parts]``, and the row scales, float32 ``[length]``.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If there is no GPU.
    """
    if terms.dim() != 2 or terms.dtype != torch.float32 or not terms.is_contiguous():
        raise ValueError(f"terms must be contiguous float32 [ranks, sums], not {terms.dtype} {list(terms.shape)}")
    if table.dim() != 2 or table.shape[1] != NUMBERS_OF_A_PART or table.dtype != torch.int32:
        raise ValueError(f"table must be int32 [parts, {NUMBERS_OF_A_PART}], not {table.dtype} {list(table.shape)}")
    gamma, row_scale = torch.ops.sbn_kernels.gamma_of_parts(terms, table, length)
    return gamma, row_scale


@kernel_op("encode_rows")
def _encode_rows(weight: Tensor, row_scale: Tensor, n: int, m: int, mask_bits: Tensor | None) -> Tensor:
    require(NEEDS, weight)
    rows, columns = weight.shape
    words = torch.empty((rows, ceil_div(columns, 4)), dtype=torch.uint8, device=weight.device)
    if rows == 0:
        return words
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    pattern = (n, m) if mask_bits is None else (4, 4)  # A given mask needs no code for a pattern of its own.
    _encode(
        (ceil_div(rows, TILE_ROWS), ceil_div(columns, TILE_COLUMNS), 1),
        (weight, row_scale, weight if mask_bits is None else mask_bits, words),
        (rows, columns, weight.stride(0), 0 if mask_bits is None else mask_bits.stride(0), words.shape[1]),
        (*pattern, mask_bits is not None, TILE_ROWS, TILE_COLUMNS),
        8,
    )
    return words


@kernel_fake("encode_rows")
def _(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    return torch.empty((rows, ceil_div(columns, 4)), dtype=torch.uint8, device=weight.device)


def encode_rows(weight: Tensor, row_scale: Tensor, n: int, m: int, mask_bits: Tensor | None = None) -> Tensor:
    """Makes mask and codes of some rows, and packs both at 2 bits a weight.

    Args:
        weight: Latent weights ``[rows, in]``, float32, bfloat16 or float16. There may be no rows.
        row_scale: gamma of each row, float32 ``[rows]``.
        n: The number of weights that a fresh mask leaves in a group.
        m: The number of weights of a group: 1, 2, 4 or 8 for a fresh mask, unless ``n == m``.
        mask_bits: The mask to use instead of a fresh one, uint8 ``[rows, ceil(in / 8)]``.

    Returns:
        The words of :func:`~sbn_kernels.exchange.reference.encode_reference`, uint8 ``[rows, ceil(in / 4)]``.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If there is no GPU.
    """
    refuse_gradients(weight, row_scale)
    if weight.dim() != 2 or weight.dtype not in FLOAT_DTYPES or weight.shape[1] == 0:
        shape = list(weight.shape)
        raise ValueError(f"weight must be float32, bfloat16 or float16 [rows, in], not {weight.dtype} {shape}")
    rows, columns = weight.shape
    if row_scale.shape != (rows,) or row_scale.dtype != torch.float32 or row_scale.stride(0) != 1:
        raise ValueError(
            f"row_scale must be contiguous float32 [{rows}], not {row_scale.dtype} {list(row_scale.shape)}"
        )
    if mask_bits is None and n != m and (m not in GROUPS_IN_REGISTERS or columns % m):
        raise ValueError(f"{n}:{m} of {columns} weights in a row: give the mask")
    want = (rows, ceil_div(columns, 8))
    if mask_bits is not None and (mask_bits.shape != want or mask_bits.dtype != torch.uint8):
        raise ValueError(f"mask_bits must be uint8 {list(want)}, not {mask_bits.dtype} {list(mask_bits.shape)}")
    words: Tensor = torch.ops.sbn_kernels.encode_rows(weight, row_scale, n, m, mask_bits)
    return words


def _decoded(words: Tensor, rows: int, columns: int, layout: str, want_mask: bool) -> tuple[Tensor, Tensor, Tensor]:
    device = words.device
    bits = (rows, ceil_div(columns, 8)) if want_mask else (0, 0)
    packed = packed_shape(rows, columns) if layout != "none" else (0, 0, 0)
    return (
        torch.empty((rows, columns), dtype=torch.int8, device=device),
        torch.empty(bits, dtype=torch.uint8, device=device),
        torch.empty(packed, dtype=torch.int32, device=device),
    )


@kernel_op("decode_rows")
def _decode_rows(words: Tensor, rows: int, columns: int, layout: str, want_mask: bool) -> tuple[Tensor, Tensor, Tensor]:
    require(NEEDS, words)
    codes, bits, packed = _decoded(words, rows, columns, layout, want_mask)
    halves = 2 * packed.shape[0] if layout != "none" else ceil_div(rows, TILE_ROWS)
    _decode(
        (halves, ceil_div(columns, TILE_COLUMNS), 1),
        (words, bits, codes, packed),
        (rows, columns, words.shape[1], words.stride(0), words.stride(1), bits.shape[1], packed.shape[1]),
        (want_mask, LAYOUTS.index(layout), TILE_ROWS, TILE_COLUMNS),
        8,
    )
    return codes, bits, packed


@kernel_fake("decode_rows")
def _(words: Tensor, rows: int, columns: int, layout: str, want_mask: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _decoded(words, rows, columns, layout, want_mask)


def decode_rows(
    words: Tensor, rows: int, columns: int, layout: str = "none", *, want_mask: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Unpacks the words of all ranks to what the products read.

    Args:
        words: uint8 ``[ranks, rows of a rank, ceil(in / 4)]``; the first two dimensions may have any stride.
        rows: The rows of the weight. The last ranks may have sent rows that do not count.
        columns: The number of weights in a row.
        layout: The layout of the packed words: ``"none"``, ``"dense"`` or ``"sparse24"``.
        want_mask: Whether to return mask bits.

    Returns:
        Codes, int8 ``[rows, in]``; mask bits, uint8 ``[rows, ceil(in / 8)]``; and packed words, int32, see
        :mod:`sbn_kernels.common.packing`. What was not asked for is empty.

    Raises:
        ValueError: If an argument does not fit.
        UnsupportedError: If there is no GPU.
    """
    if words.dim() != 3 or words.dtype != torch.uint8 or words.shape[2] != ceil_div(columns, 4) or words.stride(2) != 1:
        shape = list(words.shape)
        raise ValueError(f"words must be uint8 [ranks, rows, {ceil_div(columns, 4)}], not {words.dtype} {shape}")
    if not 0 < rows <= words.shape[0] * words.shape[1]:
        raise ValueError(f"{words.shape[0]} ranks with {words.shape[1]} rows each do not hold {rows} rows")
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    codes, bits, packed = torch.ops.sbn_kernels.decode_rows(words, rows, columns, layout, want_mask)
    return codes, bits, packed
