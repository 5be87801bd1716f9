"""Tensor descriptors for TMA. Making one needs Triton >= 3.9.

Triton checks each descriptor when it is made, which takes 2 microseconds of the host's time, three or four times a
product. The class here skips those checks. The one fault that can occur here, misaligned memory, is still checked.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor


@functools.cache
def _descriptor_class() -> Any:
    """Triton's class of descriptors without its checks."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    class Descriptor(TensorDescriptor):
        def __post_init__(self) -> None:
            pass

    return Descriptor


@functools.cache
def tma_layouts() -> dict[int, Any]:
    """Shared-memory layouts with 128-byte swizzle; the key is the number of bits of an element."""
    from triton.experimental.gluon import language as gl

    return {bits: gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2) for bits in (8, 16, 32)}


def descriptor(tensor: Tensor, shape: tuple[int, int], stride: int, block: tuple[int, int]) -> Any:
    """Makes what TMA needs to copy blocks of a matrix that starts where ``tensor`` starts.

    Args:
        tensor: The tensor that gives address and dtype.
        shape: Rows and columns of the matrix, neither of them 0.
        stride: Elements from one row to the next.
        block: Rows and columns of a block, powers of two; a row of a block is at least 128 bytes.

    Returns:
        The descriptor, an argument for a Gluon kernel.

    Raises:
        ValueError: If the memory or a row does not start on a 16-byte boundary.
    """
    size = tensor.element_size()
    if tensor.data_ptr() % 16 or stride * size % 16:
        raise ValueError(f"TMA needs 16-byte boundaries: address {tensor.data_ptr()}, rows {stride * size} bytes apart")
    return _descriptor_class()(tensor, list(shape), [stride, 1], list(block), tma_layouts()[8 * size])
