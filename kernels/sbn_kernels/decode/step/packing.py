"""Packs ternary weights for the decode step, in plain PyTorch: the definition that the kernel is tested against.

Dense 2-bit codes serve every N:M pattern. The layout for 2:4 in ``sbn_kernels.common.packing`` has as many bytes, and
bytes and latency limit the step, not multiplications. So there is one layout for all patterns. The layout differs from
``sbn_kernels.common.packing`` in three ways. A code ``t`` is stored as ``t + 1``, so one logical instruction unpacks
four codes. The columns of a lane are neighbours, so tokens need no permutation. The scales and biases of 16 rows stand
behind the codes, so one copy brings codes, scales and biases.

A tile is 16 rows: ``[steps, 32 lanes, 4 words]`` of codes as described in ``gemv.py``, then, for h = 0 to 7, the
float32 scales of rows h and h + 8 and their biases. A layer is the tiles of q, k and v, of o, of gate and up, and of
down, one after the other.

Rows are permuted for what comes after the product. A tile of q, k, v holds features ``8 i ..`` and ``E/2 + 8 i ..`` of
a head, which the rotation turns against each other. A tile of gate and up holds 8 gates and the 8 ups that belong to
them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sbn_kernels.decode.step.plan import STEP, TILE_ROWS


def qkv_order(heads: int, head_size: int, device: torch.device | str) -> Tensor:
    """The row numbers of ``heads`` heads (queries, keys and values) in the order of the tiles, int64."""
    rows = torch.arange(heads * head_size, device=device).view(heads, 2, head_size // 16, 8)
    return rows.transpose(1, 2).flatten()


def gate_up_order(d_ffn: int, device: torch.device | str) -> Tensor:
    """The row numbers of ``[gate; up]`` in the order of the tiles, int64."""
    return torch.arange(2 * d_ffn, device=device).view(2, d_ffn // 8, 8).transpose(0, 1).flatten()


def pack_tiles(codes: Tensor, row_scale: Tensor, bias: Tensor | None = None, order: Tensor | None = None) -> Tensor:
    """Packs one matrix.

    Args:
        codes: The ternary codes, int8 ``[rows, columns]``; the number of rows is a multiple of 16.
        row_scale: The scale of each row, float32 ``[rows]``.
        bias: The bias ``[rows]``, or None.
        order: A permutation of the rows, or None.

    Returns:
        The tiles, int32 ``[rows / 16, words of a tile]``.
    """
    rows = codes.shape[0]
    bias = torch.zeros_like(row_scale) if bias is None else bias.float()
    if order is not None:
        codes, row_scale, bias = codes[order], row_scale[order], bias[order]
    two_bit = (F.pad(codes, (0, -codes.shape[1] % STEP)) + 1).to(torch.uint8)
    # row = 16 tile + 8 r + g, column = 128 step + 32 t + 8 j + 4 h + b
    parts = two_bit.view(rows // TILE_ROWS, 2, 8, -1, 4, 4, 2, 4)
    by_byte = parts[..., 0, :, :] | parts[..., 1, :, :] << 2 | parts[..., 2, :, :] << 4 | parts[..., 3, :, :] << 6
    # now [tile, r, g, step, t, h, b] -> [tile, step, g, t, h, r, b]
    words = by_byte.permute(0, 3, 2, 4, 5, 1, 6).contiguous().view(torch.int32)
    tail = torch.stack([row_scale.float(), bias]).view(2, -1, 2, 8).permute(1, 3, 0, 2).contiguous()
    return torch.cat([words.reshape(rows // TILE_ROWS, -1), tail.flatten(1).view(torch.int32)], dim=1)


def unpack_tiles(tiles: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Reverses :func:`pack_tiles` without an order: codes int8 ``[rows, columns]``, scales and biases ``[rows]``."""
    steps = -(-columns // STEP)
    words, tail = tiles[:, : steps * 128].contiguous(), tiles[:, steps * 128 :].contiguous().view(torch.float32)
    by_byte = words.view(torch.uint8).view(len(tiles), steps, 8, 4, 2, 2, 4)  # tile, step, g, t, h, r, b
    parts = torch.stack([by_byte >> 2 * j & 3 for j in range(4)], dim=4)  # tile, step, g, t, j, h, r, b
    codes = parts.permute(0, 6, 2, 1, 3, 4, 5, 7).reshape(len(tiles) * TILE_ROWS, steps * STEP)
    scale, bias = tail.view(-1, 8, 2, 2).permute(2, 0, 3, 1)
    return codes[:, :columns].to(torch.int8) - 1, scale.flatten(), bias.flatten()
