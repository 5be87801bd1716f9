"""Tensor descriptors for TMA. Needs Triton >= 3.9 once one is made.

Triton checks each descriptor that it makes, for 2 microseconds of the host's time, three or four times a product. What
these checks guard against cannot come up here but for misaligned memory, which is checked.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor


@functools.cache
def _kind() -> Any:
    """Triton's class of descriptors without its checks."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    class Descriptor(TensorDescriptor):
        def __post_init__(self) -> None:
            pass

    return Descriptor


@functools.cache
def tma_layouts() -> dict[int, Any]:
    """Shared-memory layouts with 128-byte swizzle, by bits an element."""
    from triton.experimental.gluon import language as gl

    return {bits: gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2) for bits in (8, 16, 32)}


def descriptor(tensor: Tensor, shape: tuple[int, int], stride: int, block: tuple[int, int]) -> Any:
    """What TMA needs to copy blocks of a matrix of ``shape`` that starts where ``tensor`` does.

    Args:
        tensor: Gives address and dtype.
        shape: Rows and columns, not 0.
        stride: Elements from one row to the next.
        block: Rows and columns of a block, powers of two; a row of it is at least 128 bytes.

    Raises:
        ValueError: If memory does not start, or rows do not follow, on 16-byte boundaries.
    """
    size = tensor.element_size()
    if tensor.data_ptr() % 16 or stride * size % 16:
        raise ValueError(f"TMA needs 16-byte boundaries: address {tensor.data_ptr()}, rows {stride * size} bytes apart")
    return _kind()(tensor, list(shape), [stride, 1], list(block), tma_layouts()[8 * size])
