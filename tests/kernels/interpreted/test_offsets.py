"""Offsets of 2^31 elements and more. Memory is reserved for whole tensors, and only the parts in use exist."""

from __future__ import annotations

import mmap

import pytest
import torch
from sbn_kernels.block import rope_backward
from sbn_kernels.block.reference import rope_backward_reference
from sbn_kernels.prompt import attend, attend_reference
from sbn_kernels.prompt.attention import attend_kernel
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.usefixtures("poisoned_buffers")
FAR = 2**30  # Twice this is the first offset that does not fit 32 bits.
NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux, which the mmap of older Pythons does not name


def reserve(dtype: torch.dtype) -> Tensor:
    """Zeros ``[2 FAR + 2^18]``, with as much room before them: an offset that became negative reads zeros."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    room = mmap.mmap(-1, (4 * FAR + 2**18) * dtype.itemsize, flags=flags)
    return torch.frombuffer(room, dtype=dtype)[2 * FAR :]


def spread(values: Tensor, far: int) -> Tensor:
    """``values`` in memory where the entries of dimension ``far`` are FAR elements apart."""
    strides = list(values.stride())
    strides[far] = FAR
    placed = reserve(values.dtype).as_strided(values.shape, strides, 2 * FAR)
    assert strides[far] * (values.shape[far] - 1) == 2**31
    return placed.copy_(values)


@pytest.mark.parametrize("far", [1, 2], ids=["heads", "tokens"])
def test_gradients_of_rotated_heads(far: int) -> None:
    dq, dk, dv = torch.randn(3, 1, 3, 3, 8).half()
    tables = torch.randn(2, 3, 8)
    ours = rope_backward(spread(dq, far), spread(dk, far), spread(dv, far), *tables)
    torch.testing.assert_close(ours, rope_backward_reference(dq, dk, dv, *tables), rtol=2**-9, atol=2**-9)


def test_tables_of_rotations() -> None:
    dq, dk, dv = torch.randn(3, 1, 2, 3, 8)
    cos, sin = torch.randn(2, 3, 8)
    ours = rope_backward(dq, dk, dv, spread(cos, 0), spread(sin, 0))
    torch.testing.assert_close(ours, rope_backward_reference(dq, dk, dv, cos, sin))


@pytest.mark.parametrize("far", [1, 2], ids=["heads", "tokens"])
def test_queries(far: int) -> None:
    q, keys, values = torch.randn(3, 1, 3, 3, 64).half()
    row, before = torch.tensor([0]), torch.tensor([0])
    ours = attend(spread(q, far), keys, values, row, before)
    torch.testing.assert_close(ours, attend_reference(q, keys, values, row, before), rtol=2**-9, atol=2**-9)


def test_attended_values() -> None:
    """One program of the many for 2^24 heads: each token's result is FAR elements behind the one before."""
    q, keys, values = torch.randn(3, 1, 1, 3, 64).half()
    row, before = torch.tensor([0]), torch.tensor([0])
    heads = FAR // 64
    caches = [TensorDescriptor.from_tensor(cache.view(-1, 64), [64, 64]) for cache in (keys, values)]
    y = reserve(torch.float16)
    attend_kernel[(1, 1, 1)](
        *caches, q, row, before, y, 3, 3, *q.stride()[:3],
        HEADS=heads, GROUP=heads, SIZE=64, QUERIES=64, KEYS=64, EARLY=False,
    )  # fmt: skip
    expected = attend_reference(q, keys, values, row, before)[0, :, 0]
    torch.testing.assert_close(y.as_strided((3, 64), (FAR, 1)), expected, rtol=2**-9, atol=2**-9)
