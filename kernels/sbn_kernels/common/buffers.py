"""Tensors with the alignment and the spare room that the kernels rely on."""

from __future__ import annotations

import torch
from torch import Tensor

from sbn_kernels.common.integers import ceil_div


def empty_tokens(rows: int, columns: int, device: torch.device) -> Tensor:
    """Uninitialised int8 ``[rows, columns]``; the row stride is ``columns`` rounded up to 16, as TMA needs."""
    stride = ceil_div(columns, 16) * 16
    whole = torch.empty((rows, stride), dtype=torch.int8, device=device)
    return whole if stride == columns else whole[:, :columns]


def empty_vector(length: int, device: torch.device) -> Tensor:
    """Uninitialised float32 ``[length]``; its memory goes on to a multiple of 256 elements, the largest tile."""
    room = ceil_div(length, 256) * 256
    whole = torch.empty(room, dtype=torch.float32, device=device)
    return whole if room == length else whole[:length]


def contiguous(*vectors: Tensor) -> list[Tensor]:
    """The vectors as kernels read them; a vector that is expanded or strided is copied."""
    return [vector.contiguous() for vector in vectors]


def with_rows(x: Tensor) -> Tensor:
    """``x`` itself if a kernel can read its rows element after element, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def aligned_tokens(x8: Tensor) -> Tensor:
    """``x8`` itself if its rows can be read in whole 16-byte pieces, else a copy whose rows can."""
    rows, columns = x8.shape
    whole = x8.storage_offset() + rows * x8.stride(0) <= x8.untyped_storage().nbytes()
    if whole and x8.stride(1) == 1 and x8.stride(0) % 16 == 0 and x8.data_ptr() % 16 == 0 and x8.stride(0) >= columns:
        return x8
    return empty_tokens(rows, columns, x8.device).copy_(x8)


def padded_to(vector: Tensor, multiple: int) -> Tensor:
    """``vector`` itself if its own memory goes on to a multiple of ``multiple`` elements, else a copy with that room.

    Kernels read whole tiles; what they read beyond the end is never stored. Vectors of this package have the room (see
    :func:`empty_vector`), so only foreign vectors are copied, and only where the last tile is not full.
    """
    length = ceil_div(vector.shape[0], multiple) * multiple
    end = (vector.storage_offset() + length) * vector.element_size()
    if vector.stride(0) == 1 and end <= vector.untyped_storage().nbytes():
        return vector
    copy = vector.new_empty(length)
    copy[: vector.shape[0]] = vector
    return copy
